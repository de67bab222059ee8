"""Checkpoints with the defaults of this package."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from lightning_utilities.core.rank_zero import rank_zero_warn

from deft_lightning._lightning import FinalCheckpoint, is_accumulating, validates_here
from deft_lightning.callbacks.monitored import of_validation
from deft_lightning.errors import UserError


class Checkpoint(FinalCheckpoint):
    """Saves the newest state, by default after each validation and at the end of training.

    Args:
        every_n_train_steps: Save every this many optimizer steps instead.
        save_top_k: How many checkpoints to keep; with `monitor`, the best ones.
        monitor: For example `val/nll`.
        mode: Whether a smaller (min) or larger (max) value of `monitor` is better.
        dirpath: Folder; default: `checkpoints` in the run's log folder.
        save_weights_only: Save only weights; such a checkpoint cannot be resumed.
        asynchronous: Copy the state, and write it while training continues; one at a time. A fit waits for it.

    Raises:
        UserError: Sharded checkpoints are asynchronous, or one could not be written.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        save_top_k: int = 1,
        monitor: str | None = None,
        mode: str = "min",
        dirpath: str | None = None,
        save_weights_only: bool = False,
        asynchronous: bool = False,
    ) -> None:
        self.asynchronous = asynchronous
        super().__init__(
            dirpath=dirpath,
            filename="step={step}",
            auto_insert_metric_name=False,
            monitor=monitor,
            mode=mode,
            save_last="link" if monitor is None else True,
            save_top_k=save_top_k,
            save_weights_only=save_weights_only,
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=None,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle on the run's own folder before a fit, whatever its logger; nothing else saves."""
        if stage != "fit":
            return
        if self.dirpath is None and hasattr(trainer, "run_folder") and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.dirpath = str(Path(str(trainer.log_dir)) / "checkpoints")
        if self.asynchronous and getattr(trainer.strategy, "saves_shares", False):
            raise UserError(
                "--checkpoint.asynchronous true: a sharded checkpoint is written by all ranks together, not in the"
                " background; set --checkpoint.asynchronous false, or save_distributed_checkpoint of fsdp2 to false"
            )
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Save where training stops, before Lightning counts the epoch that is cut there as finished."""
        if self.asynchronous:  # a write that has failed ends the run here, not at the next save
            getattr(trainer.strategy.checkpoint_io, "raise_failed", lambda: None)()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if _stops(trainer) and (self.monitor is None or not validates_here(trainer)):
            # Without a validation a metric of training is known all the same; one of validation is of another state.
            known = self.monitor is not None and not of_validation(self.monitor)
            self.save_final(trainer, validated=known and self.monitor in trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save by what the last validation found, for the same reason not at the end of the epoch."""
        super().on_validation_end(trainer, pl_module)
        if _stops(trainer) and self.monitor is not None:
            self.save_final(trainer, validated=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state if no validation or epoch end has; a `fast_dev_run` keeps nothing."""
        if getattr(trainer, "fast_dev_run", False):
            return
        self.save_final(trainer)
        super().on_train_end(trainer, pl_module)
        if self.monitor is not None and not self.best_model_path and self.save_top_k and self.last_model_path:
            rank_zero_warn(
                f"--checkpoint.monitor {self.monitor}: it was never measured in this run, so no checkpoint is "
                f"the best; the newest is {self.last_model_path}"
            )


def _stops(trainer: Trainer) -> bool:
    """Return whether no batch follows, in the middle of an epoch perhaps."""
    return trainer.global_step == trainer.max_steps or (trainer.should_stop and not is_accumulating(trainer))
