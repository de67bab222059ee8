"""Where a response says its final answer, and wrong numbers that look like the right one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from deft_lightning.data.noise.edits import Edit

_MINUS = "\u2212-"  # as mathematicians and as keyboards write it
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"
# A fraction is one number, and its numerator is what changes: another denominator of 0 would still be 0. A digit right
# behind a letter is part of a name (H2O, x_1).
_NUMBER = (
    rf"\\[dt]?frac\s*\{{\s*(?P<minus>[{_MINUS}]?)(?P<latex>{_INTEGER})\s*\}}\s*\{{\s*{_INTEGER}\s*\}}"
    rf"|(?<![A-Za-z_0-9])(?P<plain>{_DECIMAL})(?P<over>\s*/\s*{_DECIMAL})?"
)
NUMBER = re.compile(_NUMBER)
# A number and what may stand around it: sign, currency, percent, degrees, a unit as LaTeX text.
LONE_NUMBER = re.compile(
    rf"(?:[\s$€£¥+{_MINUS}]|\\\$)*(?:{_NUMBER})"
    r"(?:[\s$.€£¥%]|\\[%$,!; ]|\^\{?\\circ\}?|\\(?:text|mbox|mathrm)\{[^{}]*\})*"
)
BOXED = re.compile(r"\\boxed\s*\{")
HASHES = re.compile(r"####[ \t]*(?P<answer>[^\n]*)")
LONGEST = 400  # Digits of a number that is still handled; more is no answer, and int() refuses thousands.


class Number(NamedTuple):
    """Digits ``[start, end)`` of a text, with separators and decimal point, without sign.

    Attributes:
        start: First letter.
        end: Behind the last one.
        nonzero: The digits must not become all zeros: ``-0`` and ``0/4`` are odd, and the last may equal another.
    """

    start: int
    end: int
    nonzero: bool


def numbers(text: str, start: int = 0, end: int | None = None) -> Iterator[Number]:
    """Yield the numbers of a text from left to right; a fraction counts once, by its numerator."""
    for hit in NUMBER.finditer(text, start, len(text) if end is None else end):
        yield _number(text, hit)


def lone_number(text: str, start: int, end: int) -> Number | None:
    """Return the number that ``text[start:end]`` is, apart from sign, currency and unit; None if it is more."""
    hit = LONE_NUMBER.fullmatch(text, start, end)
    return _number(text, hit) if hit else None


def _number(text: str, hit: re.Match[str]) -> Number:
    group = "latex" if hit["latex"] else "plain"
    start, end = hit.span(group)
    before = text[max(start - 3, 0) : start].rstrip(" $€£¥\\")
    return Number(start, end, bool(hit["over"] or hit["latex"]) or before[-1:] in tuple(_MINUS))


def boxed(text: str) -> list[tuple[int, int]]:
    r"""Return what each ``\boxed{...}`` holds, in order; one that is never closed holds the rest and ends in -1."""
    found = []
    for opening in BOXED.finditer(text):
        depth, at = 1, opening.end()
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 2 if text[at] == "\\" else 1
        found.append((opening.end(), at - 1 if not depth else -1))
    return found


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
    whole, point, decimals = digits.partition(".")
    scale = 10 ** len(decimals)
    bare = whole.replace(",", "")
    size = int((bare + decimals) or "0")
    largest = max(3, size // scale // 5)
    # Numbers beyond 64 bits move in their leading digits.
    unit = 10 ** max(len(str(largest)) - 18, 0)
    step = int(draws.integers(1, largest // unit + 1)) * unit * scale
    moved = size - step if draws.random() < 0.5 else size + step
    if moved < 0 or (moved == 0 and nonzero):
        moved = size + step
    left, right = divmod(moved, scale)
    written = f"{left:,}" if "," in whole else str(left).zfill(len(bare) if bare.startswith("0") else 0)
    return written + point + (str(right).zfill(len(decimals)) if decimals else "")


def difference(old: str, new: str, at: int) -> list[Edit]:
    """Return the edits that make ``new`` of ``old``, which stands at ``at``: place by place if they are as long."""
    if len(old) == len(new):
        return [Edit(at + i, at + i + 1, b) for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    same = 0
    while same < min(len(old), len(new)) and old[same] == new[same]:
        same += 1
    return [Edit(at + same, at + len(old), new[same:])]
