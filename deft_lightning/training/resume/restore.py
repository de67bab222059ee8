"""Restoring a run from a checkpoint: what differs is said, what cannot be resumed is refused, in one line each."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from deft_lightning._lightning import CheckpointConnector, attached_module, restore_place_in_data
from deft_lightning.annotations import Checkpoint, Settings, State
from deft_lightning.errors import UserError
from deft_lightning.models.contents import KEY
from deft_lightning.training.resume.last import line_of
from deft_lightning.training.resume.refuse import about, known_settings, refuse, refuse_classes
from deft_lightning.training.resume.settings import changed_arguments, differences, of_model, plain, settings, shown
from deft_lightning.training.resume.state import refuse_loops, refuse_state

MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError)
RATES = {"lr", "initial_lr"}  # of an optimizer, but set by the schedule


class Restoring(CheckpointConnector):
    """Lightning's restoring, which says what differs and ends in one line where a checkpoint does not fit.

    Args:
        trainer: The trainer it restores.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._settings: Settings = {}
        self._run: Settings = {}
        self._again = False

    # ---------------------------------------------------------------- which, and whether it can be

    def find(self, stage: TrainerFn, ckpt_path: str | Path | None) -> Any:
        """Let `last` mean the newest checkpoint of all runs, where Lightning knows those of this one alone."""
        return str(self.trainer.last_checkpoint()) if ckpt_path == "last" else ckpt_path  # type: ignore[attr-defined]

    def selected(self, stage: TrainerFn, path: str | Path | None) -> None:
        """Refuse what cannot be resumed."""
        self._settings, self._run = {}, {}
        if path is not None and stage is TrainerFn.FITTING and "://" not in str(path):
            refuse(path, self.trainer, attached_module(self.trainer))

    # ---------------------------------------------------------------- restoring

    @contextmanager
    def _of(self, part: str) -> Iterator[None]:
        """Turn what Lightning and torch raise on a checkpoint that does not fit into one line that names the file."""
        try:
            yield
        except (UserError, torch.OutOfMemoryError, torch.distributed.DistError):
            raise
        except MALFORMED as error:
            if self.path is None:
                raise
            reason = shown(f"{type(error).__name__}: {error}")
            raise UserError(
                f"{self.path}: cannot be restored: its {part} do not fit this run or are damaged ({reason})"
                " (--ckpt_path)"
            ) from error

    def resume_start(self, checkpoint_path: str | Path | None = None, weights_only: bool | None = None) -> None:
        """Read the checkpoint."""
        try:
            with self._of("contents"):
                super().resume_start(checkpoint_path, weights_only)
        except UserError as error:
            raise self.trainer.finder.naming_older(checkpoint_path, error) from error  # type: ignore[attr-defined]
        # Callbacks delete files whose names they have from a checkpoint: they may lie beside it alone.
        _keep_beside(self.contents)

    def restore_datamodule(self) -> None:
        """Restore the state of the data."""
        with self._of("data states"):
            super().restore_datamodule()

    def restore_model(self) -> None:
        """Restore the weights."""
        with self._of("weights"):
            super().restore_model()

    def restore_callbacks(self) -> None:
        """Restore the state of the callbacks."""
        with self._of("states of callbacks"):
            super().restore_callbacks()

    def restore(self, checkpoint_path: str | Path | None = None, weights_only: bool | None = None) -> None:
        """Go back to a checkpoint within a run, as the tuner does: nothing is compared."""
        self._again = True
        try:
            super().restore(checkpoint_path, weights_only)
        finally:
            self._again = False

    def restore_training_state(self) -> None:
        """Note what this fit trains with; restore optimizer, schedule and place, and say what differs."""
        if self._again or self.trainer.state.fn is not TrainerFn.FITTING:
            with self._of("states of loops"):
                super().restore_training_state()
            return
        self._settings, held = settings(self.trainer), self.contents
        # A run that keeps no checkpoints needs no folder for them.
        folder = self.trainer.log_dir if self.trainer.checkpoint_callbacks else None
        self._run = {
            "id": (own := secrets.token_hex(8)),
            "line": [*line_of(held, self.path), own] if held else [own],
            "folder": str(Path(folder).resolve()) if folder else None,
            "started": time.time(),
        }
        if not held:
            return
        before = {name: plain(value) for name, value in known_settings(held).items()}
        if about(held):
            self._say(before, held)
        step = held.get("global_step")
        if step == self.trainer.max_steps:
            rank_zero_info(f"resuming: nothing is left to train: the checkpoint is at step {step} of {step}")
        optimizers = self.trainer.optimizers
        if optimizers:
            scheduler = self._settings["model.scheduler"]["class"]
            refuse_classes(str(self.path), before, self._settings["model.optimizer"]["class"], scheduler)
            with self._of("optimizer states"):
                refuse_state(str(self.path), held, optimizers)
        with self._of("states of loops"):
            refuse_loops(str(self.path), held)
        asked = [[_without_params(group) for group in one.param_groups] for one in optimizers]
        with self._of("states of optimizer, schedule and loops"):
            super().restore_training_state()
            restore_place_in_data(self.trainer)
        for name in changed_arguments(before, self._settings) - RATES:  # the command line wins over the checkpoint
            for group, own_group in zip(optimizers[0].param_groups, asked[0], strict=True):
                if name in own_group:
                    group[name] = own_group[name]

    def _say(self, before: Settings, held: Checkpoint) -> None:
        if not before:
            rank_zero_info(
                f"resuming: {self.path} is older than saved settings: its data, seeds and optimizer are "
                "unknown and cannot be compared"
            )
            return
        lines = differences(before, self._settings)
        model = getattr(getattr(self.trainer.lightning_module, "model", None), "config", None)
        if model is not None and isinstance(config := about(held).get("config"), str):
            lines += of_model(config, model.to_json_string(use_diff=False))
        for line in lines:
            rank_zero_info(f"resuming: {line}")

    # ---------------------------------------------------------------- saving

    def dump_checkpoint(self, weights_only: bool | None = None) -> Checkpoint:
        """Add what this fit trains with, and which run it is, to what SFTModule writes."""
        checkpoint: Checkpoint = super().dump_checkpoint(weights_only)
        if self._settings and KEY in checkpoint:
            checkpoint[KEY] = {**checkpoint[KEY], "settings": self._settings, "run": self._run}
        return checkpoint


def _without_params(group: State) -> State:
    return {name: value for name, value in group.items() if name != "params"}


def _keep_beside(held: Checkpoint) -> None:
    """Take names of files that do not lie in the folder of their callback out of its state."""
    states = held.get("callbacks")
    for state in states.values() if isinstance(states, dict) else ():
        if not isinstance(state, dict):
            continue
        # Without a folder no file is its own: Lightning would take the name as it is, and delete what has it.
        named = state.get("dirpath")
        folder, gone = os.path.abspath(named) if isinstance(named, str) else "", list[Any]()

        def kept(name: Any, folder: str = folder, gone: list[Any] = gone) -> str:
            # Without `..`, which Lightning would take for a folder within.
            path = os.path.abspath(name) if isinstance(name, str) and "://" not in name else ""
            if folder and os.path.dirname(path) == folder and path.endswith(".ckpt"):
                return path
            gone.append(name)
            return ""

        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            if state.get(name):
                state[name] = kept(state[name])
        if isinstance(best := state.get("best_k_models"), dict):
            state["best_k_models"] = {path: score for name, score in best.items() if (path := kept(name))}
        if gone:
            where = f"checkpoints in {shown(folder)}" if folder else "checkpoints of its folder"
            rank_zero_warn(f"the checkpoint names files as its own that are not {where}; they are left alone")
