"""What a pass has read so far, on disk: a probe that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from deft_lightning.annotations import Batch
from deft_lightning.atomic import remove, whole_file
from deft_lightning.functional import TokenStats

FOLDER = "unfinished"  # beside the report, until it is written
WAIT = 10.0  # seconds between two files
SHARE = 0.02  # of a pass after which a file is written whatever the time, so that there are some fifty of short ones
Fields = dict[str, Tensor]


class KeptPass:
    """The results of the batches of one pass, in their order; those that are there already need not be computed.

    Args:
        folder: Where they lie, a few batches a file; None keeps nothing.
        name: Of the pass.
        tokens: Of all its batches; a fiftieth of them is a file's worth.
    """

    def __init__(self, folder: Path | None, name: str, tokens: int) -> None:
        self.folder, self.name, self._worth = folder, name, SHARE * tokens
        self._next = self._waiting_tokens = 0
        self._waiting: list[dict[str, np.ndarray[Any, Any]]] = []
        self._written = time.monotonic()
        self._there: list[dict[str, np.ndarray[Any, Any]]] = [] if folder is None else self._load(folder)

    def _file(self, first: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.name}-{first:08d}.npz"

    def _load(self, folder: Path) -> list[dict[str, np.ndarray[Any, Any]]]:
        """Read the files that follow each other; one that is damaged ends them."""
        batches: list[dict[str, np.ndarray[Any, Any]]] = []
        while self._file(len(batches)).exists():
            try:
                with np.load(self._file(len(batches)), allow_pickle=False) as file:
                    parts: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
                    for key in file.files:
                        number, _, field = key.partition("/")
                        parts.setdefault(number, {})[field] = file[key]
            except (OSError, ValueError, EOFError, BadZipFile):
                break
            if not parts:
                break
            batches += [parts[number] for number in sorted(parts, key=int)]
        return batches

    @property
    def batches(self) -> int:
        """Return how many batches are there."""
        return len(self._there)

    def take(self, batch: Batch) -> Fields | None:
        """Return what is kept of the next batch; None where it has to be computed, and given to :meth:`add`.

        Args:
            batch: The next one: what is kept of other rows is not its result.
        """
        at, self._next = self._next, self._next + 1
        if at >= len(self._there):
            return None
        fields = self._there[at]
        if bytes(fields["of"]) != digest(batch):
            del self._there[at:]
            return None
        self._there[at] = {}  # it is asked for once
        return {name: torch.from_numpy(values) for name, values in fields.items() if name != "of"}

    def add(self, batch: Batch, fields: Mapping[str, Tensor]) -> None:
        """Keep the result of a batch that :meth:`take` did not have."""
        if self.folder is None:
            return
        own = {name: values.cpu().numpy() for name, values in fields.items()}
        self._waiting.append({"of": np.frombuffer(digest(batch), np.uint8), **own})
        self._waiting_tokens += batch["input_ids"].numel()
        if self._waiting_tokens >= self._worth or time.monotonic() - self._written >= WAIT:
            self.write()

    def write(self) -> None:
        """Write what waits."""
        if self.folder is None or not self._waiting:
            return
        first = self._next - len(self._waiting)
        arrays: Any = {f"{i}/{field}": values for i, one in enumerate(self._waiting) for field, values in one.items()}
        with whole_file(self._file(first)) as partial, partial.open("wb") as out:
            np.savez(out, **arrays)
        self._waiting, self._waiting_tokens, self._written = [], 0, time.monotonic()


class Kept:
    """The passes of a probe on disk, while it is unfinished.

    Args:
        output: Folder of the report; None keeps nothing.
        about: What the results depend on beside the rows themselves: model, precision, what is asked of it.
    """

    def __init__(self, output: Path | None, about: object = None) -> None:
        self.folder = None if output is None else output / FOLDER
        if self.folder is None:
            return
        mark = json.dumps(hashlib.sha256(repr(about).encode()).hexdigest())
        file = self.folder / "of.json"
        if self.folder.exists() and (not file.exists() or file.read_text(encoding="utf-8") != mark):
            rank_zero_info("probe: an unfinished probe of another model or with other options is there; starting over")
            remove(self.folder)
        with whole_file(file) as partial:
            partial.write_text(mark, encoding="utf-8")

    def of(self, name: str, tokens: int) -> KeptPass:
        """Return a pass of so many tokens, and say it where some of it was done before."""
        kept = KeptPass(self.folder, name, tokens)
        if kept.batches:
            rank_zero_info(f"probe: resuming a stopped probe: {kept.batches} batches ({name}) are done already")
        return kept


def digest(batch: Batch) -> bytes:
    """Return a digest of what a batch asks of a model."""
    hashed = hashlib.blake2b(digest_size=16)
    for name in ("input_ids", "labels", "token_weight", "unprompted"):
        if name in batch:
            hashed.update(batch[name].contiguous().numpy().tobytes() + bytes(str(batch[name].shape), "ascii"))
    return hashed.digest()


def fields_of(by_topk: Mapping[int, TokenStats]) -> Fields:
    """Return the statistics of a batch, by what their ``topk_entropy`` covers, as one flat dictionary."""
    return {
        f"{k}:{name}": field
        for k, stats in by_topk.items()
        for name, field in stats._asdict().items()
        if field is not None
    }


def stats_of(fields: Fields) -> dict[int, TokenStats]:
    """Return what :func:`fields_of` made flat."""
    by_topk: dict[int, dict[str, Tensor]] = {}
    for key, field in fields.items():
        k, _, name = key.partition(":")
        by_topk.setdefault(int(k), {})[name] = field
    return {k: TokenStats(**named) for k, named in by_topk.items()}
