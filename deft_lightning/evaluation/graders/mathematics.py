r"""Final answers of mathematics: plain numbers and words at once, all else by math-verify in a process of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar, Literal, get_args

from deft_lightning.annotations import Record
from deft_lightning.answers.locate import LONGEST, boxed, hashed, last_number
from deft_lightning.answers.numbers import plain, same_number, same_words, words
from deft_lightning.errors import UserError
from deft_lightning.evaluation.graders.algebra import LIMITS, GaveUp
from deft_lightning.evaluation.graders.base import Grader
from deft_lightning.evaluation.graders.judge import Question, judge

Rule = Literal["boxed", "hashes", "last_number"]
RULES: dict[str, Callable[[str], str | None]] = {"boxed": boxed, "hashes": hashed, "last_number": last_number}


@dataclass(frozen=True)
class Math(Grader):
    r"""Grade the final answer of a solution: ``correct`` is 1 where it equals the gold answer.

    Two plain numbers are compared as exact fractions (:func:`~deft_lightning.answers.numbers.same_number`), words as
    text, everything else by math-verify. A gold row's ``error`` (OlympiadBench) is an absolute tolerance of numbers.
    Answers that are the same vote together: numbers by their value, expressions by what they parse to.

    Args:
        rules: Where the answer is sought; the first rule that finds one decides. ``boxed``: in the last
            ``\boxed{}``, and only there; ``hashes``: behind the last ``####``; ``last_number``: the last number.
    """

    rules: tuple[Rule, ...] = ("boxed",)
    names: ClassVar[tuple[str, ...]] = ("correct",)

    def __post_init__(self) -> None:
        """Refuse rules that there are not."""
        if not self.rules or set(self.rules) - set(get_args(Rule)):
            raise UserError(f"Math: rules must be among {', '.join(get_args(Rule))}, not {self.rules!r}")

    def answer(self, completion: str) -> str | None:
        """Return the final answer as it is written; None where there is none."""
        return next((written for rule in self.rules if (written := RULES[rule](completion)) is not None), None)

    def __call__(self, completion: str, gold: str, record: Record) -> dict[str, float]:
        """Return ``correct``."""
        answer = self.answer(completion)
        return {"correct": float(answer is not None and same_answer(gold, answer, _tolerance(record)))}

    def vote(self, completion: str, record: Record) -> str | None:
        """Return the answer in a form that is the same for answers that are the same."""
        answer = self.answer(completion)
        if answer is None:
            return None
        form = _form(answer)
        if isinstance(form, str):
            return form
        parsed = judge().ask(form)
        return parsed if isinstance(parsed, str) and parsed else words(answer)

    def questions(self, completion: str, gold: str, record: Record, votes: bool) -> list[Question]:
        """Return what computer algebra will be asked."""
        answer = self.answer(completion)
        if answer is None:
            return []
        asked = [_compared(gold, answer, _tolerance(record)), *([_form(answer)] if votes else [])]
        return [question for question in asked if isinstance(question, tuple)]

    def doubt(self, completion: str, gold: str, record: Record) -> str | None:
        """Return the limit that came before a verdict."""
        answer = self.answer(completion)
        question = None if answer is None else _compared(gold, answer, _tolerance(record))
        verdict = judge().memory.get(question) if isinstance(question, tuple) else None
        return LIMITS[verdict.limit] if isinstance(verdict, GaveUp) else None


def same_answer(gold: str, answer: str, tolerance: float = 0.0) -> bool:
    """Return whether an answer equals the gold one.

    Args:
        gold: The right answer, in LaTeX or plain, with or without dollar signs.
        answer: The model's; more than 500 letters are no answer.
        tolerance: Absolute difference that numbers may have.
    """
    verdict = _compared(gold, answer, tolerance)
    return verdict if isinstance(verdict, bool) else judge().ask(verdict) is True


@lru_cache(maxsize=100_000)
def _compared(gold: str, answer: str, tolerance: float) -> bool | Question:
    """Return the verdict, or the question to computer algebra that decides."""
    if len(answer) > LONGEST:
        return False
    right, number = plain(gold), plain(answer)
    if right is not None and number is not None:
        return same_number(right, number, tolerance)
    if same_words(gold, answer):
        return True
    return "same", gold.replace("$", ""), answer, 6 + (0 if right is None else _zeros(right.value))


def _zeros(value: Fraction) -> int:
    """Return how many zeros a number below 1 has behind its point: math-verify rounds, by which 1e-9 equals 1e-8."""
    if not value or abs(value) >= 1:
        return 0
    return math.ceil(math.log10(value.denominator) - math.log10(abs(value.numerator)))  # neither need fit a float


@lru_cache(maxsize=100_000)
def _form(answer: str) -> str | Question:
    """Return the text by which an answer votes, or the question to computer algebra that finds it."""
    number = plain(answer)
    if number is not None:
        return str(number.value)
    text = words(answer)
    return text if (len(text) > 1 and text.isalpha()) or len(answer) > LONGEST else ("form", answer)


def _tolerance(record: Record) -> float:
    error = record.get("error")
    try:
        tolerance = float(error) if isinstance(error, str | int | float) else 0.0
    except (ValueError, OverflowError):  # OlympiadBench leaves the field empty, or has one for each of several answers
        return 0.0
    return tolerance if 0 <= tolerance < math.inf else 0.0
