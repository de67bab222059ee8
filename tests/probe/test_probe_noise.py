"""The printed noise rate and recommendation, by a model that has learnt its task, against injected noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import write_rows

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.data.noise import Noise, ResponseSwap
from deft_lightning.objectives import NLL

PRETRAINED = {"spread": 0.6}
SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def names() -> list[dict[str, str]]:
    """Return rows of a number and a name for it, which nothing but the number tells."""
    letters = np.random.default_rng(0).choice(list("abdefghiklmnoprstu"), (60, 5))
    return [{"id": f"n{i}", "question": f"{i:02d}?", "answer": "".join(row)} for i, row in enumerate(letters)]


@pytest.fixture(scope="module")
def knows(tmp_path_factory: pytest.TempPathFactory, pretrained: str) -> tuple[SFTModule, str]:
    """A module that knows every name, and that without a number any of them may be said; and the file of names."""
    root = tmp_path_factory.mktemp("knows")
    source = write_rows(root / "names.jsonl", names())
    bare = [{**row, "id": f"b{row['id']}", "question": "?"} for row in names()]
    taught = write_rows(root / "taught.jsonl", [*names(), *bare])
    torch.manual_seed(0)
    module = SFTModule(
        objective=NLL(),
        architecture={"model_type": "llama", **SHAPE},
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=5e-3),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
    )
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=200, logger=False, default_root_dir=str(root),
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(
        module, datamodule=InstructionDataModule(taught, validation_fraction=0.0, batch_size=120, tokenizer=pretrained)
    )
    return module, source


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_a_model_that_knows_the_task_tells_how_much_is_noise(
    rate: float, knows: tuple[SFTModule, str], pretrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, source = knows
    data = InstructionDataModule(
        source,
        validation_fraction=0.0,
        tokenizer=pretrained,
        noise=Noise(ops=[ResponseSwap(rate=rate)] if rate else []),
    )
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=str(tmp_path))
    capsys.readouterr()
    report = trainer.probe(module, data, output=str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "probe.json").read_text()) == report
    estimate, found = report["noise_estimate"], report["measured"]
    true = estimate["injected"]["answers"] if rate else 0.01
    assert estimate["reliable"] and estimate["answers"] == pytest.approx(true, abs=0.04)
    assert estimate["answers_low"] <= true <= estimate["answers_high"]
    said = " ".join(printed.split())
    if rate:
        (row,) = report["noise"]
        assert 0.25 < true < 0.55 and estimate["auroc"] == row["auroc_evidence"] > 0.99 and row["judged_noise"] > 0.9
        assert f"{true:.2f} injected" in said and ("Warning: a third" in said) == (estimate["answers"] >= 1 / 3)
        assert report["recommendation"]["rule"] == "mixed" and found["sure_right_kept"] > 0.95 > found["sure_right"]
    else:
        assert estimate["injected"] is None and "Warning" not in said and "injected" not in said
        assert report["recommendation"]["objective"] == "NLL" and found["gain_positive"] == 1.0
    assert printed.rstrip().split("\n\n")[-1].startswith("objective: ")
    lines = [line for line in printed.splitlines() if str(tmp_path.parent) not in line]
    assert max(map(len, lines)) <= 80, max(lines, key=len)


@pytest.mark.slow
def test_random_weights_give_no_estimate(pretrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_rows(tmp_path / "names.jsonl", names())
    data = InstructionDataModule(source, validation_fraction=0.0, tokenizer=pretrained)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=str(tmp_path))
    report = trainer.probe(SFTModule(architecture={"model_type": "llama", **SHAPE}), data)
    said = " ".join(capsys.readouterr().out.split())
    assert not report["noise_estimate"]["reliable"] and report["recommendation"]["rule"] == "unknown"
    assert "noise: no estimate" in said and "Warning" not in said
