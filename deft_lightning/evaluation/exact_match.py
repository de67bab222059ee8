"""Exact match of a completion with its gold response."""

from __future__ import annotations


def exact_match(completion: str, gold: str) -> bool:
    """Whether the two are equal but for blanks around each line's end, around the whole, and the style of line ends.

    Case and blanks inside a line count.

    Args:
        completion: What the model wrote.
        gold: The reference.
    """
    return _tidy(completion) == _tidy(gold)


def _tidy(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
