"""Systematic noise: wrong answers that agree with each other."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from deft_lightning.data.noise.base import ExampleNoise
from deft_lightning.data.noise.edits import Edit

Rule = Literal["rotate", "reverse", "upper"]
RULES: dict[str, Callable[[str], str]] = {
    "rotate": lambda word: word[1:] + word[:1],
    "reverse": lambda word: word[::-1],
    "upper": str.upper,
}


@dataclass(frozen=True)
class WrongRule(ExampleNoise):
    """Change the selected responses by one rule, the same for all: noise that a model can learn.

    Annotators who share a misunderstanding make such labels; a model cannot tell them from a second truth by their
    spread, as it can with noise that is different in every row. Words are runs of letters and digits.

    Args:
        rate: Share of examples, in ``[0, 1]``.
        rule: What becomes of every word: `rotate` moves its first letter to its end, `reverse` turns it round, `upper`
            writes it in capitals.
        exact: Select exactly ``floor(rate * n)`` of the ``n`` responses that the rule changes.
    """

    whole = True

    rate: float = 0.1
    rule: Rule = "rotate"
    exact: bool = False

    def __post_init__(self) -> None:
        """Refuse rules that nobody knows."""
        super().__post_init__()
        self._refuse_unless(self.rule in RULES, f"rule {self.rule!r} is not one of {', '.join(RULES)}")

    def edit(self, salt: str, example_id: str, response: str, prompt: str) -> list[Edit] | None:
        """Return the response by the other rule, None where that is the same."""
        changed = re.sub(r"\w+", lambda word: RULES[self.rule](word[0]), response)
        return None if changed == response else [Edit(0, len(response), changed)]
