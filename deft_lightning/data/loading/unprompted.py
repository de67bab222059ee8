"""Answers without their prompts: what is left of a row for a model that is to say how probable the answer is anyway."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from deft_lightning.data.examples import Ints, Prepared, weight_of
from deft_lightning.functional import IGNORE_INDEX

LOOKED_AT = 500  # examples in which prompts are compared
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
