"""What the conflict of a file consists of, and whether the model knows enough to judge its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deft_lightning.annotations import JsonObject
from deft_lightning.functional import IGNORE_INDEX
from deft_lightning.probe.scores import SUSPICIOUS, Scored, Tokens

NAMED = 3  # texts that are named
SHARE = 0.03  # of the conflict that a text needs to be named
COMMON = 0.5  # share of the rows that have a text, and of its places where the model objects, that make it format
LOOKED_AT = 500  # rows, spread over those that were read, whose numbers are looked at
EXPECTED = 0.5  # share of new numbers that the model has to expect to be a judge of them
ENOUGH = 20  # new numbers from which on that is told


def knowledge(
    data: Any, split: str, positions: Sequence[int], scored: Scored, text: Callable[[int], str]
) -> JsonObject:
    """Return what the conflict of the rows consists of, and what the model knows of their numbers.

    Args:
        data: InstructionDataModule, set up.
        split: Whose examples.
        positions: Of those that were read, in the order of the split.
        scored: Their tokens.
        text: Of a token.

    Returns:
        ``format``: the texts that most of the conflict falls on, if most rows have them and the model expects them in
        hardly any; ``format_share``: their share of the squared conflict; ``numbers``: how many numbers of answers the
        text has not said before; ``numbers_expected``: the share of them that are the model's first choice, None
        without any.
    """
    tokens = scored.tokens
    squares = np.bincount(tokens.target, tokens.conflict**2)
    named = [int(target) for target in np.argsort(-squares, kind="stable")[:NAMED] if _is_format(tokens, int(target))]
    named = [target for target in named if squares[target] >= SHARE * squares.sum()]
    expected: list[bool] = []
    ends = np.cumsum(tokens.counts)
    for place in range(0, len(positions), max(1, len(positions) // LOOKED_AT)):
        example = data.example(split, positions[place])
        learnt = example.labels != IGNORE_INDEX
        learnt[0] = False
        right = np.zeros(len(learnt), bool)
        right[learnt] = tokens.correct[ends[place] - tokens.counts[place] : ends[place]]
        said = np.where(learnt, example.labels, example.input_ids).tolist()
        expected += new_numbers([text(token) for token in said], learnt.tolist(), right.tolist())
    return {
        "format": [text(target) for target in named],
        "format_share": float(squares[named].sum() / squares.sum()) if named else 0.0,
        "numbers": len(expected), "numbers_expected": float(np.mean(expected)) if expected else None,
    }  # fmt: skip


def _is_format(tokens: Tokens, target: int) -> bool:
    """Return whether most rows have a token and the model expects it in hardly any place: text it does not write."""
    own = tokens.target == target
    rows = len(np.unique(tokens.row[own]))
    return rows >= COMMON * len(tokens.counts) and float((tokens.conflict[own] >= SUSPICIOUS).mean()) >= COMMON


def new_numbers(texts: Sequence[str], learnt: Sequence[bool], expected: Sequence[bool]) -> list[bool]:
    """Return, for each number of an answer that the text has not said before, whether the model expects all of it.

    Such a number is computed, or a slip: what a model knows of arithmetic shows there alone, since the others can be
    copied.

    Args:
        texts: Of the tokens of an example.
        learnt: Whether each is supervised.
        expected: Whether it is the model's first choice; anything where it is not supervised.
    """
    said: set[str] = set()
    results: list[bool] = []
    digits, right, own = "", True, True
    for text, is_learnt, is_expected in [*zip(texts, learnt, expected, strict=True), (" ", False, False)]:
        if text.strip().isdecimal() and not (digits and text[:1].isspace()):
            digits += text.strip()
            right, own = right and is_expected, own and is_learnt
            continue
        if digits:
            if own and digits not in said:
                results.append(right)
            said.add(digits)
            digits, right, own = "", True, True
            if text.strip().isdecimal():
                digits, right, own = text.strip(), is_expected, is_learnt
    return results


def knowledge_text(record: JsonObject) -> list[str]:
    """Return what a report says of both, a paragraph each."""
    lines = []
    if record["format"]:
        named = ", ".join(f"`{text}`" for text in record["format"])
        lines.append(
            f"conflict: {record['format_share']:.0%} of it is {named}: a format that this model does not write; the"
            " score leaves out what rows share"
        )
    if record["numbers"] >= ENOUGH:
        share = record["numbers_expected"]
        about = (
            f"numbers: the model expects {share:.0%} of the {record['numbers']} numbers that a row has not said before"
        )
        if share < EXPECTED:
            about += ": it knows too little to judge rows by their numbers; solutions that go wrong on the way pass"
        lines.append(about)
    return lines
