"""Logs that end no training: once one cannot be written any more, the run goes on without it and says so in a line."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_warn

from deft_lightning.terminal import visible


class LastingLogger(Logger):
    """What :func:`lasting` puts in front of a logger's own methods.

    A folder that is gone, a full disk or a service that does not answer gives up the log, not the run. Other errors of
    a method that has worked before cost what was to be written; where it has never worked they are raised.
    """

    _given_up = _warned = False
    _worked: frozenset[str] = frozenset()  # names of methods

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write scalars."""
        self.attempt(super().log_metrics, metrics, step)  # type: ignore[safe-super]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Write what was asked for."""
        self.attempt(super().log_hyperparams, *args, **kwargs)  # type: ignore[safe-super]

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        """Draw the model."""
        self.attempt(super().log_graph, *args, **kwargs)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Look at a checkpoint, or send it away."""
        self.attempt(super().after_save_checkpoint, checkpoint_callback)

    def save(self) -> None:
        """Write what has been put aside."""
        self.attempt(super().save)

    def finalize(self, status: str) -> None:
        """Write the rest, and close."""
        self.attempt(super().finalize, status)

    def attempt(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call what writes, unless the log is given up."""
        if self._given_up:
            return None
        try:
            result = call(*args, **kwargs)
        except Exception as error:
            outside = cause_outside(error)
            if outside is None and call.__name__ not in self._worked:
                raise
            self._given_up = outside is not None
            if self._given_up or not self._warned:
                rank_zero_warn(_line(self, outside, error))
            self._warned = True
            return None
        self._worked |= {call.__name__}
        return result


class LastingTensorBoard(LastingLogger):
    """The same for TensorBoard, whose writer callbacks use as well."""

    @property
    def experiment(self) -> Any:
        """Return the writer; what cannot be written is given up here too."""
        return LastingWriter(super().experiment, self.attempt)  # type: ignore[misc]


class LastingWriter:
    """A ``SummaryWriter`` whose methods give up the log where they fail.

    Args:
        writer: The writer itself.
        attempt: Calls a function unless the log is given up.
    """

    def __init__(self, writer: Any, attempt: Callable[..., Any]) -> None:
        self._writer, self._attempt = writer, attempt

    def __getattr__(self, name: str) -> Any:
        """Return what the writer has of that name."""
        attribute = getattr(self._writer, name)
        if name == "_get_file_writer":  # Lightning writes hyperparameters through it
            return lambda: LastingWriter(attribute(), self._attempt)
        return (lambda *args, **kwargs: self._attempt(attribute, *args, **kwargs)) if callable(attribute) else attribute


def folder_of(logger: Logger) -> str | None:
    """Return the folder that a logger writes one run to, or all runs if it tells no more; None for a service."""
    return getattr(logger, "log_dir", None) or logger.save_dir


def lasting(logger: Any) -> Any:
    """Keep a logger, of whatever kind, from ending a run once it has been opened; return it.

    To open it may still fail: nothing is lost yet at the start of a run, and the user can name another folder.
    """
    kind = type(logger)
    if not issubclass(kind, Logger) or issubclass(kind, LastingLogger):
        return logger
    # Its class and not its methods: what its own methods call of each other passes here too.
    logger.__class__ = _lasting_kind(kind)
    return logger


@lru_cache
def _lasting_kind(kind: type) -> type:
    first = LastingTensorBoard if issubclass(kind, TensorBoardLogger) else LastingLogger
    # A name of its own: `--trainer.logger NAME` is looked for among all classes of loggers.
    return type(f"Lasting{kind.__name__}", (first, kind), {"__module__": __name__, "__doc__": kind.__doc__})


def cause_outside(error: BaseException | None) -> OSError | None:
    """Return the error of a disk or a connection that an error comes from, if it does."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _line(logger: Logger, outside: OSError | None, error: Exception) -> str:
    where = folder_of(logger) or type(logger).__name__.removeprefix("Lasting")
    reason = " ".join(str((outside is not None and outside.strerror) or error or type(error).__name__).split())
    if outside is None:
        return visible(f"{where}: a value could not be logged and is left out ({reason}); the run continues")
    return visible(
        f"{where}: the log cannot be written any more ({reason}); the run continues without it, and checkpoints are"
        " saved as before (--trainer.logger, --trainer.default_root_dir)"
    )
