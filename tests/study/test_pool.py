"""What a study does with the runs in hand when one has failed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deft_lightning.errors import UserError
from deft_lightning.study.pool import Workers


class Future:
    """A run that ends as it is told."""

    def __init__(self, end: Exception | None) -> None:
        self.end, self.cancelled = end, False

    def result(self) -> None:
        if self.end is not None:
            raise self.end

    def cancel(self) -> None:
        self.cancelled = True


class Scripted(Workers):
    """Runs that end one by one, in the order in which they began."""

    def __init__(self, ends: dict[str, Exception | None], refused: Exception | None = None) -> None:
        super().__init__(3, Path())
        self.ends, self.refused, self.made, self.waits = ends, refused, dict[str, Future](), 0
        self.stop = 10**6

    def submit(self, work: Any, cell: Any) -> Future:
        if self.refused is not None and len(self.made) == 2:
            raise self.refused
        return self.made.setdefault(cell.label, Future(self.ends.get(cell.label)))

    def wait(self, running: Iterable[Any]) -> Iterable[Any]:
        self.waits += 1
        if self.waits > self.stop:
            raise KeyboardInterrupt
        return [next(iter(running))]

    def lost(self, future: Any, error: Exception) -> str | None:
        return "the job has failed" if isinstance(error, OSError) else None


def run(workers: Workers) -> None:
    cells: list[Any] = [SimpleNamespace(label=label) for label in "abcdef"]
    with workers:
        workers.run("tested", lambda *_: {}, cells, lambda _: 1)


@pytest.mark.parametrize(
    ("end", "line"), [(UserError("wrong"), "a: wrong"), (OSError(), "a: the job has failed"), (KeyError("x"), "'x'")]
)
def test_runs_in_hand_are_finished_after_the_first_error(
    end: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    workers = Scripted({"a": end, "b": UserError("wrong too")})
    with pytest.raises(UserError if line.startswith("a") else KeyError, match=line):
        run(workers)
    assert list(workers.made) == ["a", "b", "c"], "no other is begun"
    assert workers.waits == 3 and not any(future.cancelled for future in workers.made.values())
    told = [told for told in capsys.readouterr().err.splitlines() if told.startswith("study: ") and "%" not in told]
    assert [told for told in told if "wrong too (waiting for runs in hand: 1" in told]
    assert [told for told in told if f"{line} (waiting for runs in hand: 2; Ctrl-C ends them)" in told]


def test_a_refused_job_waits_for_the_others() -> None:
    workers = Scripted({}, UserError("--submitit: no such partition"))
    with pytest.raises(UserError, match="no such partition"):
        run(workers)
    assert workers.waits == 2 and not any(future.cancelled for future in workers.made.values())


def test_an_interrupt_cancels_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    workers = Scripted({"a": UserError("wrong")})
    workers.stop = 1
    with pytest.raises(KeyboardInterrupt):
        run(workers)
    assert [workers.made[label].cancelled for label in "abc"] == [False, True, True]
    assert "study: a: wrong" in capsys.readouterr().err, "the error before it is not lost"
