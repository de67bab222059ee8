"""Cross-fitting: each row is read by an adapter that has not learnt it, and the model stays what it was."""

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
from transformers import AutoModelForCausalLM
from worlds import write_rows

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.__main__ import main
from deft_lightning.errors import UserError
from deft_lightning.models import LoRA
from deft_lightning.probe import adapter
from deft_lightning.probe.folds import folds_of
from deft_lightning.probe.kept import FOLDER

ROOT = Path(__file__).parents[2]
FAST = 0.03  # a rate at which a tiny model learns its rows by heart


def words(count: int, letters: int = 8, seed: int = 0) -> list[str]:
    """Return words of random letters, which nobody guesses."""
    drawn = np.random.default_rng(seed).integers(97, 123, (count, letters)).astype(np.uint8)
    return [bytes(word.tolist()).decode() for word in drawn]


def rows(answers: list[str], prompts: list[str]) -> list[dict[str, str]]:
    return [
        {"id": f"r{i}", "question": prompt, "answer": answer}
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def data_of(source: Any, pretrained: str, **options: Any) -> InstructionDataModule:
    return InstructionDataModule(
        source, **{"validation_fraction": 0.0, "batch_size": 4, "tokenizer": pretrained, "cache": False, **options}
    )


def trainer_in(root: Path, **options: Any) -> Trainer:
    return Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=str(root), **options)


