"""Cells that start from a pretrained model: adapters, scores before training, forgetting on rows of another kind."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from worlds import save_tiny_llama, write_rows

from deft_lightning.errors import UserError
from deft_lightning.models.lora import LoRA
from deft_lightning.objectives import NLL
from deft_lightning.study import Base, Regime, Study
from deft_lightning.study.cells import run_cell, score_start, start, start_file
from deft_lightning.study.report import summary
from deft_lightning.study.tables import text
from deft_lightning.study.tasks import rows_apart, rows_of

RANK_ZERO = "lightning_utilities.core.rank_zero"


@pytest.fixture(autouse=True)
def cells_are_quiet_in_processes_of_their_own() -> Iterator[None]:
    """Put back what a cell silences: elsewhere its process ends with the study."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", RANK_ZERO)]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    transformers.utils.logging.enable_progress_bar()


def made(tmp_path: Path, **setting: Any) -> Study:
    rows = [{"prompt": f"say {i}", "completion": "yes " * (1 + i % 7)} for i in range(60)]
    other = [{"prompt": f"count {i}", "completion": f"{i} {i + 1}"} for i in range(40)]
    model = save_tiny_llama(tmp_path / "model", 0.3)
    options = {"judge": "nll", "batch_size": 4, "noise": [0.0], "headline": [0.0], "looks": 1, **setting}
    regime = Regime(
        write_rows(tmp_path / "rows.jsonl", rows), 6, 1e-2, lora=LoRA(r=2),
        forgetting=write_rows(tmp_path / "other.jsonl", other), **options,
    )  # fmt: skip
    return Study({"real": regime}, {}, objectives=[NLL()], headline_seeds=1, rows=20, held_out=8, pretrained=model)


def test_the_model_of_the_study_is_that_of_regimes_without_one(tmp_path: Path) -> None:
    study = made(tmp_path)
    (cell,) = study.shared()
    assert cell.setting.pretrained == study.pretrained
    module, _, _ = start(cell, tmp_path / "out")
    assert module.lora == LoRA(r=2) and module.forgetting
    own = Regime("a", 5, 1e-3, pretrained="mine")
    apart = Study({"own": own, "base": Regime("a", 5, 1e-3, base=Base("a", 2))}, {}, pretrained="theirs")
    assert apart.cell("own", NLL(), 0.0, 1e-3, 0).setting.pretrained == "mine"
    assert apart.cell("base", NLL(), 0.0, 1e-3, 0).setting.pretrained is None


def test_adapters_without_a_model_are_refused() -> None:
    with pytest.raises(UserError, match="regime a: lora needs a trained model; name pretrained or a base"):
        Study({"a": Regime("a", 5, 1e-3, lora=LoRA())}, {})


def test_a_run_tells_what_training_changed(tmp_path: Path) -> None:
    """On its own rows, and on rows of another kind; without training neither moves."""
    study, root = made(tmp_path), tmp_path / "out"
    (cell,) = study.shared()
    before, result = score_start(cell, root), run_cell(cell, root)
    file = start_file(cell, root)
    assert file is not None and json.loads(file.read_text())["nll"] == before["nll"]
    assert result["test"]["nll"] < before["nll"] - 0.1
    assert result["test"]["forgetting/kl"] > 0.001
    assert len(result["curves"]["val/nll"][0]) == 1  # one look
    still = study.cell("real", NLL(), 0.0, 1e-12, 0)
    unmoved = run_cell(still, root)["test"]
    assert unmoved["nll"] == pytest.approx(before["nll"], abs=1e-6)
    assert unmoved["forgetting/kl"] == pytest.approx(0, abs=1e-6)
    report = summary(study, {cell.id: result}) | {"bases": [{"regime": "real", **before}]}
    assert f"| real | {before['nll']:.3f} |" in text(report)
    assert f"{result['test']['forgetting/kl']:.3f}" in text(report)


def test_rows_above_a_length_are_left_out(tmp_path: Path) -> None:
    (cell,) = made(tmp_path, max_characters=20).shared()
    task = rows_of(cell, tmp_path / "out")
    rows = [json.loads(line) for path in task for line in path.read_text().splitlines()]
    assert rows and all(len(row["prompt"]) + len(row["completion"]) <= 20 for row in rows)
    (everything,) = made(tmp_path).shared()
    longest = [
        json.loads(line) for path in rows_of(everything, tmp_path / "out") for line in path.read_text().splitlines()
    ]
    assert max(len(row["prompt"]) + len(row["completion"]) for row in longest) > 20
    apart = rows_apart(cell, tmp_path / "out")
    assert apart is not None and "count" in apart.read_text()
