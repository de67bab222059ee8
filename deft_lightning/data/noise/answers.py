"""Noise on the final answer of a solution."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from deft_lightning.answers.digits import Number, lone_number, numbers
from deft_lightning.answers.locate import HASHES, answer_box
from deft_lightning.data.noise.base import ExampleNoise
from deft_lightning.data.noise.edits import Edit
from deft_lightning.data.noise.numbers import LONGEST, difference, offset, other_digits
from deft_lightning.hashing import stream

# Digits of an expression that may change without changing what it is worth: a base (5_8 is 5_9), an exponent of 1.
SUBSCRIPT, EXPONENT = re.compile(r"_(?:\{[^{}]*\}|[0-9])"), re.compile(r"\^(?:\{[^{}]*\}|[0-9])")


@dataclass(frozen=True)
class AnswerCorrupt(ExampleNoise):
    r"""Give a wrong final answer behind reasoning that is right; the value always differs from the clean one.

    Only letters that change are flagged: of 1,250 that becomes 1,350 the 3. Where the answer is an expression, not a
    number, its digits change and its value is not computed.

    Args:
        rate: Share of examples, in ``[0, 1]``.
        style: Where the answer is: behind the last ``####``, in the last ``\boxed{...}`` (without one, in the last
            ``\fbox{...}`` or behind the last ``\boxed``), or the last number.
        how: ``digits`` changes one or more digits and keeps the length; ``offset`` adds a whole number of up to a fifth
            of the value, at least 3, and keeps decimals and separators. An expression has no offset: it stays clean.
        exact: Corrupt exactly ``floor(rate * n)`` of the ``n`` responses that have such an answer.
    """

    rate: float = 0.3
    style: Literal["gsm8k", "boxed", "last_number"] = "gsm8k"
    how: Literal["digits", "offset"] = "digits"
    exact: bool = False

    def __post_init__(self) -> None:
        """Refuse rates and words that mean nothing."""
        super().__post_init__()
        styles = self.style in ("gsm8k", "boxed", "last_number")
        self._refuse_unless(styles, f"style must be gsm8k, boxed or last_number, not {self.style!r}")
        self._refuse_unless(self.how in ("digits", "offset"), f"how must be digits or offset, not {self.how!r}")

    def edit(self, salt: str, example_id: str, response: str, prompt: str) -> list[Edit] | None:
        """Return the change of the answer."""
        number, places = self._answer(response)
        if not 0 < len(places) <= LONGEST:
            return None
        draws = stream(salt, example_id, self.how)
        if self.how == "digits":
            return other_digits(response, places, number, draws)
        if number is None:
            return None
        clean = response[number.start : number.end]
        return difference(clean, offset(clean, number.nonzero, draws), number.start)

    def _answer(self, response: str) -> tuple[Number | None, list[int]]:
        """Return the answer, if it is a number, and the places of its digits."""
        number: Number | None = None
        if self.style == "last_number":
            number = max(numbers(response), default=None)
        elif self.style == "gsm8k":
            hits = list(HASHES.finditer(response))
            number = next(numbers(response, *hits[-1].span("answer")), None) if hits else None
        else:
            box = answer_box(response)
            closed = box is not None and box.end >= 0
            number = lone_number(response, box.start, box.end) if box and closed else None
            if number is None and box and closed:
                return None, _safe_digits(response, box.start, box.end)
        if number is None:
            return None, []
        return number, _digits(response, number.start, number.end)


def _digits(text: str, start: int, end: int) -> list[int]:
    return [i for i in range(start, end) if text[i] in "0123456789"]


def _safe_digits(text: str, start: int, end: int) -> list[int]:
    below, above = (
        {i for hit in script.finditer(text, start, end) for i in range(*hit.span())} for script in (SUBSCRIPT, EXPONENT)
    )
    open_to = [i for i in _digits(text, start, end) if i not in below]
    return [i for i in open_to if i not in above] or open_to
