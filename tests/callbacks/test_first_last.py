"""Validation before the first step and after the last: it is there, it is right, and it moves nothing."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from worlds import SHAPE, quiet_trainer, read_events, write_rows

from deft_lightning import InstructionDataModule, SFTModule
from deft_lightning._lightning import is_accumulating, is_logging_step, logged_step
from deft_lightning.callbacks import Checkpoint, FirstLastValidation, MetricCheck
from deft_lightning.errors import UserError
from deft_lightning.models import LoRA

pytestmark = pytest.mark.slow

ROWS = [{"question": f"{i} + {i * 7}", "answer": str(8 * i)} for i in range(18)]
OPENED = {"num_sanity_val_steps": None}  # as a user's trainer has it, who says nothing


class Steps(Callback):
    """Keeps at which optimizer steps was validated, and which steps were logged."""

    def __init__(self) -> None:
        self.validated: list[int] = []
        self.logged: list[tuple[int, int]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validated.append(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if is_logging_step(trainer) and not is_accumulating(trainer):
            self.logged.append((trainer.global_step, logged_step(trainer)))


def module() -> SFTModule:
    torch.manual_seed(0)
    # Dropout: whatever draws random numbers in between would be seen in the weights.
    return SFTModule(
        architecture=SHAPE, lora=LoRA(r=2, dropout=0.5), optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        scheduler=None,
    )  # fmt: skip


def data(source: str) -> InstructionDataModule:
    held_out = write_rows(
        Path(source).with_name("held_out.jsonl"), ({"question": f"{i}", "answer": "7"} for i in range(7))
    )
    return InstructionDataModule(source, validation_source=held_out, tokenizer_size=0, batch_size=3)


def fit(source: str, root: Path, *callbacks: Callback, ckpt_path: str | None = None, **options: Any) -> Any:
    """Train; six batches an epoch."""
    settings: dict[str, Any] = {"monitors": False, "log_every_n_steps": 2, **OPENED, **options}
    trainer = quiet_trainer(root, *callbacks, **settings)
    trainer.fit(module(), data(source), ckpt_path=ckpt_path)
    return trainer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return dict(trainer.lightning_module.model.state_dict())


def difference(one: Any, other: Any) -> float:
    return max(float((weights(one)[name] - weights(other)[name]).abs().max()) for name in weights(one))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": 4}, [0, 4]),  # within the first epoch: there was no validation at all
        ({"max_steps": 6}, [0, 6]),  # at its end, where there is one anyway
        ({"max_steps": 8}, [0, 6, 8]),
        ({"max_epochs": 2}, [0, 6, 12]),
        ({"max_epochs": 3, "check_val_every_n_epoch": 2}, [0, 12, 18]),
        ({"max_epochs": 1, "val_check_interval": 4}, [0, 4, 6]),
        ({"max_steps": 5, "val_check_interval": 4, "check_val_every_n_epoch": None}, [0, 4, 5]),
        ({"max_steps": 3, "accumulate_grad_batches": 2}, [0, 3]),
        ({"max_steps": 2, "accumulate_grad_batches": 4}, [0, 2]),  # the last window of an epoch is short
        ({"max_steps": 4, "limit_val_batches": 0}, []),
        ({"max_steps": 4, "num_sanity_val_steps": 0}, [4]),
    ],
    ids=str,
)
def test_it_is_before_the_first_step_and_after_the_last_and_never_twice(
    options: dict[str, Any], expected: list[int], source: str, tmp_path: Path
) -> None:
    steps = Steps()
    trainer = fit(source, tmp_path, steps, **options)
    assert steps.validated == expected
    assert ("val/nll" in trainer.callback_metrics) == bool(expected)


@pytest.mark.parametrize(
    ("before", "after", "expected"), [(False, True, [0, 4]), (True, False, [0]), (False, False, [0])]
)
def test_either_can_be_switched_off(
    before: bool, after: bool, expected: list[int], source: str, tmp_path: Path
) -> None:
    """Without the first there is Lightning's check of two batches, of which nothing is logged."""
    steps = Steps()
    logger = CSVLogger(tmp_path, name="", version="run")
    fit(source, tmp_path, steps, FirstLastValidation(before, after), max_steps=4, logger=logger)
    assert steps.validated == expected
    rows = (tmp_path / "run" / "metrics.csv").read_text()
    assert ("val/nll" in rows) == (before or after)


