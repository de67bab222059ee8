"""The only file that touches Lightning's private names; ``tests/test_lightning_names.py`` pins each of them.

Beside the functions here, :class:`~deft_lightning.cli.main.DeftCLI` overrides methods of ``LightningCLI`` that have no
public counterpart: ``_parse_ckpt_path``, ``_prepare_subcommand_parser``, ``_prepare_subcommand_kwargs``,
``_run_subcommand``.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

# ---------------------------------------------------------------------------------------------------- where a fit is


def is_logging_step(trainer: Trainer) -> bool:
    """Return whether what is logged in this batch is written, by ``log_every_n_steps``; the same on every rank."""
    return bool(trainer._logger_connector.should_update_logs)


def is_accumulating(trainer: Trainer) -> bool:
    """Return whether the batch in hand is a micro-batch after which the optimizer does not step yet."""
    return bool(trainer.fit_loop._should_accumulate())


def logged_step(trainer: Trainer) -> int:
    """Return the step that Lightning's own loggers write beside."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def log_now(trainer: Trainer, values: dict[str, float]) -> None:
    """Write values of this step alone, on rank zero; Lightning's ``log`` would repeat them on steps without any."""
    for logger in trainer.loggers if values else ():
        logger.log_metrics(values, step=logged_step(trainer))


def restore_place_in_data(trainer: Trainer) -> None:
    """Give the training loader its place from a checkpoint, where it was made before the checkpoint was restored.

    Whatever counts the steps of a run makes it, a schedule that is planned over epochs for one; Lightning hands the
    place to a loader that it makes afterwards alone, and would begin the epoch again.
    """
    trainer.fit_loop._load_combined_loader_states()


class TrainingLoop(_TrainingEpochLoop):
    """Lightning's loop over batches, which also validates after the last optimizer step of a run."""

    _added = False  # whether the validation in hand is one that the intervals did not ask for

    @classmethod
    def install(cls, trainer: Trainer) -> None:
        """Make a trainer train through this class; its state stays."""
        trainer.fit_loop.epoch_loop.__class__ = cls

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Validate; what is drawn in a validation that intervals did not ask for, moves no random state."""
        self._added = self._ends_here() and not super()._should_check_val_fx(data_fetcher)
        with isolate_rng() if self._added else nullcontext():
            super().on_advance_end(data_fetcher)
        self._added = False

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Count the step in hand, where it is saved by what an added validation found.

        A run that goes on from there with more steps does not come back to this validation, after which it is counted.
        """
        state = super().on_save_checkpoint()
        state["_batches_that_stepped"] += self._added
        return state

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        return super()._should_check_val_fx(data_fetcher) or self._ends_here()

    def _ends_here(self) -> bool:
        trainer = self.trainer
        # A loop that is being restored asks before its first batch whether a validation was interrupted.
        if (self.restarting and self.val_loop.restarting) or not trainer.enable_validation or self._should_accumulate():
            return False
        if self.max_steps != -1 and self.global_step >= self.max_steps:
            return True
        limit = trainer.max_epochs
        return limit not in (None, -1) and self._num_ready_batches_reached() and trainer.current_epoch + 1 >= limit


def validates_here(trainer: Trainer) -> bool:
    """Return whether a validation follows the batch in hand; asked when that batch has been trained on."""
    fetcher = trainer.fit_loop._data_fetcher
    return bool(fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher))


# --------------------------------------------------------------------------------------- what belongs to which trainer


def trainer_of(module: Any) -> Any | None:
    """Return the trainer a module is attached to, None before; the public property raises then."""
    return module._trainer


def attach(trainer: Trainer, module: Any, datamodule: Any | None = None) -> None:
    """Tell trainer, module and data module of each other, as the loops do for Lightning's own verbs."""
    if datamodule is not None and module is not None:
        trainer._data_connector.attach_data(module, datamodule=datamodule)
    elif datamodule is not None:
        datamodule.trainer = trainer
    trainer.strategy._lightning_module = module


def attached_module(trainer: Trainer) -> Any | None:
    """Return the module of a trainer, None before it has one."""
    return trainer.strategy._lightning_module


def computes_on(module: Any, device: torch.device) -> None:
    """Tell a module the device it computes on, where its weights wait elsewhere and nothing moves it there."""
    module._device = device


def unwrapped(optimizer: Any) -> Any:
    """Return torch's optimizer inside Lightning's wrapper, or the optimizer itself."""
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


# -------------------------------------------------------------------------------------------------------- checkpoints


class CheckpointConnector(_CheckpointConnector):
    """Lightning's restoring, with names for what a subclass reads.

    Args:
        trainer: The trainer it restores.
    """

    @classmethod
    def install(cls, trainer: Trainer) -> None:
        """Make a trainer restore through this class."""
        trainer._checkpoint_connector = cls(trainer)

    @property
    def path(self) -> Any:
        """Return the checkpoint that is being restored, None if none is."""
        return self._ckpt_path

    @property
    def contents(self) -> dict[str, Any]:
        """Return what was read of it; empty if nothing was."""
        return self._loaded_checkpoint

    def find(self, stage: TrainerFn, ckpt_path: str | Path | None) -> Any:
        """Return the path to give to Lightning for what a user asked for."""
        return ckpt_path

    def selected(self, stage: TrainerFn, path: str | Path | None) -> None:
        """Look at the path that Lightning has settled on, None for no checkpoint, before anything is read."""

    def _select_ckpt_path(
        self, state_fn: TrainerFn, ckpt_path: str | Path | None, model_provided: bool, model_connected: bool
    ) -> Any:
        path = super()._select_ckpt_path(state_fn, self.find(state_fn, ckpt_path), model_provided, model_connected)
        self.selected(state_fn, path)
        return path


class FinalCheckpoint(ModelCheckpoint):
    """Lightning's checkpoints, which can be asked to save a run's final state, whatever their intervals say."""

    def save_final(self, trainer: Trainer, validated: bool = False) -> None:
        """Save the state as it is, unless it is saved already.

        Args:
            trainer: Of the run.
            validated: Whether the metric that is waited for, if one is, is of this state.
        """
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is None or validated:
            self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Link to the newest checkpoint; if somebody has removed it, to one that is saved now."""
        newest = self._last_checkpoint_saved
        writing = getattr(trainer.strategy.checkpoint_io, "pending", lambda _: False)
        if self.save_last == "link" and newest and not Path(newest).exists() and not writing(newest):
            self._save_topk_checkpoint(trainer, monitor_candidates)
        super()._save_last_checkpoint(trainer, monitor_candidates)


class DataParallelStrategy(ModelParallelStrategy):
    """Lightning's strategy for DTensors, with all ranks in its data-parallel dimension and no tensor parallelism.

    Args:
        save_distributed_checkpoint: A folder to which each rank writes its share, instead of one file.
        kwargs: As :class:`lightning.pytorch.strategies.ModelParallelStrategy`.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, **kwargs: Any) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **kwargs,
        )

    @property
    def saves_shares(self) -> bool:
        """Return whether each rank writes its share of a checkpoint."""
        return bool(self._save_distributed_checkpoint)

    def setup_environment(self) -> None:
        """Join the other ranks; ``auto`` would mean that none is data parallel."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
