"""Where the digits of a number stand in a text, apart from sign, currency, denominator and unit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

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
