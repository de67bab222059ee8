"""Validation before the first step and after the last, so that ``val/*`` is always there and says what training did."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from deft_lightning._lightning import TrainingLoop, log_now


class FirstLastValidation(Callback):
    """Validates before the first optimizer step and after the last one, at any validation interval.

    The first takes the place of Lightning's check of two batches, and is logged at step 0. It moves no random state, no
    early stopping, no checkpoint, and no schedule that waits for a validation; a resumed run does not repeat it. If
    `--trainer.num_sanity_val_steps` is given, that check is made instead. The last is an ordinary validation, unless
    there was one at that step anyway.

    Args:
        before: Validate before the first step.
        after: Validate after the last step.
    """

    def __init__(self, before: bool = True, after: bool = True) -> None:
        self.before, self.after = before, after

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the training loop validate at the end."""
        if stage == "fit" and self.after:
            TrainingLoop.install(trainer)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the first validation; Lightning forgets what it found."""
        if trainer.num_sanity_val_steps != float("inf"):
            return  # a check of a few batches
        log_now(trainer, {tag: float(value) for tag, value in trainer.callback_metrics.items()})
        for logger in trainer.loggers:
            logger.save()
