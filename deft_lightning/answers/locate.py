r"""Where a text says its final answer: in the last ``\boxed{}``, behind the last ``####``, or the last number.

Graders read the answer, label noise changes it or keeps it. Time is linear in the length of the text, whatever it
holds; for a grader an answer of more than 500 letters is none.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LONGEST = 500  # letters of an answer; the longest of MATH500 has 53
TAIL = 10_000  # letters at the end of a completion among which the last number is sought
BOXED = re.compile(r"\\boxed\s*\{")
HASHES = re.compile(r"####[ \t]*(?P<answer>[^\n]*)")
_BOX = re.compile(r"\\f?box(?:ed)?[ \t]*\{")
_BARE = re.compile(r"\\boxed[ \t]*(?P<answer>[^\s{}$\\]{1,100})")
# Sign, digits with or without thousands, decimals, and a denominator; a digit right behind a letter is part of a name.
_NUMBER = re.compile(
    r"(?<![\w.])(?:(?<![\d)])[-\u2212])?[$€£]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:/\d+|[eE][-+]?\d{1,3}\b)?"
)


class Box(NamedTuple):
    r"""A box of a text.

    Attributes:
        command: Where its command begins, the backslash.
        start: The first letter of its content.
        end: Behind the last one; -1 where the box is never closed.
    """

    command: int
    start: int
    end: int


def boxes(text: str) -> list[Box]:
    r"""Return every box in order of its command: ``\boxed{...}``, ``\fbox{...}`` and ``\boxed 7``."""
    openings = {hit.end(): hit.start() for pattern in (BOXED, _BOX) for hit in pattern.finditer(text)}
    ends = _closings(text) if openings else {}
    braced = [Box(command, start, ends.get(start, -1)) for start, command in openings.items()]
    return sorted([*braced, *map(_bare, _BARE.finditer(text))])


def answer_box(text: str) -> Box | None:
    r"""Return the box whose content label noise takes for the answer: the last ``\boxed{...}``.

    Where there is none, the box that a grader reads.
    """
    hits = list(BOXED.finditer(text))
    return _braced(text, hits[-1]) if hits else last_box(text)


def last_box(text: str) -> Box | None:
    r"""Return the box that a grader reads: the last ``\boxed{...}``, ``\fbox{...}`` or ``\boxed 7``.

    Of boxes within each other the innermost counts.
    """
    at = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if at < 0:
        return None
    if opening := _BOX.match(text, at):
        return _braced(text, opening, LONGEST)
    bare = _BARE.match(text, at)
    return _bare(bare) if bare else None


def boxed(text: str) -> str | None:
    r"""Return what the last ``\boxed{...}`` or ``\fbox{...}`` holds; None if it is empty, never closed, or not there.

    Of boxes within each other the innermost counts. ``\boxed 7`` is a box too.
    """
    box = last_box(text)
    return None if box is None or box.end < 0 else text[box.start : box.end].strip() or None


def _bare(hit: re.Match[str]) -> Box:
    start = hit.start("answer")
    return Box(hit.start(), start, start + len(hit["answer"].rstrip(".,;:!")))


def _closings(text: str) -> dict[int, int]:
    """Return for what each brace opens where it is closed; in one pass, for boxes may lie within each other."""
    ends: dict[int, int] = {}
    opened: list[int] = []
    at = 0
    while at < len(text):
        if text[at] == "{":
            opened.append(at + 1)
        elif text[at] == "}" and opened:
            ends[opened.pop()] = at
        at += 2 if text[at] == "\\" else 1
    return ends


def _braced(text: str, opening: re.Match[str], most: int | None = None) -> Box:
    """Return the box behind an opening brace, closed within ``most`` letters; a brace behind a backslash is a sign."""
    depth, at = 1, opening.end()
    last = len(text) if most is None else min(len(text), at + most + 1)
    while at < last and depth:
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        at += 2 if text[at] == "\\" else 1
    return Box(opening.start(), opening.end(), at - 1 if not depth else -1)


def hashed(text: str) -> str | None:
    """Return what stands behind the last ``####`` on its line, as GSM8K writes answers."""
    at = text.rfind("####")
    if at < 0:
        return None
    end = text.find("\n", at)
    answer = text[at + 4 : len(text) if end < 0 else end]
    return answer.strip(" \t*#").rstrip(".") or None if len(answer) <= LONGEST else None


def last_number(text: str) -> str | None:
    """Return the last number, with sign, decimals and denominator, of the last 10,000 letters."""
    match = None
    for match in _NUMBER.finditer(text[-TAIL:]):  # noqa: B007 - the last one is wanted
        pass
    return match[0] if match and len(match[0]) <= LONGEST else None
