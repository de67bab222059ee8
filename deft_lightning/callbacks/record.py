"""The figures of a run that are told once it is over: its validations, its noise estimate, its tests."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

ESTIMATED = "noise/estimated"


class Point(NamedTuple):
    """A validation.

    Attributes:
        step: Optimizer steps before it.
        nll: What it found.
    """

    step: int
    nll: float


class RunRecord(Callback):
    """Keeps the figures of a run, for its summary and for the card of its export.

    The first and the best validation are part of the checkpoint, so that a resumed run compares with the beginning.

    Attributes:
        first: Validation before training, or the first in it.
        last: The newest.
        best: That of the lowest plain NLL.
        noise: The last estimate of the share of wrong answers, in [0, 1]; None where nothing was estimated.
        tests: What `test` has logged since the fit, by tag.
    """

    def __init__(self) -> None:
        self.first: Point | None = None
        self.last: Point | None = None
        self.best: Point | None = None
        self.noise: float | None = None
        self.tests: dict[str, float] = {}

    @property
    def state_key(self) -> str:
        """Return the name of the state in checkpoints, which is the same with a summary and without."""
        return "RunSummary"

    def state_dict(self) -> dict[str, Any]:
        """Return the first and the best validation."""
        return {name: None if (point := getattr(self, name)) is None else list(point) for name in ("first", "best")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from them."""
        for name, point in state_dict.items():
            setattr(self, name, None if point is None else Point(int(point[0]), float(point[1])))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a run; a checkpoint is read after this."""
        if stage == "fit":
            self.first = self.last = self.best = self.noise = None
            self.tests = {}

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of the validation before training; a check of a few batches is none."""
        if trainer.num_sanity_val_steps == float("inf"):
            self._note(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of a validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._note(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of the estimate, which other verbs forget."""
        self.noise = self.estimated(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of what was found."""
        self.tests |= {tag: float(value) for tag, value in trainer.callback_metrics.items()}

    def estimated(self, trainer: Trainer) -> float | None:
        """Return the estimate as it is now."""
        value = trainer.callback_metrics.get(ESTIMATED)
        return self.noise if value is None else float(value)

    def _note(self, trainer: Trainer) -> None:
        if (value := trainer.callback_metrics.get("val/nll")) is None:
            return
        self.last = Point(trainer.global_step, float(value))
        self.first = self.first or self.last
        if self.best is None or self.last.nll < self.best.nll:
            self.best = self.last


def record_of(trainer: Any) -> RunRecord | None:
    """Return the record of a trainer, None if it keeps none."""
    return next((one for one in getattr(trainer, "callbacks", ()) if isinstance(one, RunRecord)), None)