@pytest.mark.parametrize(
    ("before", "resumed", "expected"), [(True, False, 3), (False, False, 1), (True, True, 0), (False, True, 0)]
)
def test_what_is_validated_before_the_first_step_is_all_or_one_batch(
    before: bool, resumed: bool, expected: int, source: str, tmp_path: Path
) -> None:
    class Batches(Callback):
        count = 0

        def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
            self.count += trainer.sanity_checking

    batches, options = Batches(), {"max_epochs": 2, "limit_val_batches": 3}
    first = [FirstLastValidation(before=before, after=False), Checkpoint()]
    path = fit(source, tmp_path / "cut", *first, **{**options, "max_epochs": 1}) if resumed else None
    path = None if path is None else str(path.checkpoint_callback.last_model_path)
    fit(source, tmp_path, batches, FirstLastValidation(before=before, after=False), ckpt_path=path, **options)
    assert batches.count == expected


def test_the_first_is_logged_at_step_0_with_every_tag_and_says_what_the_start_is_worth(
    source: str, tmp_path: Path
) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    fit(source, tmp_path, max_steps=4, logger=logger)
    events = read_events(tmp_path / "run")
    alone = quiet_trainer(tmp_path / "alone", monitors=False)
    (expected,) = alone.validate(module(), data(source), verbose=False)
    for tag in ("val/loss", "val/nll", "val/ppl", "val/token_accuracy"):
        points = events.Scalars(tag)
        assert [point.step for point in points] == [0, 3], tag
        assert points[0].value == pytest.approx(expected[tag], rel=1e-5), tag
        assert points[0].value != points[1].value or tag == "val/token_accuracy"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_random_states_and_the_order_of_data_are_those_of_a_run_without(
    accumulate: int, source: str, tmp_path: Path
) -> None:
    options = {"max_steps": 8, "accumulate_grad_batches": accumulate, "val_check_interval": 4}
    with_both = fit(source, tmp_path / "with", **options)
    state = torch.get_rng_state()
    off = {"num_sanity_val_steps": 0}
    without = fit(source, tmp_path / "without", FirstLastValidation(False, False), **options, **off)
    assert torch.equal(state, torch.get_rng_state())
    assert difference(with_both, without) == 0.0


@pytest.mark.parametrize("monitor", [None, "val/nll"])
@pytest.mark.parametrize(
    ("cut", "total", "options"),
    [
        (4, 9, {}),  # cut in an epoch
        (6, 9, {}),  # cut at its end
        (5, 9, {"val_check_interval": 4, "check_val_every_n_epoch": None}),
        (8, 11, {"val_check_interval": 4, "check_val_every_n_epoch": None}),  # cut where there is a validation anyway
        (3, 7, {"accumulate_grad_batches": 2}),
    ],
    ids=str,
)
def test_a_run_that_goes_on_repeats_nothing_and_ends_as_if_it_had_not_been_cut(
    cut: int, total: int, options: dict[str, Any], monitor: str | None, source: str, tmp_path: Path
) -> None:
    whole, parts = Steps(), Steps()
    uncut = fit(source, tmp_path / "whole", whole, max_steps=total, **options)
    checkpoint = Checkpoint(monitor=monitor)
    fit(source, tmp_path / "cut", parts, checkpoint, max_steps=cut, **options)
    assert parts.validated[-1] == cut
    resumed = fit(
        source, tmp_path / "resumed", parts, max_steps=total, ckpt_path=str(checkpoint.last_model_path), **options
    )
    assert difference(uncut, resumed) == 0.0
    assert parts.logged == whole.logged
    assert parts.validated == sorted({*whole.validated, cut})


def test_the_first_moves_neither_early_stopping_nor_checkpoints_nor_plateaus(source: str, tmp_path: Path) -> None:
    stop = EarlyStopping("val/nll", patience=1, check_on_train_epoch_end=False)
    checkpoint = Checkpoint(monitor="val/nll")
    seen: list[tuple[int, float, str]] = []

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append((stop.wait_count, float(stop.best_score), checkpoint.best_model_path))

    fit(source, tmp_path, stop, checkpoint, Look(), max_steps=6)
    assert seen == [(0, float("inf"), "")]
    assert checkpoint.best_model_path.endswith("step=6.ckpt")


