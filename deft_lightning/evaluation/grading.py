"""Many completions graded together: in parallel where that helps, with a bar, and a count of those given up."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from deft_lightning.annotations import Record
from deft_lightning.evaluation.graders.base import Grade, Grader
from deft_lightning.evaluation.graders.judge import judge

EVERY = 30  # seconds between two lines where no bar can be shown


class Item(NamedTuple):
    """A completion to grade, and where it comes from."""

    where: str
    completion: str
    truncated: bool
    gold: str
    record: Record


class Doubts:
    """Counts the completions that could not be judged."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.first = ""

    def add(self, where: str, reason: str | None) -> None:
        """Count a completion, if there is a reason."""
        if reason is not None:
            self.first = self.first or where
            self.reasons[reason] += 1

    def __str__(self) -> str:
        """Return a line that says how many, why, and where the first is; empty where there are none."""
        if not (total := sum(self.reasons.values())):
            return ""
        why = ", ".join(f"{reason}: {n}" for reason, n in self.reasons.items())
        answers = "answer" if total == 1 else "answers"
        return f"{total} {answers} could not be judged and count as wrong ({why}); the first: {self.first}"


def grade_all(grader: Grader, items: Sequence[Item], votes: bool, doubts: Doubts, bar: bool = False) -> list[Grade]:
    """Return the grade of each completion.

    Args:
        grader: Grades them.
        items: The completions.
        votes: Whether a majority is asked for.
        doubts: Counts those that could not be judged.
        bar: Whether to show progress if this takes more than a few seconds.
    """
    asked = [q for item in items for q in grader.questions(item.completion, item.gold, item.record, votes)]
    if asked:
        with _progress(len(set(asked)), bar) as seen:
            judge().settle(asked, seen)
    for item in items:
        doubts.add(item.where, grader.doubt(item.completion, item.gold, item.record))
    return [grader.grade(item.completion, item.gold, item.record, item.truncated, votes) for item in items]


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int], Any]]:
    """Show how many answers have been judged: a bar on a terminal, elsewhere a line now and then."""
    if not shown:
        yield lambda n: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc="judging answers", total=total, delay=5, unit=" answers", leave=False) as bar:
            yield bar.update
    else:
        count, last = 0, time.monotonic()

        def seen(n: int) -> None:
            nonlocal count, last
            count += n
            if time.monotonic() - last > EVERY:
                last = time.monotonic()
                sys.stderr.write(f"judging answers: {count} of {total}\n")

        yield seen
