"""Folds of the rows that a probe reads: which rows a training leaves out, and in which steps it learns the others."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deft_lightning.data.examples import Ints, Prepared
from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX
from deft_lightning.hashing import key, stream
from deft_lightning.probe.reading import SPLIT

ROWS = 4  # of an optimizer step


class Fold(NamedTuple):
    """Rows that are left out of a training, and the others, by position in the training split."""

    number: int
    of: int
    positions: list[int]
    others: list[int]

    @property
    def title(self) -> str:
        """Return how its lines begin."""
        return f"probe: fold {self.number} of {self.of}"

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps of its training."""
        return -(-len(self.others) // ROWS)


def folds_of(data: Any, positions: Sequence[int], count: int) -> list[Fold]:
    """Return folds of about the same number of rows, whatever the order of the rows.

    Rows with the same prompt share a fold: the answer to one of them would tell that of the other. Where more rows than
    a fold has have one prompt, it is no question of theirs, and rows of the same text share a fold.

    Raises:
        UserError: There are fewer rows, or fewer different ones, than folds.
    """
    if count > len(positions):
        raise UserError(f"probe: --folds {count}: only {len(positions)} rows are read (--examples, --data.source)")
    rows = [data.example(SPLIT, at) for at in positions]
    digests = [key(_prompt(row).tobytes().hex()) for row in rows]
    if max(Counter(digests).values()) * count > len(rows):
        digests = [key(row.input_ids.tobytes().hex()) for row in rows]
    alike: dict[int, list[int]] = {}
    for at, digest in zip(positions, digests, strict=True):
        alike.setdefault(digest, []).append(at)
    if len(alike) < count:
        raise UserError(f"probe: --folds {count}: only {len(alike)} of the {len(rows)} rows differ from each other")
    folds: list[list[int]] = [[] for _ in range(count)]
    for digest in sorted(alike):
        min(folds, key=len).extend(alike[digest])
    return [
        Fold(number, count, sorted(own), sorted(at for other in folds if other is not own for at in other))
        for number, own in enumerate(folds, start=1)
    ]


def _prompt(row: Prepared) -> Ints:
    learnt = np.flatnonzero(row.labels != IGNORE_INDEX)
    return row.input_ids[: int(learnt[0])] if len(learnt) else row.input_ids


def digest_of(data: Any, positions: Sequence[int]) -> str:
    """Return a digest of what some rows of the training split teach."""
    hashed = hashlib.blake2b(digest_size=16)
    for at in positions:
        row = data.example(SPLIT, at)
        for values in (row.input_ids, row.labels, row.weight):
            hashed.update(b"" if values is None else values.tobytes())
    return hashed.hexdigest()


def steps_of(data: Any, fold: Fold) -> list[list[int]]:
    """Return the rows of each optimizer step: of like length, in an order drawn by the number of the fold."""
    lengths = data.splits[SPLIT].examples.lengths()
    rows = sorted(fold.others, key=lambda at: int(lengths[at]))
    steps = [rows[first : first + ROWS] for first in range(0, len(rows), ROWS)]
    return [steps[i] for i in stream("fold", fold.number).permutation(len(steps))]
