"""FigFont: the word that ASCII art spells, graded by three figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deft_lightning.annotations import Record
from deft_lightning.evaluation.graders.base import Grader
from deft_lightning.evaluation.graders.exact import tidy

LONGEST = 100_000  # letters of a completion that are compared; a word has a dozen
PREFIX, WEIGHT = 4, 0.1


def jaro_winkler(first: str, second: str) -> float:
    r"""Return the Jaro similarity plus a bonus for a common prefix, ``j + 0.1 l (1 - j)``, in ``[0, 1]``; symmetric.

    With m letters that match (equal, and no further apart than half of the longer text), t of them out of order:
    ``j = (m / |a| + m / |b| + (m - t / 2) / m) / 3``; ``l <= 4`` letters at the start are common. The bonus is applied
    always, as the paper's figures need it; rapidfuzz's own Jaro-Winkler applies it above 0.7 only. Two empty texts are
    alike, 1; an empty one and another are not, 0.
    """
    from rapidfuzz.distance import Jaro  # here, as no other grader of a run needs it

    similarity = float(Jaro.similarity(first, second))
    common = 0
    for a, b in zip(first[:PREFIX], second[:PREFIX], strict=False):
        if a != b:
            break
        common += 1
    return similarity + WEIGHT * common * (1 - similarity)


@dataclass(frozen=True)
class FigFont(Grader):
    """Grade a word read from ASCII art.

    ``exact_match`` counts case and inner blanks, blanks around the whole do not matter. ``exact_match_normalised``
    ignores case and every blank. ``jaro_winkler`` ignores case and outer blanks, as the paper's figures do; of a
    completion of more than 100,000 letters it compares the first 100,000.
    """

    names: ClassVar[tuple[str, ...]] = ("exact_match", "exact_match_normalised", "jaro_winkler")

    def __call__(self, completion: str, gold: str, record: Record) -> dict[str, float]:
        """Return the three figures."""
        answer, wanted = tidy(completion), tidy(gold)
        return {
            "exact_match": float(answer == wanted),
            "exact_match_normalised": float(_normal(answer) == _normal(wanted)),
            "jaro_winkler": jaro_winkler(answer[:LONGEST].lower(), wanted.lower()),
        }

    def vote(self, completion: str, record: Record) -> str | None:
        """Return the word as it is written."""
        return tidy(completion) or None


def _normal(text: str) -> str:
    return "".join(text.split()).casefold()
