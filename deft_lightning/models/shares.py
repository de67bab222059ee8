"""Checkpoints that are a folder of shares, read without running anything that is written in them.

torch's own reader unpickles ``.metadata`` and the entries that are no tensors as they are, so that a folder from a
stranger runs code. Here the first admits the classes of torch's metadata alone, the second what
``torch.load(weights_only=True)`` admits, and what the metadata says must fit the files that are there.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections import OrderedDict
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.planner import ReadItem

from deft_lightning.errors import UserError

SHARED = "meta.pt"  # what is neither weights nor optimizer; the name is Lightning's
METADATA = ".metadata"
WEIGHTS = "state_dict."

_CLASSES: dict[tuple[str, str], Any] = {
    (cls.__module__, cls.__qualname__): cls
    for cls in (
        metadata.Metadata, metadata.MetadataIndex, metadata.TensorStorageMetadata, metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata, metadata.TensorProperties, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING,
        _StorageInfo, _StoragePrefix, OrderedDict,
    )
}  # fmt: skip
# Where it was saved, which nothing here reads: as a path that can be made on every system.
_CLASSES |= {
    (module, name): PurePosixPath
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
}
_CLASSES[("torch", "Size")] = torch.Size
_CLASSES[("torch.serialization", "_get_layout")] = torch.serialization._get_layout


class _Unpickler(pickle._Unpickler):
    """Makes nothing but torch's metadata; dtypes are names in torch.

    The one in Python, not the one in C, which sets aside as much memory as a number in the file says.
    """

    stack: list[Any]

    def load_build(self) -> None:
        """Give an object its state; what is no instance, such as a class, would keep it beyond this file."""
        if len(self.stack) > 1 and not type(self.stack[-2]).__module__.startswith(
            ("torch.distributed.", "collections")
        ):
            raise pickle.UnpicklingError("it changes something outside a checkpoint's metadata")
        super().load_build()  # type: ignore[misc]

    dispatch: ClassVar[dict[int, Any]] = {
        **{code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]},
        pickle.BUILD[0]: load_build,
    }

    def find_class(self, module: str, name: str) -> Any:
        cls = _CLASSES.get((module, name))
        if cls is None and module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if cls is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of a checkpoint's metadata")
        return cls


def read_metadata(folder: Path) -> metadata.Metadata:
    """Return what a folder of shares holds, checked against the files that are there.

    Raises:
        UserError: It is no metadata, asks for other classes, or does not fit the files.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            meta = _Unpickler(file).load()
        _check(meta, folder)
    except UserError:
        raise
    except Exception as error:  # a pickle may fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read: {reason} (--ckpt_path)") from None
    return meta


def _check(meta: Any, folder: Path) -> None:
    """Refuse metadata that is not made of the parts it should be, or leads out of its folder."""
    if not isinstance(meta, metadata.Metadata):
        raise pickle.UnpicklingError("it is not metadata")
    if not isinstance(meta.state_dict_metadata, dict) or not isinstance(meta.storage_data, dict):
        raise pickle.UnpicklingError("it lists nothing")
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file() and not file.is_symlink()}
    for entry in meta.storage_data.values():
        if not isinstance(entry, _StorageInfo):
            raise pickle.UnpicklingError("an entry is of an unknown kind")
        name, start, length = entry.relative_path, entry.offset, entry.length
        if name not in sizes:
            raise UserError(f"{folder}: its metadata names {name!r}, which is not in the folder (--ckpt_path)")
        if not all(isinstance(number, int) and number >= 0 for number in (start, length)):
            raise pickle.UnpicklingError("an offset is not a number")
        if start + length > sizes[name]:
            raise UserError(f"{folder / name}: has been cut short (--ckpt_path)")
        if entry.transform_descriptors:
            raise UserError(f"{folder / name}: is compressed, which is not supported (--ckpt_path)")
    total_bytes = sum(sizes.values())
    for name, entry in meta.state_dict_metadata.items():
        if not isinstance(name, str):
            raise pickle.UnpicklingError("a name is not text")
        if isinstance(entry, metadata.TensorStorageMetadata):
            size, dtype = entry.size, entry.properties.dtype
            if not isinstance(size, torch.Size) or not isinstance(dtype, torch.dtype):
                raise pickle.UnpicklingError(f"{name} has no size")
            if prod(size) * dtype.itemsize > total_bytes:
                raise UserError(f"{folder}: its metadata gives {name} the size {tuple(size)}, more than all its files")
        elif not isinstance(entry, metadata.BytesStorageMetadata):
            raise pickle.UnpicklingError(f"{name} is of another kind")


class ShareReader(FileSystemReader):
    """torch's reader of shares with metadata that is checked.

    Args:
        folder: The checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """Return the metadata; torch's own would unpickle whatever is in it."""
        meta = read_metadata(self._folder)
        meta.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return meta


class SharePlanner(DefaultLoadPlanner):
    """torch's planner; entries that are no tensors are read as plain values alone."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put an entry that is no tensor where it belongs, read by ``weights_only``."""
        plain = io.BytesIO()
        torch.save(torch.load(value, map_location="cpu", weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the whole weights that many ranks have written, without a process group.

    Raises:
        UserError: The folder's metadata or a share is not what it should be.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    meta = read_metadata(folder)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in meta.state_dict_metadata.items()
        if name.startswith(WEIGHTS) and isinstance(entry, metadata.TensorStorageMetadata)
    }
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single.*")
            load(state, storage_reader=ShareReader(folder), planner=planner, no_dist=True)
    except (Exception, CheckpointException) as error:  # torch's is a BaseException
        raise UserError(f"{folder}: a shard cannot be read: {innermost(error)} (--ckpt_path)") from None
    return {name.removeprefix(WEIGHTS): value for name, value in state.items()}


def innermost(error: BaseException) -> str:
    """Return the reason of an error that torch may have wrapped, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        first: Any = next(iter(error.failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    if isinstance(error, pickle.UnpicklingError):
        return "it holds an object that is not a plain value, and loading it would run code"
    return " ".join(str(error).split()) or type(error).__name__
