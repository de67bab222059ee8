"""A trainer's way from what a user asks for, a file or ``last``, to a checkpoint that was read."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.annotations import Checkpoint
from deft_lightning.errors import UserError
from deft_lightning.models import load_checkpoint
from deft_lightning.training.resume.last import last_checkpoint


class CheckpointFinder:
    """Finds and reads the checkpoints of a trainer's runs.

    Args:
        trainer: Its folder and its checkpoint callbacks say where they lie.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._older: tuple[str, Path] | None = None  # a checkpoint that `last` has meant, and the one before it

    def read(self, ckpt_path: str) -> Checkpoint:
        """Read a checkpoint of this package, `last` included.

        Raises:
            UserError: It cannot be read; if `last` meant it, the message names the one before it too.
        """
        path = str(self.last()) if ckpt_path == "last" else ckpt_path
        try:
            return load_checkpoint(path)
        except UserError as error:
            raise self.naming_older(path, error) from None

    def naming_older(self, path: str | Path | None, error: UserError) -> UserError:
        """Return an error of reading a checkpoint; if `last` meant that one, with the one before it."""
        if self._older is None or self._older[0] != str(path):
            return error
        return UserError(f"{error}; the newest before it: --ckpt_path {self._older[1]}")

    def last(self, run: Path | None = None) -> Path:
        """Return what ``last`` means, and say it: :meth:`deft_lightning.Trainer.last_checkpoint`."""
        trainer = self.trainer
        savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
        own = [
            Path(saver.last_model_path or saver.best_model_path).resolve() for saver in savers if saver.best_model_path
        ]
        if run is None and own and own[0].exists():
            return own[0]
        folders = [trainer.default_root_dir, *(saver.dirpath for saver in savers if saver.dirpath)]
        roots = dict.fromkeys(Path(folder) for folder in folders if "://" not in str(folder))
        if run is not None:
            roots[run] = None
        newest = last_checkpoint(roots, run)
        if newest is None:
            where = (
                f"of {run} (--config)"
                if run is not None
                else f"under {trainer.default_root_dir} (--trainer.default_root_dir)"
            )
            raise UserError(f"--ckpt_path last: no checkpoint {where}")
        self._older = None if newest.older is None else (str(newest.path), newest.older)
        rank_zero_info(f"--ckpt_path last: {'; '.join([str(newest.path), *newest.said])}")
        return newest.path
