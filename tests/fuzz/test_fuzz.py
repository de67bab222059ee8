"""Malformed checkpoints and model folders are used or told, never a traceback.

With the rows, predictions and configs of ``data/test_fuzz_data.py``, ``evaluation/test_fuzz_score.py`` and
``test_options.py`` there are more than 300 inputs.

What is raised must be an error of which the command line makes one line (``crash.explain``); another one would be a
crash file. A part of the inputs goes through the command line itself. The seed is fixed; ``FUZZ_SEED`` sets another,
``FUZZ_COUNT`` more inputs.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "security")]

import checkpoints  # noqa: E402 - beside this file
import models  # noqa: E402
from attacks import (  # noqa: E402
    Place,
    bounded,
    command,
    prepared,
    run,
)

from deft_lightning import InstructionDataModule, SFTModule, Trainer  # noqa: E402
from deft_lightning.cli.crash import explain  # noqa: E402
from deft_lightning.models import load_checkpoint, model_from_checkpoint, save_hugging_face  # noqa: E402

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("FUZZ_SEED", 12))
TIMES = float(os.environ.get("FUZZ_COUNT", 300)) / 300


def line_of(action: Callable[[], Any]) -> str:
    """Run something; return the line of its error, nothing without one; fail where there would be a traceback."""
    try:
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action()
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        assert "\n" not in line and "\x1b" not in line and "\u202e" not in line
        return line
    return ""


def survive(cases: Iterator[tuple[str, Path]], use: Callable[[Path], Any]) -> dict[str, str]:
    """Use every case; return what was told of each, and fail with the names of those that crash."""
    said, crashed = {}, []
    for name, path in cases:
        try:
            said[name] = line_of(lambda path=path: use(path))
        except Exception as error:
            crashed.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    assert not crashed, "\n".join(crashed)
    return said


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    root, _, _ = prepared()
    return next(root.rglob("step=2.ckpt"))


def export_from(path: Path) -> None:
    network, tokenizer, stops = model_from_checkpoint(load_checkpoint(path))
    save_hugging_face(network, tokenizer, stops, path.with_suffix(".out"))


def test_malformed_checkpoints_are_exported_or_told(checkpoint: Path, tmp_path: Path) -> None:
    said = survive(checkpoints.cases(SEED, int(80 * TIMES), checkpoint, tmp_path), export_from)
    assert sum(bool(line) for line in said.values()) > 0.4 * len(said), "most of them cannot be used"


def fit(model: str | None, rows: Path, root: Path, resume: Path | None = None) -> None:
    module = SFTModule(
        pretrained=model,
        architecture={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    data = InstructionDataModule(str(rows), batch_size=4, cache_dir=str(root / "cache"), validation_fraction=0.0)
    trainer = Trainer(
        max_steps=3, default_root_dir=str(root), logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=None if resume is None else str(resume))


def test_malformed_checkpoints_are_resumed_or_told(checkpoint: Path, tmp_path: Path) -> None:
    _, _, rows = prepared()
    cases = checkpoints.cases(SEED + 1, int(40 * TIMES), checkpoint, tmp_path)
    said = survive(cases, lambda path: fit(None, rows, tmp_path / "runs", path))
    assert sum(bool(line) for line in said.values()) > 0.3 * len(said)


def test_malformed_model_folders_are_trained_or_told(tmp_path: Path) -> None:
    _, model, rows = prepared()
    cases = models.cases(SEED, int(80 * TIMES), model, tmp_path)
    said = survive(cases, lambda path: fit(str(path), rows, tmp_path / "runs"))
    assert sum(bool(line) for line in said.values()) > 0.3 * len(said)


def test_some_of_them_through_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    root, model, rows = prepared()
    place = Place(tmp_path, tmp_path / "marker", root, model, rows)
    some = [
        *(["--ckpt_path", str(path)] for _, path in checkpoints.cases(SEED + 2, 5, checkpoint, tmp_path)),
        *(["--model.pretrained", str(path)] for _, path in models.cases(SEED + 2, 5, model, tmp_path / "models")),
    ]
    for option in some:
        found = run([*command("fit", place), *option], place.marker)
        assert found.code in (0, 2) and "Traceback" not in found.err + found.out, found.err[-2000:]
        assert found.code == 0 or found.line, found.err[-2000:]
