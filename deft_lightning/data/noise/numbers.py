"""Wrong numbers that look like the right one."""

from __future__ import annotations

import numpy as np

from deft_lightning.answers.digits import Number
from deft_lightning.data.noise.edits import Edit

LONGEST = 400  # Digits of a number that is still handled; more is no answer, and int() refuses thousands.


def other_digits(text: str, places: list[int], number: Number | None, draws: np.random.Generator) -> list[Edit]:
    """Change one or more of the digits at ``places``: same length, same separators, never the same digit.

    The first digit of several does not become 0, nor does the only one of a number that must not be zero.
    """
    first = int(draws.integers(len(places)))
    also = draws.random(len(places)) < 0.25
    edits = []
    for i, place in enumerate(places):
        if i != first and not also[i]:
            continue
        leads = not (place and (text[place - 1].isdigit() or text[place - 1] in ".,"))
        lonely = not text[place + 1 : place + 2].isdigit() and text[place + 1 : place + 2] != ","
        no_zero = leads and (not lonely or (number is not None and number.nonzero))
        choices = [d for d in "0123456789" if d != text[place] and not (d == "0" and no_zero)]
        edits.append(Edit(place, place + 1, choices[int(draws.integers(len(choices)))]))
    return edits


def offset(digits: str, nonzero: bool, draws: np.random.Generator) -> str:
    """Return the number moved by a whole number up to a fifth of its size (at least 3), written in the same way.

    The sign stays outside: what would cross zero goes the other way.
    """
    integer, point, decimals = digits.partition(".")
    scale = 10 ** len(decimals)
    bare = integer.replace(",", "")
    size = int((bare + decimals) or "0")
    largest = max(3, size // scale // 5)
    # Numbers beyond 64 bits move in their leading digits.
    unit = 10 ** max(len(str(largest)) - 18, 0)
    step = int(draws.integers(1, largest // unit + 1)) * unit * scale
    moved = size - step if draws.random() < 0.5 else size + step
    if moved < 0 or (moved == 0 and nonzero):
        moved = size + step
    left, right = divmod(moved, scale)
    written = f"{left:,}" if "," in integer else str(left).zfill(len(bare) if bare.startswith("0") else 0)
    return written + point + (str(right).zfill(len(decimals)) if decimals else "")


def difference(old: str, new: str, at: int) -> list[Edit]:
    """Return the edits that make ``new`` of ``old``, which stands at ``at``: place by place if they are as long."""
    if len(old) == len(new):
        return [Edit(at + i, at + i + 1, b) for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    same = 0
    while same < min(len(old), len(new)) and old[same] == new[same]:
        same += 1
    return [Edit(at + same, at + len(old), new[same:])]
