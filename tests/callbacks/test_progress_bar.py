"""What a run says of itself: lines where output is kept, a bar on a terminal, a summary at the end."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from worlds import SHAPE, quiet_trainer, write_rows

from deft_lightning import InstructionDataModule, SFTModule
from deft_lightning.callbacks import Checkpoint, ModelLine, RunSummary, SFTProgressBar
from deft_lightning.callbacks import progress as progress_module
from deft_lightning.callbacks.pace import Pace, clock_time, validations_left
from deft_lightning.callbacks.summary import Point
from deft_lightning.errors import UserError

ROWS = [{"question": f"{i} + {i * 7}", "answer": str(8 * i)} for i in range(18)]
NUMBER = r"[\d.,]+"
STEP = re.compile(
    rf"step +(?P<step>\d+)/(?P<total>\d+)  nll (?P<nll>{NUMBER})  loss {NUMBER}  (?:noise {NUMBER}  )?"
    rf"(?P<rate>{NUMBER}) tokens/s  peak {NUMBER} GiB  ETA (?P<left>[\d:]+)"
)
VALIDATED = re.compile(rf"step +(?P<step>\d+)/(?P<total>\d+)  val/nll (?P<nll>{NUMBER})  val/token_accuracy {NUMBER}")


def fit(source: str, root: Path, *callbacks: Callback, ckpt_path: str | None = None, **options: Any) -> Any:
    """Train; six batches of three rows an epoch."""
    torch.manual_seed(0)
    held_out = write_rows(Path(source).with_name("held_out.jsonl"), [{"question": "1", "answer": "7"}] * 4)
    bar = next((one for one in callbacks if isinstance(one, SFTProgressBar)), None)
    settings: dict[str, Any] = {
        "monitors": False, "log_every_n_steps": 2, "num_sanity_val_steps": None, "enable_progress_bar": bar is not None,
        **options,
    }  # fmt: skip
    trainer = quiet_trainer(root, *callbacks, **settings)
    module = SFTModule(architecture=SHAPE, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2), scheduler=None)
    data = InstructionDataModule(source, validation_source=held_out, tokenizer_size=0, batch_size=3)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def matches(pattern: re.Pattern[str], text: str) -> list[dict[str, str]]:
    return [match.groupdict() for match in map(pattern.match, text.splitlines()) if match]


# --- lines ----------------------------------------------------------------------------------------------------------


def test_there_is_one_line_a_logged_step_and_one_a_validation_with_what_was_logged(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    fit(source, tmp_path, SFTProgressBar(), max_steps=8, logger=logger)
    out = capsys.readouterr().out
    assert "\r" not in out and "%|" not in out, "no bar"
    steps, validated = matches(STEP, out), matches(VALIDATED, out)
    assert [(line["step"], line["total"]) for line in steps] == [(str(i), "8") for i in (2, 4, 6, 8)]
    assert [line["step"] for line in validated] == ["0", "6", "8"]
    rows = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    for tag, lines in (("train/nll", steps), ("val/nll", validated)):
        column = rows[0].index(tag)
        logged = [float(row[column]) for row in rows[1:] if row[column]]
        # The line of a step has the figures of that step, not those of the one logged before it.
        assert [float(line["nll"]) for line in lines] == pytest.approx(logged, abs=6e-4), tag
    places = [int(match[1]) for match in re.finditer(r"^step +(\d+)/", out, re.MULTILINE)]
    assert places == sorted(places), "a line of training stands before the validation that follows it"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected", "total"),
    [
        ({"max_steps": 5, "accumulate_grad_batches": 4}, [2, 4], 5),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, [2, 4], 4),  # the second window of an epoch is short
        ({"max_epochs": 2}, [2, 4, 6, 8, 10, 12], 12),
        ({"max_epochs": 2, "max_steps": 7}, [2, 4, 6], 7),
        ({"max_epochs": 2, "limit_train_batches": 2}, [2, 4], 4),
    ],
    ids=str,
)
def test_steps_are_optimizer_steps_of_the_whole_run(
    options: dict[str, Any], expected: list[int], total: int, source: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fit(source, tmp_path, SFTProgressBar(), **options)
    lines = matches(STEP, capsys.readouterr().out)
    assert [(int(line["step"]), int(line["total"])) for line in lines] == [(step, total) for step in expected]


@pytest.mark.slow
def test_a_resumed_run_goes_on_counting_and_its_pace_is_its_own(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Checkpoint()
    fit(source, tmp_path / "cut", checkpoint, max_steps=4)
    capsys.readouterr()

    class Slow(Callback):
        """A tenth of a second a step: eight that are left take about a second, whatever was before."""

        def on_train_batch_start(self, *args: Any) -> None:
            time.sleep(0.1)

    last = str(checkpoint.last_model_path)
    fit(source, tmp_path / "on", Slow(), SFTProgressBar(), max_steps=24, ckpt_path=last)
    out = capsys.readouterr().out
    lines = matches(STEP, out)
    assert [int(line["step"]) for line in lines] == list(range(6, 25, 2))
    assert not [line for line in matches(VALIDATED, out) if line["step"] in "04"]
    # 18 steps of a tenth of a second, and three validations; a pace over all 24 would say less.
    minutes, seconds = map(int, lines[0]["left"].split(":"))
    assert minutes == 0 and 1 <= seconds <= 10
    assert lines[-1]["left"] == "0:00" or lines[-1]["left"] < lines[0]["left"]


def test_tokens_of_a_line_are_those_since_the_line_before_without_padding() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    trainer: Any = SimpleNamespace(global_step=0, fit_loop=SimpleNamespace(_should_accumulate=lambda: False))
    pace.begin(10)
    for step, tokens, seconds in ((11, 30, 2.0), (12, 10, 2.0)):
        now[0] += seconds
        trainer.global_step = step
        pace.batch(trainer, {"num_tokens": tokens, "labels": None})
    assert pace.rate() == 10.0
    now[0] += 1.0
    pace.validate()
    now[0] += 50.0
    assert pace.validated() == 50.0
    now[0] += 3.0
    trainer.global_step = 13
    pace.batch(trainer, {"num_tokens": 80})
    assert pace.rate() == 20.0, "a validation is no training"
    trainer.enable_validation, trainer.callbacks = True, []
    trainer.val_check_batch, trainer.num_training_batches, trainer.accumulate_grad_batches = 4, 100, 1
    trainer.check_val_every_n_epoch = None
    # The first step, which may compile, is left out: two steps took 6 s. Validations after 16 and 20.
    assert pace.left(trainer, 20) == 7 * 3.0 + 2 * 50.0


@pytest.mark.parametrize(
    ("options", "step", "total", "expected"),
    [
        ({"val_check_batch": 200}, 0, 1000, 5),
        ({"val_check_batch": 200}, 200, 1000, 4),
        ({"val_check_batch": 200}, 0, 1050, 6),  # the last one is after the last step
        ({"val_check_batch": 200, "accumulate_grad_batches": 4}, 0, 100, 2),
        ({"val_check_batch": 50, "check_val_every_n_epoch": 1}, 0, 150, 3),
        ({"val_check_batch": 50, "check_val_every_n_epoch": 2}, 0, 150, 2),
        ({"val_check_batch": 50, "check_val_every_n_epoch": 1, "accumulate_grad_batches": 4}, 0, 39, 3),
        ({"val_check_batch": 200, "enable_validation": False}, 0, 1000, 0),
        ({"val_check_batch": float("inf")}, 0, 1000, 1),
    ],
    ids=str,
)  # fmt: skip
def test_validations_to_come_are_counted(options: dict[str, Any], step: int, total: int, expected: int) -> None:
    defaults = {
        "enable_validation": True, "check_val_every_n_epoch": None, "accumulate_grad_batches": 1,
        "num_training_batches": 50,
    }  # fmt: skip
    trainer: Any = SimpleNamespace(**{**defaults, **options})
    assert validations_left(trainer, step, total) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (750, "12:30"), (3900, "1:05:00")]
)
def test_times_are_read_at_a_glance(seconds: float, expected: str) -> None:
    assert clock_time(seconds) == expected


def test_a_long_validation_says_how_far_it_is(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "EVERY", 0.0)
    fit(source, tmp_path, SFTProgressBar(), max_steps=2, limit_val_batches=2)
    out = capsys.readouterr().out
    lines = re.findall(r"^validation: (\d) of (\d) batches  ETA [\d:]+$", out, re.MULTILINE)
    assert lines == [("1", "2"), ("2", "2")] * 2


@pytest.mark.slow
def test_long_steps_that_are_not_logged_say_how_far_the_run_is(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(source, tmp_path / "quick", SFTProgressBar(), max_steps=4)
    assert "step 1/4" not in capsys.readouterr().out
    monkeypatch.setattr(progress_module, "EVERY", 0.0)
    fit(source, tmp_path / "slow", SFTProgressBar(), max_steps=4, accumulate_grad_batches=2)
    out = capsys.readouterr().out
    # Within the first step nothing is known of the time; within the others it is.
    assert re.findall(r"^step (\d)/4(?:  ETA [\d:]+)?$", out, re.MULTILINE) == ["0", "1", "1", "2", "3", "3"]
    assert [line["step"] for line in matches(STEP, out)] == ["2", "4"]


def test_other_ranks_say_nothing(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = SFTProgressBar()
    bar._tell(SimpleNamespace(is_global_zero=False), "step 1/2")  # type: ignore[arg-type]
    bar._tell(SimpleNamespace(is_global_zero=True), "step 2/2")  # type: ignore[arg-type]
    assert capsys.readouterr().out == "step 2/2\n"


# --- the bar --------------------------------------------------------------------------------------------------------


def test_what_it_is_follows_the_terminal_or_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    assert [SFTProgressBar(style=style).lines for style in ("auto", "bar", "lines")] == [False, False, True]  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: False))
    assert [SFTProgressBar(style=style).lines for style in ("auto", "bar", "lines")] == [True, False, True]  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"progress_bar\.style must be auto, bar or lines, not 'none'"):
        SFTProgressBar(style="none")  # type: ignore[arg-type]


class Places(Callback):
    """Keeps what the bar stands at."""

    def __init__(self, bar: SFTProgressBar) -> None:
        self.bar, self.seen = bar, list[tuple[int, int, int]]()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        bar = self.bar.train_progress_bar
        self.seen.append((int(bar.n), int(bar.initial), int(bar.total)))


def test_a_bar_counts_optimizer_steps_under_accumulation_and_over_epochs(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = SFTProgressBar(style="bar")
    places = Places(bar)
    fit(source, tmp_path, bar, places, max_epochs=2, accumulate_grad_batches=4)
    # Six micro-batches an epoch: a step after the fourth and after the sixth.
    assert places.seen == [(n, 0, 4) for n in (0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4)]
    out = capsys.readouterr().out
    assert not matches(STEP, out) and "Validation" in out and "Sanity" not in out


@pytest.mark.slow
def test_a_bar_of_a_resumed_run_begins_where_it_goes_on(source: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    fit(source, tmp_path / "cut", checkpoint, max_steps=4)
    bar = SFTProgressBar(style="bar")
    places = Places(bar)
    fit(source, tmp_path / "on", bar, places, max_steps=8, ckpt_path=str(checkpoint.last_model_path))
    assert places.seen == [(n, 4, 8) for n in (5, 6, 7, 8)]


# --- the summary ----------------------------------------------------------------------------------------------------


def test_the_summary_says_what_it_took_what_changed_and_where_it_lies(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, summary = Checkpoint(), RunSummary()
    logger = CSVLogger(tmp_path, name="", version="run")
    trainer = fit(source, tmp_path, checkpoint, summary, max_steps=8, logger=logger)
    out = capsys.readouterr().out
    module = trainer.lightning_module
    loader = trainer.train_dataloader
    epoch = sum(int(batch["attention_mask"].sum()) for batch in loader)
    (took,) = re.findall(
        rf"^trained: 8 optimizer steps in [\d:]+ \(validation [\d:]+\); ({NUMBER}) tokens \(({NUMBER}) supervised\),"
        rf" {NUMBER} tokens/s, peak memory {NUMBER} GiB$", out, re.MULTILINE,
    )  # fmt: skip
    assert epoch < int(took[0]) < 2 * epoch and int(took[1]) == module.tokens_seen
    (changed,) = re.findall(
        rf"^val/nll: ({NUMBER}) before training, ({NUMBER}) at step 8, the best$", out, re.MULTILINE
    )
    rows = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    logged = [float(row[rows[0].index("val/nll")]) for row in rows[1:] if row[rows[0].index("val/nll")]]
    assert [float(value) for value in changed] == pytest.approx([logged[0], logged[-1]], abs=6e-4)
    assert f"checkpoint: {checkpoint.best_model_path}\n" in out and Path(checkpoint.best_model_path).is_file()
    assert f"look at it: {tmp_path / 'run' / 'metrics.csv'}\n" in out


@pytest.mark.slow
def test_a_resumed_run_compares_with_the_beginning(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, first = Checkpoint(), RunSummary()
    fit(source, tmp_path / "cut", checkpoint, first, max_steps=7)
    capsys.readouterr()
    summary = RunSummary()
    fit(source, tmp_path / "on", summary, max_steps=10, ckpt_path=str(checkpoint.last_model_path))
    out = capsys.readouterr().out
    assert first.first is not None and first.first.step == 0 and summary.first == first.first
    assert "trained: 3 optimizer steps (7 to 10) in" in out
    assert f"val/nll: {first.first.nll:.3f} before training, " in out


def test_the_best_is_named_where_it_is_not_the_last() -> None:
    summary, trainer = RunSummary(), SimpleNamespace(callback_metrics={}, global_step=0)
    for step, nll in ((0, 2.0), (10, 1.0), (20, 3.0)):
        trainer.global_step, trainer.callback_metrics = step, {"val/nll": torch.tensor(nll)}
        summary._note(trainer)  # type: ignore[arg-type]
    assert summary._changed(trainer)[0] == (  # type: ignore[arg-type]
        "val/nll: 2.000 before training, 3.000 at step 20, best 1.000 at step 10"
    )
    assert summary.state_dict() == {"first": [0, 2.0], "best": [10, 1.0]}
    other = RunSummary()
    other.load_state_dict(summary.state_dict())
    assert (other.first, other.best) == (Point(0, 2.0), Point(10, 1.0))


@pytest.mark.parametrize(("step", "where"), [(0, "before training"), (1200, "at step 1,200")])
def test_a_single_validation_is_named_once(step: int, where: str) -> None:
    summary = RunSummary()
    trainer = SimpleNamespace(callback_metrics={"val/nll": torch.tensor(2.0)}, global_step=step)
    summary._note(trainer)  # type: ignore[arg-type]
    assert summary._changed(trainer)[0] == f"val/nll: 2.000 {where}, the only validation"  # type: ignore[arg-type]
    trainer.global_step = step + 10
    summary._note(trainer)  # type: ignore[arg-type] # the same number again is another validation
    assert f"val/nll: 2.000 {where}, 2.000 at step" in summary._changed(trainer)[0]  # type: ignore[arg-type]


def test_without_a_validation_it_says_how_to_have_one(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(source, tmp_path, RunSummary(), max_steps=2, limit_val_batches=0)
    out = capsys.readouterr().out
    assert "val/nll: there was no validation (--data.validation_fraction, --data.validation_source)" in out


def test_the_model_is_a_line(source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = fit(source, tmp_path, ModelLine(), max_steps=2)
    count = sum(parameter.numel() for parameter in trainer.lightning_module.parameters())
    lines = [record.getMessage() for record in caplog.records]
    assert any(
        line.startswith(f"model: LlamaForCausalLM, {count:,} parameters (") and line.endswith("all of them trained")
        for line in lines
    )
    assert not any(word in line for line in lines for word in ("FLOPs", "Modules in", "Skipping setting a default"))
