"""The folder of a run, ``<default_root_dir>/version_N``: configuration, checkpoints, export, whatever the logger."""

from __future__ import annotations

import re
from pathlib import Path

from lightning.pytorch import Trainer

VERSION = re.compile(r"version_(\d+)")


class RunFolder:
    """Decides once where a run keeps what it writes.

    It is the folder of a logger that logs to ``<default_root_dir>/version_N``, as the logger of a trainer without any
    does; else the next number. The folder of a fit that saves is made at once, so that no other run takes its number.

    Args:
        trainer: Has the root, the loggers and the ranks.

    Attributes:
        known: The folder once it is decided; None before.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.known: str | None = None

    @property
    def path(self) -> str:
        """Return the folder; asks all ranks, so that all of them have to ask."""
        if self.known is None:
            decided = (self._of_logger() or self._next()) if self._trainer.is_global_zero else None
            self.known = str(self._trainer.strategy.broadcast(decided))
        return self.known

    def _of_logger(self) -> str | None:
        root = Path(self._trainer.default_root_dir)
        for logger in self._trainer.loggers:
            folder = getattr(logger, "log_dir", None)
            if isinstance(folder, str) and VERSION.fullmatch(Path(folder).name):
                if Path(folder).absolute().parent == root.absolute():
                    return folder
        return None

    def _next(self) -> str:
        root = Path(self._trainer.default_root_dir)
        while True:
            names = [one.name for one in root.iterdir()] if root.is_dir() else []
            taken = [int(match[1]) for name in names if (match := VERSION.fullmatch(name))]
            folder = root / f"version_{max(taken, default=-1) + 1}"
            if self._trainer.state.fn != "fit" or not self._trainer.checkpoint_callbacks:
                return str(folder)  # whoever writes there makes it
            try:
                folder.mkdir(parents=True)
            except FileExistsError:  # another run was faster
                continue
            return str(folder)
