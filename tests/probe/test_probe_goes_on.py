"""A probe that is killed goes on where it was; it says how far it is, and how long it takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import constant, write_rows

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.probe import kept, pace
from deft_lightning.probe.kept import FOLDER, Kept, digest
from deft_lightning.probe.pace import Pace, duration
from deft_lightning.probe.reading import announce

pytestmark = pytest.mark.usefixtures("heard")
PRETRAINED = {"spread": 0.6}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> None:
    """Hear what is said beside the table."""
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")


def rows(count: int) -> list[dict[str, str]]:
    """Rows of very different lengths."""
    words = np.random.default_rng(0).choice(["red", "green", "one", "two", "cat", "yes"], (count, 15))
    lengths = np.random.default_rng(1).integers(2, 15, count)
    return [
        {"id": f"r{i}", "question": " ".join(row[:2]), "answer": " ".join(row[:length])}
        for i, (row, length) in enumerate(zip(words.tolist(), lengths.tolist(), strict=True))
    ]


def probe(root: Path, pretrained: str, source: str) -> dict[str, Any]:
    data = InstructionDataModule(source, validation_fraction=0.0, batch_size=2, tokenizer=pretrained)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=str(root))
    return trainer.probe(SFTModule(pretrained=pretrained), data, output=str(root / "out"))


def trained(root: Path, pretrained: str, source: str) -> str:
    """A checkpoint of two steps."""
    options = {"optimizer": lambda groups: torch.optim.AdamW(groups, lr=0.01), "scheduler": constant}
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=2, logger=False, default_root_dir=str(root), monitors=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    data = InstructionDataModule(source, validation_fraction=0.0, batch_size=2, tokenizer=pretrained)
    trainer.fit(SFTModule(pretrained=pretrained, **options), data)  # type: ignore[arg-type]
    trainer.save_checkpoint(root / "trained.ckpt")
    return str(root / "trained.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("compare", [False, True], ids=["one model", "two models"])
def test_a_killed_probe_goes_on_and_says_the_same(compare: bool, pretrained: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", rows(400))
    second = ["--compare", trained(tmp_path, pretrained, source)] if compare else []

    def started(root: Path) -> tuple[subprocess.Popen[str], Path]:
        """Start in a process of its own, which knows no objectives but the package's."""
        command = [
            sys.executable, "-m", "deft_lightning", "probe", "--model.pretrained", pretrained, "--data.source", source,
            "--data.validation_fraction", "0", "--data.batch_size", "2", "--trainer.accelerator", "cpu",
            "--trainer.default_root_dir", str(root), "--output", str(root / "out"), "--page", str(root / "gate.html"),
            *second,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        out = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return out, root / "out"

    undisturbed, alone = started(tmp_path / "alone")
    text, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0 and "goes on" not in text, text[-2000:]
    process, output = started(tmp_path / "killed")
    kept = output / FOLDER / ("compared/" + FOLDER if compare else "")  # the second model's, once the first is through
    while len(list(kept.glob("prompted-*.npz"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"
    assert not (output / "probe.json").exists() and not (tmp_path / "killed" / "gate.html").exists()
    assert any(path.name.startswith("bare-") for path in kept.glob("*.npz"))
    again, _ = started(tmp_path / "killed")
    text, _ = again.communicate(timeout=300)
    # Each model has two passes; those of the first one are through, and are not computed again.
    assert again.returncode == 0 and text.count("resuming a stopped probe") == (4 if compare else 2), text[-2000:]
    assert json.loads((output / "probe.json").read_text()) == json.loads((alone / "probe.json").read_text())
    assert (tmp_path / "killed" / "gate.html").read_bytes() == (tmp_path / "alone" / "gate.html").read_bytes()
    assert not (output / FOLDER).exists()


def batch(value: int) -> dict[str, Any]:
    return {"input_ids": torch.full((2, 3), value), "labels": torch.full((2, 3), value)}


def test_only_results_of_the_same_rows_and_model_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "SHARE", 0.0)
    done = Kept(tmp_path, "a model").of("prompted", 100)
    for value in range(4):
        assert done.take(batch(value)) is None
        done.add(batch(value), {"log_prob": torch.full((2,), float(value))})
    again = Kept(tmp_path, "a model").of("prompted", 100)
    for value in range(2):
        fields = again.take(batch(value))
        assert fields is not None and fields["log_prob"].tolist() == [value, value]
    assert again.take(batch(7)) is None  # another row: nothing behind it is of use
    again.add(batch(7), {"log_prob": torch.zeros(2)})
    assert again.take(batch(3)) is None
    assert Kept(tmp_path, "another model").of("prompted", 100).take(batch(0)) is None
    assert digest(batch(1)) != digest(batch(2))


def test_a_damaged_file_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "SHARE", 0.0)
    done = Kept(tmp_path).of("bare", 100)
    for value in range(3):
        done.take(batch(value))
        done.add(batch(value), {"log_prob": torch.zeros(2)})
    _, second, _ = sorted((tmp_path / FOLDER).glob("*.npz"))
    second.write_bytes(second.read_bytes()[:50])
    assert Kept(tmp_path).of("bare", 100).batches == 1


@pytest.mark.parametrize(("seconds", "text"), [(3.2, "3 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations_are_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_log_says_rows_done_and_time_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(pace, "FIRST", 0.0)
    monkeypatch.setattr(pace, "EVERY", 0.0)
    with Pace("reading", 1000, 2000) as shown:
        shown.update(500, 500, computed=False)
        time.sleep(0.5)
        shown.update(250, 500)
    lines = [line for line in caplog.messages if line.startswith("reading")]
    assert lines[0] == "reading: 500 of 1,000 rows, from before"
    # Half of the tokens are left, and of the other half one half took half a second.
    assert lines[1] == "reading: 750 of 1,000 rows, 1 s left"


def test_its_time_is_told_before_it_starts(pretrained: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_rows(tmp_path / "rows.jsonl", rows(60))
    probe(tmp_path, pretrained, source)
    assert "probe: 60 rows of" in caplog.text and "at most about" in caplog.text
    assert announce(None, None, range(49), torch.device("cpu"), 1.5) is None
