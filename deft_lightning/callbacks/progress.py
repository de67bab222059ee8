"""How a run is doing: a bar on a terminal, lines where output is kept; both in optimizer steps."""

from __future__ import annotations

import sys
import time
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.types import STEP_OUTPUT

from deft_lightning._lightning import is_accumulating, is_logging_step
from deft_lightning.callbacks.pace import Pace, clock_time, gibibytes, over_ranks, peak_memory, steps_of
from deft_lightning.errors import UserError

Style = Literal["auto", "bar", "lines"]
EVERY = 30.0  # seconds between two lines of a long validation, test or prediction, and of steps that are not logged
SHORT = {"train/loss": "loss", "train/nll": "nll", "val/nll": "val_nll", "noise/estimated": "noise"}
VALIDATED = ("val/nll", "val/token_accuracy", "val_noisy/nll", "forgetting/kl")


class SFTProgressBar(TQDMProgressBar):
    """Shows step, loss, nll, noise rate, tokens a second and time left: a bar on a terminal, else lines.

    Steps are optimizer steps of the whole run, also under gradient accumulation and after a resume. Lines are written
    by rank 0 to standard output: one for each logged step (`--trainer.log_every_n_steps`), one for each validation, one
    each half minute of a long validation or test, and of steps that are not logged. Tokens are those of all ranks in
    lines and of this rank behind the bar, without padding. `noise` is the estimated share of wrong answers.

    Args:
        refresh_rate: Optimizer steps between updates of the bar; None is 1.
        style: `bar`, `lines`, or `auto`: a bar on a terminal and in notebooks, lines in files and pipes.
    """

    def __init__(self, refresh_rate: int | None = None, style: Style = "auto") -> None:
        super().__init__(refresh_rate=1 if refresh_rate is None else refresh_rate)
        if style not in ("auto", "bar", "lines"):
            raise UserError(f"progress_bar.style must be auto, bar or lines, not {style!r}")
        watched = sys.stdout.isatty() or "ipykernel" in sys.modules
        self.lines = style == "lines" or (style == "auto" and not watched)
        self.pace = Pace()
        self._total: int | None = None
        self._waiting: str | None = None  # a line whose metrics are not logged yet
        self._rate, self._mark = 0.0, 0.0
        self._begun, self._done = 0.0, 0  # of an evaluation: when it began, and its batches

    @property
    def sanity_check_description(self) -> str:
        """Return what stands before the bar of the validation before training, or of a check of a few batches."""
        whole = self.trainer.num_sanity_val_steps == float("inf")
        return "Validation before training" if whole else str(super().sanity_check_description)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave bars out where lines are written."""
        super().setup(trainer, pl_module, stage)
        self.pace, self._waiting = Pace(), None
        if self.lines:
            self.disable()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin at the step that the run begins with, or goes on from."""
        super().on_train_start(trainer, pl_module)
        self._total = steps_of(trainer)
        self.pace.begin(trainer.global_step)
        self._mark, self._rate = time.perf_counter(), 0.0
        bar = self.train_progress_bar
        bar.total, bar.initial, bar.n = self._total, self.pace.first, self.pace.first

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Name the epoch; the bar is that of the whole run."""
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Write the line of the step before, of which everything is logged now."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._write_waiting(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Count; the number of tokens is a plain one in the batch, so nothing waits for the device."""
        self.pace.batch(trainer, batch)
        if self.lines:
            if not is_accumulating(trainer) and is_logging_step(trainer):
                rate = over_ranks(trainer, pl_module, self.pace.rate())
                self._waiting = self._numbers(trainer, pl_module, rate)
            elif time.perf_counter() - self._mark >= EVERY:
                self._tell(trainer, "  ".join([_place(self.pace.step, self._total), *self._time_left(trainer)]))
            return
        if is_accumulating(trainer):
            return
        if time.perf_counter() - self._mark > 1.0:
            self._rate, self._mark = self.pace.rate(), time.perf_counter()
        bar, step = self.train_progress_bar, self.pace.step
        if self.is_enabled and (step % self.refresh_rate == 0 or step == self._total):
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.n = step
            bar.refresh()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is waiting: no batch of this epoch follows."""
        super().on_train_epoch_end(trainer, pl_module)
        self._write_waiting(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave validation out of the throughput."""
        super().on_validation_start(trainer, pl_module)
        self._write_waiting(trainer)
        self.pace.validate()
        self._start_evaluation()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what it found; a check of a few batches finds nothing that could be compared."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != "fit":
            return
        seconds = self.pace.validated()
        check = trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf")
        if not check and self.lines:
            values = {tag: trainer.callback_metrics[tag] for tag in VALIDATED if tag in trainer.callback_metrics}
            figures = "  ".join(f"{tag} {float(value):.3f}" for tag, value in values.items())
            total = steps_of(trainer) if trainer.sanity_checking else self._total
            self._tell(trainer, f"{_place(trainer.global_step, total)}  {figures}  validated in {clock_time(seconds)}")
        if check:
            self.pace.validating.clear()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **options: Any) -> None:
        """Say now and then how far a long one is."""
        super().on_validation_batch_end(trainer, *args, **options)
        sizes = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._evaluated(trainer, "validation", sizes)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count batches."""
        super().on_test_start(trainer, pl_module)
        self._start_evaluation()

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **options: Any) -> None:
        """Say now and then how far a long one is."""
        super().on_test_batch_end(trainer, *args, **options)
        self._evaluated(trainer, "test", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count batches."""
        super().on_predict_start(trainer, pl_module)
        self._start_evaluation()

    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **options: Any) -> None:
        """Say now and then how far a long one is."""
        super().on_predict_batch_end(trainer, *args, **options)
        self._evaluated(trainer, "prediction", trainer.num_predict_batches)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands behind the bar."""
        logged = trainer.progress_bar_metrics
        shown: dict[str, Any] = {short: logged[name] for name, short in SHORT.items() if name in logged}
        if self._rate:
            shown["tok/s"] = f"{self._rate:.0f}"
        return shown

    def _numbers(self, trainer: Trainer, module: LightningModule, rate: float) -> str:
        memory = peak_memory(module)
        parts = [f"{rate:,.0f} tokens/s"]
        parts += [] if memory is None else [f"peak {gibibytes(memory)}"]
        return "  ".join(parts + self._time_left(trainer))

    def _time_left(self, trainer: Trainer) -> list[str]:
        left = self.pace.left(trainer, self._total)
        return [] if left is None else [f"ETA {clock_time(left)}"]

    def _write_waiting(self, trainer: Trainer) -> None:
        if self._waiting is None:
            return
        logged = trainer.progress_bar_metrics
        figures = [
            f"{SHORT[tag]} {float(logged[tag]):.3f}"
            for tag in ("train/nll", "train/loss", "noise/estimated")
            if tag in logged
        ]
        place = _place(self.pace.step, self._total)
        line, self._waiting = "  ".join([place, *figures, self._waiting]), None
        self._tell(trainer, line)

    def _start_evaluation(self) -> None:
        self._begun = self._mark = time.perf_counter()
        self._done = 0

    def _evaluated(self, trainer: Trainer, what: str, sizes: list[int | float]) -> None:
        self._done += 1
        now = time.perf_counter()
        if not self.lines or now - self._mark < EVERY:
            return
        total = sum(sizes)
        if total == float("inf"):
            self._tell(trainer, f"{what}: {self._done} batches")
            return
        left = (now - self._begun) / self._done * (total - self._done)
        self._tell(trainer, f"{what}: {self._done} of {total:.0f} batches  ETA {clock_time(left)}")

    def _tell(self, trainer: Trainer, line: str) -> None:
        self._mark = time.perf_counter()
        if trainer.is_global_zero:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()


def _place(step: int, total: int | None) -> str:
    """Return ``step  20/1000``, as wide for every step."""
    return f"step {step}" if total is None else f"step {step:>{len(str(total))}}/{total}"
