"""Answers without their prompts: what is left of a row for a model that is to say how probable the answer is anyway."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from deft_lightning.atomic import whole_file
from deft_lightning.data.examples import Floats, Ints, Prepared, weight_of
from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX

LOOKED_AT = 500  # examples, spread over the rows, in which prompts are compared
SHARED = 0.9  # of them have in common what is taken for the frame of every prompt


class Frame(NamedTuple):
    """What prompts have in common whatever they ask: it stays when the question is left out.

    Attributes:
        before: Tokens at the start of a row: a beginning of sequence, a system prompt.
        after: Tokens at the end of each prompt: the header of the turn that answers.
    """

    before: int
    after: int


def frame_of(examples: Sequence[Prepared]) -> Frame:
    """Return the frame of the prompts of some examples: as long as nine of ten of them share it, token by token."""
    prompts = [example.input_ids[: first_learnt(example.labels)] for example in examples]
    before = _shared([prompt for prompt in prompts if len(prompt)])
    after = _shared([prompt[::-1] for prompt in prompts if len(prompt)])
    return Frame(before, max(after, 1))  # a first token needs one before it


def frame_of_split(count: int, example: Callable[[int], Prepared]) -> Frame:
    """Return the frame of the prompts of a split, from some of its ``count`` examples, spread over it."""
    looked = min(count, LOOKED_AT)
    return frame_of([example(count * i // looked) for i in range(looked)])


def first_learnt(labels: Ints) -> int:
    """Return the place of the first label that is learnt; their number where none is."""
    learnt = np.flatnonzero(labels != IGNORE_INDEX)
    return int(learnt[0]) if len(learnt) else len(labels)


def _shared(rows: Sequence[Ints]) -> int:
    """Return how many first tokens nine of ten rows have in common."""
    among, length = list(rows), 0
    needed = SHARED * len(rows)
    while among:
        there = [row for row in among if len(row) > length]
        ((token, count),) = Counter(int(row[length]) for row in there).most_common(1) or [(0, 0)]
        if not there or count < needed:
            return length
        among = [row for row in there if row[length] == token]
        length += 1
    return length


def without_prompt(example: Prepared, frame: Frame) -> Prepared | None:
    """Return an example without what its prompts ask: every supervised token is left, in order.

    Of what is not supervised the frame stays: the first ``before`` tokens of the row, and the last ``after`` ones in
    front of each run of supervised tokens.

    Args:
        example: Any example.
        frame: Of the prompts of its kind.

    Returns:
        The example; None where nothing could be left out.
    """
    learnt = example.labels != IGNORE_INDEX
    kept = learnt.copy()
    starts = np.flatnonzero(learnt & ~np.concatenate([[False], learnt[:-1]]))
    for start in starts:
        kept[max(start - frame.after, 0) : start] = True
    kept[: min(frame.before, first_learnt(example.labels))] = True
    if kept.all() or not learnt.any():
        return None
    labels = example.labels[kept]
    return replace(
        example, input_ids=example.input_ids[kept], labels=labels, noise_code=np.zeros_like(labels), clean_labels=None,
        weight=None if example.weight is None else weight_of(labels, example.weight[kept]),
    )  # fmt: skip


class Unprompted(NamedTuple):
    """``log q`` of the labels of a split: how probable the model finds each of them without the prompt.

    Attributes:
        values: Shape ``(labels of all examples,)``, float32, in nats, at most 0.
        starts: Shape ``(examples + 1,)``: where those of each example begin.
    """

    values: NDArray[np.float32]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[Floats]) -> Self:
        """Put the values of examples one after the other."""
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return cls(np.concatenate(rows).astype(np.float32) if len(rows) else np.zeros(0, np.float32), starts)

    def at(self, index: int, labels: Ints) -> Floats:
        """Return the values of an example at its labels, 0 where nothing is learnt; shape ``(T,)``.

        The label of a row's first token is predicted by nothing.

        Raises:
            UserError: They are of other labels.
        """
        values, learnt = np.zeros(len(labels), dtype=np.float32), labels[1:] != IGNORE_INDEX
        own = self.values[self.starts[index] : self.starts[index + 1]]
        if len(own) != learnt.sum():
            raise UserError(f"chance unprompted: {len(own)} values for {learnt.sum()} labels of example {index}")
        values[1:][learnt] = own
        return values

    def save(self, file: Path) -> None:
        """Write them, whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as partial, partial.open("wb") as out:
            np.savez(out, values=self.values, starts=self.starts)

    @classmethod
    def load(cls, file: Path, examples: int) -> Self | None:
        """Return what is kept for a number of examples; None where nothing is, or something else."""
        try:
            with np.load(file, allow_pickle=False) as kept:
                values, starts = kept["values"], kept["starts"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None
        fits = values.dtype == np.float32 and starts.dtype == np.int64 and starts.shape == (examples + 1,)
        fits = fits and starts[0] == 0 and starts[-1] == len(values) and bool((np.diff(starts) >= 0).all())
        return cls(values, starts) if fits and bool((np.isfinite(values) & (values <= 0)).all()) else None
