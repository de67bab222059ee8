"""How fast a run is: steps, tokens and seconds of training, validations apart, and the time that is left."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from deft_lightning._lightning import is_accumulating


class Pace:
    """Counts the optimizer steps, tokens and seconds of a fit; a validation stops the clock of training.

    A resumed run counts from where it was resumed. Padding is no token.

    Args:
        clock: Returns seconds, from any beginning.

    Attributes:
        first: Optimizer steps that had been made before the fit.
        step: Optimizer steps that have been made.
        tokens: Of this rank since the fit began.
        training: Seconds in training steps, data included.
        validating: Seconds of each validation.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.validating = list[float]()  # one before training included
        self.begin(0)

    def begin(self, step: int) -> None:
        """Stand before the first batch of a fit that ``step`` optimizer steps precede."""
        self.first = self.step = step
        self.tokens, self.training = 0, 0.0
        self._warm: tuple[int, float] | None = None  # steps and seconds after the first step, which compiles and caches
        self._since = self._clock()
        self._window = (0, 0.0)

    def batch(self, trainer: Trainer, batch: object) -> None:
        """Add a micro-batch that is done."""
        now = self._clock()
        self.training, self._since = self.training + now - self._since, now
        self.tokens += batch.get("num_tokens", 0) if isinstance(batch, dict) else 0
        self.step = trainer.global_step
        if self._warm is None and self.step > self.first and not is_accumulating(trainer):
            self._warm = (self.step, self.training)

    def validate(self) -> None:
        """Stand at the start of a validation."""
        now = self._clock()
        self.training, self._since = self.training + now - self._since, now

    def validated(self) -> float:
        """Stand at its end; return its seconds."""
        now = self._clock()
        self.validating.append(now - self._since)
        self._since = now
        return self.validating[-1]

    def rate(self) -> float:
        """Return the tokens a second of this rank since the last call, 0 if no time has passed."""
        tokens, seconds = self.tokens - self._window[0], self.training - self._window[1]
        self._window = (self.tokens, self.training)
        return tokens / seconds if seconds > 0 else 0.0

    def left(self, trainer: Trainer, total: int | None) -> float | None:
        """Return the seconds that the run still takes, validations to come included; None if it has no end.

        Args:
            trainer: Knows how often it validates, and when it stops by the clock.
            total: Optimizer steps of the run.
        """
        limits = []
        if total is not None and self.step > self.first:
            steps, seconds = self._warm or (self.first, 0.0)
            if steps == self.step:
                steps, seconds = self.first, 0.0
            each = (self.training - seconds) / (self.step - steps)
            mean = sum(self.validating) / len(self.validating) if self.validating else 0.0
            limits.append((total - self.step) * each + mean * validations_left(trainer, self.step, total))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer) and (remaining := callback.time_remaining()) is not None:
                limits.append(float(remaining))
        return max(min(limits), 0.0) if limits else None


def steps_of(trainer: Trainer) -> int | None:
    """Return the optimizer steps of a run, those before a resume included; None if it has no end that is counted."""
    try:
        steps = trainer.estimated_stepping_batches
    except MisconfigurationException:  # accumulation that changes with the epoch
        return trainer.max_steps if trainer.max_steps > 0 else None
    return None if math.isinf(steps) or steps < 0 else int(steps)


def validations_left(trainer: Trainer, step: int, total: int) -> int:
    """Return how many validations follow an optimizer step, the last one included."""
    if not trainer.enable_validation:
        return 0
    batches, epoch = trainer.val_check_batch, trainer.num_training_batches
    if batches is None or math.isinf(batches):
        return 1
    every = batches / trainer.accumulate_grad_batches
    if trainer.check_val_every_n_epoch is not None:
        # Within an epoch a last window of micro-batches may be short.
        within = batches >= epoch
        every = (math.ceil(epoch / trainer.accumulate_grad_batches) if within else every) * (
            trainer.check_val_every_n_epoch
        )
    return max(math.ceil(total / every) - math.floor(step / every), 1) if every else 1


def over_ranks(trainer: Trainer, module: LightningModule, number: float) -> float:
    """Return the sum of a number over all ranks; every rank has to call it."""
    if trainer.world_size == 1:
        return number
    return float(trainer.strategy.reduce(torch.tensor(number, device=module.device), reduce_op="sum"))


def peak_memory(module: LightningModule) -> float | None:
    """Return the most memory that this rank has held so far, in bytes.

    On CUDA what tensors took of the device, elsewhere the resident memory of the process; None where the system does
    not tell.
    """
    if module.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(module.device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def clock_time(seconds: float) -> str:
    """Return a span of time as ``0:07``, ``12:30`` or ``1:05:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def gibibytes(size: float) -> str:
    """Return a number of bytes as ``0.61 GiB``."""
    return f"{size / 2**30:.2f} GiB"