def probed(
    root: Path, pretrained: str, source: Any, folds: int | None = 2, precision: str = "32-true", **options: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the report, and the lines of the audit by id."""
    trainer = trainer_in(root, precision=precision)
    module = SFTModule(pretrained=pretrained)
    options = {"unprompted": False, "audit": str(root / "audit.jsonl"), "output": str(root / "out"), **options}
    report = trainer.probe(module, data_of(source, pretrained), folds=folds, **options)
    lines = [json.loads(line) for line in (root / "audit.jsonl").read_text().splitlines()]
    return report, {line["id"]: line for line in lines}


# --- what is read by which model ------------------------------------------------------------------------------------


def test_what_a_row_says_reaches_no_row_of_its_fold(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another answer changes what is said of the rows of the other fold, whose adapter learnt it, and of no other."""
    monkeypatch.setattr(adapter, "RATE", FAST)
    prompts, answers = words(12, seed=1), words(12)
    changed = [*answers[:5], "qqqqqqqq", *answers[6:]]
    before, after = (
        {id: line["nll"] for id, line in probed(tmp_path / name, pretrained, rows(said, prompts))[1].items()}
        for name, said in (("before", answers), ("after", changed))
    )
    data = data_of(rows(answers, prompts), pretrained)
    data.prepare_data()
    data.setup("fit")
    ids = [data.example("train", at).id for at in range(12)]
    own, other = sorted(folds_of(data, range(12), 2), key=lambda fold: ids.index("r5") not in fold.positions)
    assert own.others == other.positions and len(own.positions) == 6
    same = {ids[at] for at in own.positions} - {"r5"}
    assert all(before[id] == after[id] for id in same)  # to the bit
    assert all(abs(before[ids[at]] - after[ids[at]]) > 1e-5 for at in other.positions)
    assert before["r5"] != after["r5"]


@pytest.mark.slow
def test_rows_are_not_known_by_heart_unless_another_fold_has_their_answer(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies share a fold and stay unknown; the same answers behind other prompts are in both, and are remembered."""
    monkeypatch.setattr(adapter, "RATE", FAST)
    answers = words(4) * 30
    learnt = {}
    for name, prompts in (("copies", words(4, seed=1) * 30), ("apart", words(120, seed=1))):
        source = rows(answers, prompts)
        plain, folded = (probed(tmp_path / name, pretrained, source, folds=folds)[0] for folds in (None, 2))
        assert folded["folds"]["rows"] == [60, 60]
        learnt[name] = plain["means"]["nll"] - folded["means"]["nll"]
    assert learnt["apart"] > 1.2 and learnt["copies"] < 0.4


@pytest.mark.slow
def test_the_format_is_learnt(pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all rows share is no surprise any more; without a gradient in float32 and under autocast alike."""
    monkeypatch.setattr(adapter, "RATE", FAST)
    source = rows([f"The answer is: {word}" for word in words(40, 2)], words(40, seed=1))
    plain, _ = probed(tmp_path / "plain", pretrained, source, folds=None)
    found = {
        precision: probed(tmp_path / precision, pretrained, source, precision=precision)[0]
        for precision in ("32-true", "bf16-mixed", "64-true")
    }
    nll = {precision: report["means"]["nll"] for precision, report in found.items()}
    assert nll["32-true"] < plain["means"]["nll"] - 1
    assert nll["64-true"] == pytest.approx(nll["32-true"], abs=0.05)
    assert nll["bf16-mixed"] == pytest.approx(nll["32-true"], abs=0.2)
    assert "folds" not in plain and "recommendation" in plain and "recommendation" not in found["32-true"]


def folds_by_id(source: list[dict[str, str]], pretrained: str, count: int) -> list[set[str]]:
    data = data_of(source, pretrained)
    data.prepare_data()
    data.setup("fit")
    every = range(data.size("train"))
    folds = folds_of(data, every, count)
    assert sorted(at for fold in folds for at in fold.positions) == list(every)
    assert all(sorted(fold.positions + fold.others) == list(every) for fold in folds)
    return [{data.example("train", at).id for at in fold.positions} for fold in folds]


def test_folds_do_not_depend_on_the_order_and_keep_rows_that_are_alike_together(pretrained: str) -> None:
    source = rows(words(30), words(10, seed=1) * 3)  # three answers to each of ten prompts
    folds = folds_by_id(source, pretrained, 3)
    assert folds == folds_by_id(source[::-1], pretrained, 3)
    assert sorted(map(len, folds)) == [9, 9, 12]
    assert all({f"r{i}", f"r{i + 10}", f"r{i + 20}"} <= next(own for own in folds if f"r{i}" in own) for i in range(10))
    # One prompt for all is no question: then rows of one text share a fold.
    alike = folds_by_id(rows(words(10) * 2, ["Say a word."] * 20), pretrained, 2)
    assert [len(own) for own in alike] == [10, 10]
    assert all(({f"r{i}", f"r{i + 10}"} <= alike[0]) or ({f"r{i}", f"r{i + 10}"} <= alike[1]) for i in range(10))


# --- what is left behind --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_is_the_same_to_the_bit(checkpointing: bool, pretrained: str, tmp_path: Path) -> None:
    source = rows(words(8), words(8, seed=1))
    module = SFTModule(pretrained=pretrained, gradient_checkpointing=checkpointing)
    data, trainer = data_of(source, pretrained), trainer_in(tmp_path)
    trainer.probe(module, data, folds=2)
    before = AutoModelForCausalLM.from_pretrained(pretrained).state_dict()
    after = module.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert all(weight.requires_grad and weight.grad is None for weight in module.parameters())
    assert all(part.training for part in module.modules())
    fresh = SFTModule(pretrained=pretrained, gradient_checkpointing=checkpointing)
    report = trainer_in(tmp_path / "fresh").probe(fresh, data_of(source, pretrained))
    hooks = [len(each.model.get_input_embeddings()._forward_hooks) for each in (module, fresh)]
    assert hooks[0] == hooks[1] and not hasattr(module.model, "peft_config")
    assert trainer.probe(module, data) == report


@pytest.mark.slow
def test_a_probe_says_the_same_again_whatever_was_drawn_before(
    pretrained: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    source = rows(words(9), words(9, seed=1))
    found = []
    for name in ("a", "b"):
        torch.manual_seed(len(found))
        state = torch.get_rng_state()
        found.append(probed(tmp_path / name, pretrained, source, unprompted=True, folds=3))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]
    assert found[0][0]["folds"] == {"count": 3, "rows": [3, 3, 3], "steps": [2, 2, 2], "rank": 8}
    lines = [line for line in caplog.messages if line.startswith("probe: fold")]
    wanted = "probe: fold {} of 3: an adapter of rank 8 learns the 6 other rows in 2 steps; then it reads 3 rows"
    assert lines == [wanted.format(fold) for fold in (1, 2, 3)] * 2


@pytest.mark.slow
def test_the_table_says_whose_numbers_they_are(
    pretrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = rows(words(8), words(8, seed=1))
    page = tmp_path / "gate.html"
    probed(tmp_path, pretrained, source, unprompted=True, page=str(page))
    printed = " ".join(capsys.readouterr().out.split())
    assert "read in 2 folds, each by an adapter (rank 8, 1 steps) that was trained on the others" in printed
    assert "objective: " not in printed and page.stat().st_size > 10_000


# --- a killed probe -------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a probe where nothing catches it."""


def killed(root: Path, pretrained: str, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read all rows, and end before the report is written."""

    def end(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sys.modules["deft_lightning.training.verbs.probe"], "write", end)
        probed(root, pretrained, source)


@pytest.mark.slow
def test_adapters_of_a_killed_probe_are_taken_where_they_learnt_the_same_rows(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    prompts, answers = words(8, seed=1), words(8)
    source = rows(answers, prompts)
    wanted = probed(tmp_path / "alone", pretrained, source)
    killed(tmp_path / "killed", pretrained, source, monkeypatch)
    caplog.clear()
    assert probed(tmp_path / "killed", pretrained, source) == wanted
    assert caplog.text.count("its adapter is there from a killed probe") == 2 and "learns the" not in caplog.text
    assert not (tmp_path / "killed" / "out" / FOLDER).exists()
    # A damaged adapter is trained anew, and is the same.
    killed(tmp_path / "killed", pretrained, source, monkeypatch)
    first, _ = sorted((tmp_path / "killed").rglob(adapter.ADAPTER))
    bits = first.read_bytes()
    first.write_bytes(bits[:-7])
    killed(tmp_path / "killed", pretrained, source, monkeypatch)
    assert first.read_bytes() == bits
    # Another answer to one row: the adapter that had learnt it is of no use any more.
    changed = rows([*answers[:5], "qqqqqqqq", *answers[6:]], prompts)
    caplog.clear()
    assert probed(tmp_path / "killed", pretrained, changed) == probed(tmp_path / "changed", pretrained, changed)
    assert caplog.text.count("its adapter is there from a killed probe") == 1


@pytest.mark.slow
def test_a_probe_killed_in_its_second_fold_goes_on_and_says_the_same(pretrained: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", rows(words(300), words(300, seed=1)))

    def started(root: Path) -> subprocess.Popen[str]:
        command = [
            sys.executable, "-m", "deft_lightning", "probe", "--model.pretrained", pretrained, "--data.source", source,
            "--data.validation_fraction", "0", "--data.batch_size", "2", "--trainer.accelerator", "cpu", "--folds", "2",
            "--trainer.default_root_dir", str(root), "--output", str(root / "out"), "--audit", str(root / "a.jsonl"),
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    undisturbed = started(tmp_path / "alone")
    text, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, text[-2000:]
    process, output = started(tmp_path / "killed"), tmp_path / "killed" / "out"
    second = output / FOLDER / "fold-2" / FOLDER
    while len(list(second.glob("prompted-*.npz"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"
    again = started(tmp_path / "killed")
    text, _ = again.communicate(timeout=300)
    assert again.returncode == 0, text[-2000:]
    assert text.count("its adapter is there from a killed probe") == 2
    assert text.count("resuming a stopped probe") == 4  # with and without prompts, in both folds
    for name in ("out/probe.json", "a.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_cannot_be_folded_is_one_line(pretrained: str, tmp_path: Path) -> None:
    source = rows(words(4), words(4, seed=1))
    for folds in (1, 0, -2):
        with pytest.raises(UserError, match=f"--folds must be at least 2, got {folds}"):
            probed(tmp_path, pretrained, source, folds=folds)
    with pytest.raises(UserError, match="--folds 5: only 4 rows are read"):
        probed(tmp_path, pretrained, source, folds=5)
    with pytest.raises(UserError, match="--folds 3: only 2 rows are read"):
        probed(tmp_path, pretrained, source, folds=3, examples=2)
    with pytest.raises(UserError, match="--folds 3: only 2 of the 4 rows differ"):
        probed(tmp_path, pretrained, rows(["a", "b"] * 2, ["same"] * 4), folds=3)
    with pytest.raises(UserError, match=r"does not train in float16 \(--trainer\.precision 16-true\)"):
        probed(tmp_path, pretrained, source, precision="16-true")
    module = SFTModule(pretrained=pretrained, lora=LoRA(r=2))
    with pytest.raises(UserError, match=r"the model has some already \(--model\.lora\)"):
        trainer_in(tmp_path).probe(module, data_of(source, pretrained), folds=2)
    assert any("lora_A" in name for name, _ in module.named_parameters())  # nothing was taken away


def test_a_fold_that_fails_leaves_the_model_as_it_was(pretrained: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pretrained)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    module = SFTModule(pretrained=model, head="dense")
    before = set(model.state_dict())
    with pytest.raises(UserError, match=r"fold 1 of 2: the gradient of step 1 is not finite"):
        trainer_in(tmp_path).probe(module, data_of(rows(words(4), words(4, seed=1)), pretrained), folds=2)
    assert set(module.model.state_dict()) == before and all(weight.requires_grad for weight in module.parameters())


def test_the_command_line_says_it_in_a_line(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", rows(words(4), words(4, seed=1)))
    command = ["probe", "--model.pretrained", pretrained, "--data.source", source, "--data.validation_fraction", "0"]
    options = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path), "--folds", "9"]
    monkeypatch.setattr(sys, "argv", ["deft_lightning", *command, *options])
    with pytest.raises(SystemExit):
        main()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert said == ["error: probe: --folds 9: only 4 rows are read (--examples, --data.source)"]
