"""Exact match of a completion with its gold response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deft_lightning.annotations import Record
from deft_lightning.evaluation.graders.base import Grader


def exact_match(completion: str, gold: str) -> bool:
    """Return whether two texts are equal but for blanks at the ends of lines, around the whole, and line ends.

    Case and blanks inside a line count.

    Args:
        completion: What the model wrote.
        gold: The reference.
    """
    return tidy(completion) == tidy(gold)


def tidy(text: str) -> str:
    """Return a text without blanks around it and at the ends of its lines."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


@dataclass(frozen=True)
class ExactMatch(Grader):
    """Grade by :func:`exact_match`; completions that are equal in its sense vote together."""

    names: ClassVar[tuple[str, ...]] = ("exact_match",)

    def __call__(self, completion: str, gold: str, record: Record) -> dict[str, float]:
        """Return ``exact_match``."""
        return {"exact_match": float(exact_match(completion, gold))}

    def vote(self, completion: str, record: Record) -> str | None:
        """Return the completion without the blanks that do not count."""
        return tidy(completion) or None
