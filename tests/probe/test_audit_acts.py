"""The loop from an audit to training: what the probe doubts is what the next run leaves out, or weighs less."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from worlds import write_rows

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.__main__ import main
from deft_lightning.data.noise import Noise, ResponseSwap
from deft_lightning.objectives import NLL

pytestmark = pytest.mark.slow
SWAPPED = Noise(ops=[ResponseSwap(rate=0.4, exact=True)])
SHAPE = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TRAINER: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


def table() -> list[dict[str, Any]]:
    """Names of six letters that nothing but their question tells: swapped ones are no better than chance."""
    draw = random.Random(0)
    names = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(20)]
    return [{"question": f"Who is {at}?", "answer": name} for at, name in enumerate(names, 10)]


def opened(source: str, tokenizer: str, **options: Any) -> InstructionDataModule:
    data = InstructionDataModule(source, validation_fraction=0.0, batch_size=20, tokenizer=tokenizer, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def noisy(data: InstructionDataModule) -> dict[str, bool]:
    every = [data.example("train", at) for at in range(data.size("train"))]
    return {example.id: bool(example.noise_code.any()) for example in every}


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory, pretrained: str) -> Path:
    """Rows, and their audit with two fifths of the answers swapped, by a model that knows the right ones."""
    root = tmp_path_factory.mktemp("audited")
    source = write_rows(root / "rows.jsonl", table())
    torch.manual_seed(0)
    module = SFTModule(
        NLL(), architecture=SHAPE, optimizer=lambda groups: torch.optim.AdamW(groups, lr=5e-3),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
    )  # fmt: skip
    trainer = Trainer(max_steps=200, default_root_dir=str(root), **TRAINER)
    trainer.fit(module, datamodule=opened(source, pretrained))
    data = opened(source, pretrained, noise=SWAPPED)
    Trainer(default_root_dir=str(root), **TRAINER).probe(module, data, audit=str(root / "audit.jsonl"))
    return root


def test_the_worst_rows_are_mostly_noisy_and_leaving_them_out_leaves_hardly_any(audited: Path, pretrained: str) -> None:
    source, audit = str(audited / "rows.jsonl"), str(audited / "audit.jsonl")
    whole = noisy(opened(source, pretrained, noise=SWAPPED))
    assert sum(whole.values()) == 8
    left = noisy(opened(source, pretrained, noise=SWAPPED, exclude=audit, exclude_top="40%"))
    assert len(left) == 12 and sum(left.values()) <= 1
    assert all(whole[id] == hit for id, hit in left.items())


def test_weights_are_the_probability_of_the_audit(audited: Path, pretrained: str) -> None:
    source, audit = str(audited / "rows.jsonl"), str(audited / "audit.jsonl")
    right = {line["id"]: line["right"] for line in map(json.loads, Path(audit).read_text().splitlines())}
    whole = noisy(opened(source, pretrained, noise=SWAPPED))
    assert right.keys() == whole.keys()
    # Which rows the noise model doubts is tested with it: on so few rows it may take noise for one of tokens.
    assert all(0 <= value <= 1 for value in right.values())
    assert min(right.values()) < 1
    data = opened(source, pretrained, noise=SWAPPED, weights_from=audit)
    for at in range(data.size("train")):
        example = data.example("train", at)
        learnt = example.labels >= 0
        given = torch.ones(int(learnt.sum())) if example.weight is None else torch.from_numpy(example.weight[learnt])
        assert given.tolist() == pytest.approx([right[example.id]] * len(given), rel=1e-6)


def test_without_an_estimate_the_probability_is_empty_and_weights_are_refused(
    audited: Path, tmp_path: Path, pretrained: str
) -> None:
    """Random weights explain no answer."""
    data = opened(str(audited / "rows.jsonl"), pretrained)
    audit = tmp_path / "audit.jsonl"
    torch.manual_seed(1)
    module = SFTModule(NLL(), architecture=SHAPE)
    Trainer(default_root_dir=str(tmp_path), **TRAINER).probe(module, data, audit=str(audit))
    assert {line["right"] for line in map(json.loads, audit.read_text().splitlines())} == {None}
    with pytest.raises(Exception, match=r"has neither `weight` nor `right`\. The probe leaves `right` empty"):
        opened(str(audited / "rows.jsonl"), pretrained, weights_from=str(audit))


OPTIONS = [
    "--model.architecture.hidden_size", "16", "--model.architecture.intermediate_size", "32",
    "--model.architecture.num_hidden_layers", "1", "--model.architecture.num_attention_heads", "2",
    "--trainer.accelerator", "cpu", "--data.validation_fraction", "0.2",
]  # fmt: skip


def test_the_command_line_says_it_keeps_it_and_shows_it(
    audited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, pretrained: str,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    source, audit = str(audited / "rows.jsonl"), tmp_path / "audit.jsonl"
    common = [*OPTIONS, "--data.source", source, "--data.tokenizer", pretrained]
    root = ["--trainer.default_root_dir", str(tmp_path / "runs")]

    def verb(*args: str) -> None:
        caplog.clear()
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["deft_lightning", *args])
        main()

    verb("probe", *common, *root, "--audit", str(audit))
    assert f"fit --data.exclude {audit} --data.exclude_top 5%" in caplog.text
    count = len(audit.read_text().splitlines())
    acted = [*common, "--data.exclude", str(audit), "--data.exclude_top", "3"]
    line = f"left out 3 of {count} training rows by {audit} ({300 / count:.3g} %)"
    verb("fit", *acted, *root, "--trainer.max_steps", "2")
    assert line in caplog.text
    assert f"\n{line}\n" in capsys.readouterr().out  # the summary at the end
    (config,) = (tmp_path / "runs").rglob("config.yaml")
    kept = yaml.safe_load(config.read_text())["data"]
    assert (kept["exclude"], kept["exclude_top"], kept["weights_from"]) == (str(audit), 3, None)
    page = tmp_path / "page.html"
    verb("preview", *acted, "--output", str(page))
    assert line in caplog.text
    assert f"<p>{line}</p>" in page.read_text()
    verb("probe", *acted, *root, "--audit", str(tmp_path / "again.jsonl"))
    assert len((tmp_path / "again.jsonl").read_text().splitlines()) == count - 3


def test_the_help_and_a_wrong_share_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["deft_lightning", "fit", "--help=all"])
    with pytest.raises(SystemExit):
        main()
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--data.exclude EXCLUDE Audit of the training rows", text)
    assert "a share of the ranked rows (5%), or a count (50)" in text
    source = write_rows(tmp_path / "rows.jsonl", table())
    for given in ("5 percent", "0.05"):
        monkeypatch.setattr("sys.argv", [
            "deft_lightning", "fit", *OPTIONS, "--data.source", source, "--data.exclude", "a.jsonl",
            "--data.exclude_top", given,
        ])  # fmt: skip
        with pytest.raises(SystemExit):
            main()
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "exclude_top" in error and given in error, error
