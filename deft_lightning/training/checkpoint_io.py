"""Checkpoint files that are there whole or not at all, and of which nothing is executed."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from deft_lightning.atomic import whole_file
from deft_lightning.errors import UserError
from deft_lightning.models import read_checkpoint
from deft_lightning.models.contents import KEY, problem
from deft_lightning.models.seal import SealingFile


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes under another name, then renames: a save that is cut short leaves the previous checkpoint as it was.

    A digest of every byte is written with it, and compared before it is used; nothing in a checkpoint is executed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
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
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
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
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    try:
        full = full or shutil.disk_usage(target.parent).free < 1 << 20
    except OSError:
        pass
    reason = "the disk is full" if full else " ".join(str(error).split())
    return f"{target}: cannot save the checkpoint: {reason}; earlier ones are intact (--checkpoint.dirpath)"
