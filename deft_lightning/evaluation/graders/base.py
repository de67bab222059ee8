"""The seam: a grader turns a completion into named scores, and says what the completion votes for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from deft_lightning.annotations import Record
from deft_lightning.registry import concrete


class Grade(NamedTuple):
    """What became of one completion.

    Attributes:
        scores: Named scores in ``[0, 1]``; the first is the grader's verdict, 0 or 1.
        vote: What it votes for in a majority; None does not vote.
        truncated: Whether a length limit cut it off.
    """

    scores: dict[str, float]
    vote: str | None
    truncated: bool


class Grader(ABC):
    """Grades completions: a frozen dataclass, a pure function of its arguments, whatever a completion holds.

    Attributes:
        names: Names of the scores. The first is the verdict, 0 or 1; of it pass@k and maj@n are made.
    """

    names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def __call__(self, completion: str, gold: str, record: Record) -> dict[str, float]:
        """Return the scores.

        Args:
            completion: What the model wrote, any text.
            gold: The right answer.
            record: What else the row says that grading needs, such as the ``options`` of a multiple choice.
        """

    def vote(self, completion: str, record: Record) -> str | None:
        """Return what the completion votes for, the same text for answers that are the same; None where it has none."""
        return completion.strip() or None

    def questions(self, completion: str, gold: str, record: Record, votes: bool) -> list[tuple[Any, ...]]:
        """Return what computer algebra will be asked for this completion, so that many can be asked at once."""
        return []

    def doubt(self, completion: str, gold: str, record: Record) -> str | None:
        """Return why a completion that was graded could not be judged, and counts as wrong; None where it could."""
        return None

    def grade(self, completion: str, gold: str, record: Record, truncated: bool, votes: bool) -> Grade:
        """Return scores and vote of a completion; without ``votes`` there is none, and no work for it."""
        scores = self(completion, gold, record)
        return Grade(scores, self.vote(completion, record) if votes else None, truncated)


def known_graders() -> dict[str, type[Grader]]:
    """Return every concrete grader imported so far by name, a user's own included."""
    return concrete(Grader)  # type: ignore[type-abstract]
