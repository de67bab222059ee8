"""Checkpoint files that are there whole or not at all, written at once or in the background; nothing of them is run."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection

from deft_lightning.annotations import Checkpoint
from deft_lightning.atomic import whole_file
from deft_lightning.errors import UserError
from deft_lightning.models import read_checkpoint
from deft_lightning.models.contents import KEY, problem
from deft_lightning.models.seal import SealingFile


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes under another name, then renames: a save that is cut short leaves the previous checkpoint as it was.

    A digest of every byte is written with it, and compared before it is used; nothing in a checkpoint is executed.
    """

    def save_checkpoint(self, checkpoint: Checkpoint, path: str | Path, storage_options: object = None) -> None:
        """Save to a local file.

        Raises:
            UserError: It cannot be written; what was there before still is.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            with whole_file(target, sync=True) as partial, partial.open("w+b") as file:
                sealing = SealingFile(file)
                torch.save(checkpoint, cast(IO[bytes], sealing))
                sealing.seal()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise UserError(why_not_saved(target, error)) from None

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> Checkpoint:
        """Load a local file whose every byte is as it was written; tensors and plain values alone.

        Args:
            path: The file.
            map_location: Of files at another address; those on this machine are mapped into its memory.
            weights_only: False is refused: it would run code that the file names.

        Raises:
            UserError: It is missing, damaged, malformed, or asks for code to be run.
        """
        if weights_only is False:
            raise UserError(
                f"{path}: weights_only=False runs code that a checkpoint names; for one of your own that needs it, give"
                " the trainer plugins=[TorchCheckpointIO()]"
            )
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        checkpoint = read_checkpoint(path)
        if KEY in checkpoint and (why := problem(checkpoint)):
            raise UserError(f"{path}: {why} (--ckpt_path)")
        return checkpoint


def why_not_saved(target: Path, error: Exception) -> str:
    """Return the line for a checkpoint that cannot be written."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    try:
        full = full or shutil.disk_usage(target.parent).free < 1 << 20
    except OSError:
        pass
    reason = "the disk is full" if full else " ".join(str(error).split())
    return f"{target}: cannot save the checkpoint: {reason}; earlier ones are intact (--checkpoint.dirpath)"


class BackgroundCheckpointIO(CheckpointIO):
    """Saves and removes in another thread, in the order in which it was asked: what Lightning's ``async`` is here.

    Lightning's own removes the previous checkpoint before the new one is written, so that a run that is killed in
    between has none.

    Args:
        inner: Writes and reads.
    """

    def __init__(self, inner: CheckpointIO) -> None:
        self.inner = inner
        self._executor: ThreadPoolExecutor | None = None
        self._tasks: list[tuple[str, Future[None]]] = []

    def pending(self, path: str | Path) -> bool:
        """Return whether a checkpoint has been saved but is not written yet."""
        return any(name == str(path) and not task.done() for name, task in self._tasks)

    def save_checkpoint(self, checkpoint: Checkpoint, path: str | Path, storage_options: object = None) -> None:
        """Take a copy of the state as it is, in the memory of the host, and write it in the background.

        An earlier one is waited for: there is one copy at a time.

        Raises:
            UserError: An earlier one could not be written.
        """
        self._finish(wait=True)
        copied = _on_host(checkpoint)
        if "://" not in str(path):  # Lightning links `last.ckpt` to it at once, whoever is faster
            with suppress(OSError):  # the writer meets it too, and tells
                Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._submit(path, self.inner.save_checkpoint, copied, path, storage_options)

    def raise_failed(self) -> None:
        """Raise what has failed so far, without waiting."""
        self._finish(wait=False)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint once those saved before are written."""
        self._submit(path, self.inner.remove_checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> Checkpoint:
        """Load a checkpoint once all that was saved is written."""
        self._finish(wait=True)
        return self.inner.load_checkpoint(path, map_location, weights_only)

    def teardown(self) -> None:
        """Wait until everything is written.

        Raises:
            UserError: Something could not be.
        """
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=True)
        self._finish(wait=True)

    def _submit(self, path: str | Path, call: Callable[..., None], *arguments: Any) -> None:
        self._finish(wait=False)
        self._executor = self._executor or ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._tasks.append((str(path), self._executor.submit(call, *arguments)))

    def _finish(self, wait: bool) -> None:
        """Raise what has failed of that which is done."""
        done = [task for _, task in self._tasks if wait or task.done()]
        self._tasks = [(name, task) for name, task in self._tasks if task not in done]
        for task in done:
            task.result()


def _on_host(checkpoint: Checkpoint) -> Checkpoint:
    """Return a copy of a state in the memory of the host; tensors that are one, as tied weights are, stay one."""
    copies: dict[Any, torch.Tensor] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        place = (tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride())
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        return copies[place]

    copied: Checkpoint = apply_to_collection(checkpoint, torch.Tensor, copy)
    return copied


def checkpoint_plugins(plugins: Any, asynchronous: bool = False) -> list[Any]:
    """Return the plugins of a trainer with a checkpoint IO that leaves checkpoints whole; another one stays as it is.

    Args:
        plugins: As the trainer takes them. Lightning's ``AsyncCheckpointIO`` becomes :class:`BackgroundCheckpointIO`.
        asynchronous: Whether a callback wants checkpoints written in the background.

    Raises:
        UserError: It does, and a checkpoint IO is given that writes at once.
    """
    given = [] if plugins is None else list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
    own = [type(plugin).__name__ for plugin in given if isinstance(plugin, CheckpointIO)]
    if not own:
        whole = AtomicCheckpointIO()
        return [*given, BackgroundCheckpointIO(whole) if asynchronous else whole]
    if asynchronous and not any(isinstance(plugin, (AsyncCheckpointIO, BackgroundCheckpointIO)) for plugin in given):
        raise UserError(f"--checkpoint.asynchronous true: {own[0]} of --trainer.plugins writes at once; leave out one")
    return [
        BackgroundCheckpointIO(plugin.checkpoint_io or AtomicCheckpointIO())
        if isinstance(plugin, AsyncCheckpointIO)
        else plugin
        for plugin in given
    ]
