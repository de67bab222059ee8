r"""Where a completion says its final answer: in the last ``\boxed{}``, behind the last ``####``, or the last number.

Time is linear in the length of the text, whatever it holds, and an answer of more than 500 letters is none.
"""

from __future__ import annotations

import re

LONGEST = 500  # letters of an answer; the longest of MATH500 has 53
TAIL = 10_000  # letters at the end of a completion among which the last number is sought
_BOX = re.compile(r"\\f?box(?:ed)?[ \t]*\{")
_BARE = re.compile(r"\\boxed[ \t]*([^\s{}$\\]{1,100})")
# Sign, digits with or without thousands, decimals, and a denominator; a digit right behind a letter is part of a name.
_NUMBER = re.compile(
    r"(?<![\w.])(?:(?<![\d)])[-\u2212])?[$€£]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:/\d+|[eE][-+]?\d{1,3}\b)?"
)


def boxed(text: str) -> str | None:
    r"""Return what the last ``\boxed{...}`` or ``\fbox{...}`` holds; None if it is empty, never closed, or not there.

    Of boxes within each other the innermost counts. ``\boxed 7`` is a box too.
    """
    at = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if at < 0:
        return None
    opening = _BOX.match(text, at)
    if opening is None:
        bare = _BARE.match(text, at)
        return bare[1].rstrip(".,;:!") or None if bare else None
    depth, place = 1, opening.end()
    for place in range(opening.end(), min(len(text), opening.end() + LONGEST + 1)):
        if text[place] in "{}" and not _escaped(text, place):
            depth += 1 if text[place] == "{" else -1
        if not depth:
            return text[opening.end() : place].strip() or None
    return None


def _escaped(text: str, place: int) -> bool:
    """Whether the brace is written as a sign: behind an odd number of backslashes."""
    start = place
    while start and text[start - 1] == "\\" and place - start < LONGEST:
        start -= 1
    return (place - start) % 2 == 1


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
    found = None
    for found in _NUMBER.finditer(text[-TAIL:]):  # noqa: B007 - the last one is wanted
        pass
    return found[0] if found and len(found[0]) <= LONGEST else None
