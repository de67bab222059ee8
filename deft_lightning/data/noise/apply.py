"""The operations of a noise applied: to the responses of examples, and to their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_warn

from deft_lightning.data.examples import Example, Prepared
from deft_lightning.data.lazy import Lazy, Made
from deft_lightning.data.noise.base import Noise, ResponseNoise, TokenNoise
from deft_lightning.data.noise.edits import Mark, apply_edits
from deft_lightning.data.noise.vocabulary import Vocabulary
from deft_lightning.functional import IGNORE_INDEX


@dataclass(frozen=True)
class Applied:
    """What an operation on responses did to a split.

    Attributes:
        name: Class of the operation.
        rate: Share of the examples it was asked for.
        eligible: Examples that were open to it: they end with a response and are not trusted.
        changed: Those whose response it changed. Less than the rate where it found nothing to corrupt.
    """

    name: str
    rate: float
    eligible: int
    changed: int

    def __str__(self) -> str:
        """Return a part of the line for the log."""
        return f"{self.name}: {self.changed / max(self.eligible, 1):.1%} of {self.eligible:,} examples changed"


Changed = dict[int, tuple[Example, list[Mark]]]


def corrupted(examples: Lazy[Example] | Sequence[Example], noise: Noise) -> tuple[Changed, list[Applied]]:
    """Apply the operations on responses.

    Memory holds the ids of the examples, and those that are changed.

    Returns:
        The examples that are changed, by position, each with the letters of its response that are noise; and what each
        operation did.
    """
    changed: Changed = {}
    applied: list[Applied] = []
    if not any(isinstance(op, ResponseNoise) for op in noise.ops):
        return changed, applied
    open_to, ids, responses = [], [], 0
    for i, example in enumerate(examples):
        if example.response is not None:
            responses += 1
            if not noise.trusts(example.id):
                open_to.append(i)
                ids.append(example.id)

    def now(position: int) -> Example:
        i = open_to[position]
        return changed[i][0] if i in changed else examples[i]

    answers = Made(len(ids), lambda position: now(position).response or "")
    asked = Made(len(ids), lambda position: _last_user_turn(now(position)))
    for number, (op, salt) in enumerate(zip(noise.ops, noise.salts(), strict=True), 1):
        if not isinstance(op, ResponseNoise):
            continue
        name, count = type(op).__name__, 0
        if not responses:
            rank_zero_warn(f"{name} does nothing: no example ends with a response (--data.noise.ops)")
        fresh: Changed = {}
        for position, edits in op.edits(
            salt, ids, cast("Sequence[str]", answers), cast("Sequence[str]", asked)
        ).items():
            i, before = open_to[position], now(position)
            old = before.response or ""
            answer, moved = apply_edits(old, edits, number, changed[i][1] if i in changed else [])
            if answer == old:
                continue
            end = [Mark(len(answer), len(answer), number)] if op.whole else []
            marks = [*(mark for mark in moved if not end or mark.start < len(answer)), *end]
            last = (before.messages or ())[-1]  # what else it says, such as its weight, stays
            fresh[i] = replace(before, messages=(*before.prompt, {**last, "content": answer})), marks
            count += 1
        changed.update(fresh)
        applied.append(Applied(name, op.rate, len(open_to), count))
        if not count and op.rate * len(open_to) > 20:  # by chance once in a hundred million times
            rank_zero_warn(
                f"{name} changed none of {len(open_to)} responses: none holds what it looks for (--data.noise.ops)"
            )
    # An operation may have restored what an earlier one broke.
    return {i: new for i, new in changed.items() if new[0].messages != examples[i].messages}, applied


def corrupt_responses(
    examples: Sequence[Example], noise: Noise
) -> tuple[list[Example], list[list[Mark]], list[Applied]]:
    """Apply the operations on responses to examples in memory.

    Returns:
        The examples; of each, which letters of its response are noise, empty where it is clean; and what each
        operation did.
    """
    changed, applied = corrupted(examples, noise)
    pairs = [changed.get(i, (example, [])) for i, example in enumerate(examples)]
    return [example for example, _ in pairs], [marks for _, marks in pairs], applied


def _last_user_turn(example: Example) -> str:
    return next((turn["content"] for turn in reversed(example.prompt) if turn["role"] == "user"), "")


def corrupt_tokens(prepared: Sequence[Prepared], noise: Noise, words: Vocabulary, epoch: int = 0) -> list[Prepared]:
    """Apply the operations on single tokens, as they are in an epoch."""
    return [corrupt_example(example, noise, words, epoch) for example in prepared]


def corrupt_example(example: Prepared, noise: Noise, words: Vocabulary, epoch: int = 0) -> Prepared:
    """Apply the operations on single tokens, as they are in an epoch, to one example."""
    if noise.trusts(example.id):
        return example
    at = np.flatnonzero(example.labels != IGNORE_INDEX)
    ids, labels, codes = example.input_ids.copy(), example.labels.copy(), example.noise_code.copy()
    for number, (op, salt) in enumerate(zip(noise.ops, noise.salts(), strict=True), 1):
        if not isinstance(op, TokenNoise):
            continue
        before = labels[at]
        wrong = op.at_epoch(epoch).corrupt_tokens(salt, example.id, before, words, example.skipped)
        hit = at[wrong != before]
        labels[hit] = wrong[wrong != before]
        # An earlier operation may have broken what this one restores; a swapped response stays wrong.
        codes[hit] = np.where(labels[hit] == example.labels[hit], example.noise_code[hit], number)
        if op.target == "text":
            ids[hit] = labels[hit]
    clean = np.where(example.noise_code == 0, example.labels, IGNORE_INDEX)
    return replace(example, input_ids=ids, labels=labels, noise_code=codes, clean_labels=clean)
