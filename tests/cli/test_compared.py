"""``--after_fit.compare``: the test before training, what changed, and the command that trains the same with NLL."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parsed import parser
from worlds import ROOT

from deft_lightning.__main__ import main
from deft_lightning.cli.compared import with_nll

SMALL = [
    "--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1",
    "--trainer.limit_test_batches", "1", "--after_fit.export", "false",
    "--data.source", "reasoning_gym:spell_backward?size=200&question=metadata.word&min_word_len=3&max_word_len=5",
]  # fmt: skip
SCRATCH = [
    "--config", str(ROOT / "configs" / "from_scratch.yaml"), "--model.architecture.hidden_size", "32",
    "--model.architecture.num_hidden_layers", "1", "--model.architecture.attention_dropout", "0.1",
    "--data.batch_size", "4",
]  # fmt: skip
Fit = Callable[..., Path]


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fit:
    """Train through the command line, and return the folder of the run."""

    def call(name: str, *words: str) -> Path:
        root = tmp_path / name
        monkeypatch.setattr(
            "sys.argv", ["deft_lightning", "fit", *words, *SMALL, "--trainer.default_root_dir", str(root)]
        )
        main()
        return root / "version_0"

    return call


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fit --config a.yaml", "fit --config a.yaml --model.objective NLL"),
        ("fit --model.objective DEFT --data.source x", "fit --data.source x --model.objective NLL"),
        ("fit --model.objective=Tsallis --model.objective.q 0.5 --model.head dense",
         "fit --model.head dense --model.objective NLL"),
        ("fit --model.objective.q=0.5", "fit --model.objective NLL"),
    ],
)  # fmt: skip
def test_the_objective_and_its_options_leave_the_command(words: str, expected: str) -> None:
    assert with_nll(words.split()) == expected.split()


@pytest.mark.slow
def test_a_run_says_what_changed_and_what_to_compare_with(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("run", "--config", "deft:quickstart", "--model.objective", "Cayley", "--model.objective.floor", "0.5")
    told = capsys.readouterr().out
    before = re.findall(r"^test/exact_match: (\d\.\d+) before training$", told, re.MULTILINE)
    assert len(before) == 1 and float(before[0]) > 0.9
    assert re.search(rf"^test/exact_match: {before[0]} before training, [01]\.\d+ at step 2$", told, re.MULTILINE)
    assert re.search(r"^last logged step: .*noise/estimated|^val/nll: ", told, re.MULTILINE)
    (command,) = re.findall(r"^the same with NLL, to compare: python -m deft_lightning (.*)$", told, re.MULTILINE)
    words = shlex.split(command)
    assert words[:3] == ["fit", "--config", "deft:quickstart"] and "Cayley" not in words
    assert parser().parse_args(words).fit.model.objective.class_path.endswith("NLL")


@pytest.mark.slow
@pytest.mark.parametrize("base", [SCRATCH, ["--config", "deft:quickstart"]], ids=["random weights", "pretrained"])
def test_the_test_before_changes_nothing_of_the_training(base: list[str], fit: Fit) -> None:
    """KLAnchor compares with the model before training, which must be that of the fit."""
    ends = []
    for compare in ("true", "false"):
        options = ["--after_fit.test", "true", "--after_fit.compare", compare, "--model.objective", "KLAnchor"]
        run = fit(compare, *base, *options)
        ends.append(torch.load(next(run.rglob("step=2.ckpt")), weights_only=True)["state_dict"])
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.slow
def test_nll_has_nothing_to_compare_with_and_a_resumed_run_is_not_tested_again(
    fit: Fit, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run = fit("first", "--config", "deft:quickstart", "--model.objective", "NLL")
    told = capsys.readouterr().out
    assert "before training, " in told and "the same with NLL" not in told
    fit("second", "--config", "deft:quickstart", "--model.objective", "NLL", "--ckpt_path",
        str(next(run.rglob("step=2.ckpt"))))  # fmt: skip
    assert "test/exact_match: " not in capsys.readouterr().out
    assert "--after_fit.compare: skipped for a resumed run" in caplog.text
    fit("third", "--config", "deft:quickstart", "--after_fit.test", "false")
    assert "--after_fit.compare: nothing is compared without a test" in caplog.text