def test_a_run_that_is_shorter_than_its_interval_can_be_saved_by_what_it_found(source: str, tmp_path: Path) -> None:
    """Before, such a run ended without a checkpoint that was best."""
    checkpoint = Checkpoint(monitor="val/nll")
    fit(source, tmp_path, checkpoint, max_steps=4)
    assert checkpoint.best_model_score is not None and checkpoint.best_model_path.endswith("step=4.ckpt")


EVERY_4 = {"val_check_interval": 4, "check_val_every_n_epoch": None}


@pytest.mark.parametrize(
    ("monitor", "options"),
    [(None, {}), (None, EVERY_4), ("val/nll", EVERY_4), ("train/nll", {}), ("train/nll", EVERY_4)],
)
def test_a_run_that_ends_without_a_validation_resumes_bit_exactly(
    monitor: str | None, options: dict[str, Any], source: str, tmp_path: Path
) -> None:
    """With a monitor it was saved after Lightning had counted the epoch as finished: the rest of it was left out."""
    off = FirstLastValidation(False, False)
    uncut = fit(source, tmp_path / "whole", off, max_steps=9, **options)
    checkpoint = Checkpoint(monitor=monitor)
    fit(source, tmp_path / "cut", checkpoint, off, max_steps=5, **options)
    saved = str(checkpoint.last_model_path)
    resumed = fit(source, tmp_path / "resumed", off, max_steps=9, ckpt_path=saved, **options)
    assert difference(uncut, resumed) == 0.0
    if monitor is not None:
        validated, final = "step=4.ckpt", "step=5.ckpt"  # whichever has the smaller value, where both do
        saved_at = {"val/nll": (validated,), "train/nll": (validated, final) if options else (final,)}[monitor]
        assert checkpoint.best_model_path.endswith(saved_at)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_steps": 5}, "ends after 5 optimizer steps, before its first validation, which would follow step 6"),
        (
            {"max_steps": 3, **EVERY_4},
            "after 3 optimizer steps, before its first validation, which would follow step 4",
        ),
        ({"max_steps": 2, "accumulate_grad_batches": 4, "check_val_every_n_epoch": 2}, "would follow step 4"),
        ({"max_epochs": 1, "check_val_every_n_epoch": 2}, "ends after 1 epochs"),
    ],
    ids=str,
)
@pytest.mark.parametrize("waits", [lambda: Checkpoint(monitor="val/nll"), lambda: EarlyStopping("val/nll")])
def test_who_waits_for_a_validation_that_never_comes_is_told_before_training(
    waits: Any, options: dict[str, Any], said: str, source: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said) as error:
        fit(source, tmp_path, waits(), MetricCheck(), FirstLastValidation(True, False), **options)
    assert "monitor" in str(error.value) and "--validation.after true" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 6},
        {"max_steps": 4, **EVERY_4},
        {"max_steps": 2, "accumulate_grad_batches": 4},
        {"max_steps": 1, "accumulate_grad_batches": 4, **EVERY_4},
        {"max_epochs": 2, "check_val_every_n_epoch": 2},
    ],
    ids=str,
)
def test_a_run_whose_last_step_is_validated_anyway_is_not_refused(
    options: dict[str, Any], source: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(monitor="val/nll")
    fit(source, tmp_path, checkpoint, MetricCheck(), FirstLastValidation(True, False), **options)
    assert checkpoint.best_model_path


def test_a_run_whose_validation_goes_by_the_clock_says_at_its_end_that_there_was_none(
    source: str, tmp_path: Path
) -> None:
    options = {"max_steps": 3, "val_check_interval": timedelta(hours=1), "check_val_every_n_epoch": None}
    checkpoint = Checkpoint(monitor="val/nll")
    with pytest.warns(UserWarning, match="--checkpoint.monitor val/nll: it was never measured in this run"):
        fit(source, tmp_path, checkpoint, MetricCheck(), FirstLastValidation(True, False), **options)
    assert Path(checkpoint.last_model_path).exists() and not checkpoint.best_model_path
