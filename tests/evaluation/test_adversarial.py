"""Completions made to break a grader: none crashes it, none holds it up, and afterwards it grades as before."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deft_lightning.evaluation import BENCHMARKS, Grader, Math
from deft_lightning.evaluation.graders.algebra import Algebra, GaveUp
from deft_lightning.evaluation.graders.algebra_worker import WALL
from deft_lightning.evaluation.graders.mathematics import same_answer

pytestmark = pytest.mark.slow

OPTIONS = {"options": {"A": "Paris", "B": "the largest prime below a million"}}
GRADERS: dict[str, tuple[Grader, str]] = {
    "gsm8k": (BENCHMARKS["gsm8k"].grader, "18"),
    "math500": (BENCHMARKS["math500"].grader, r"\frac{\pi}{2}"),
    "medical": (BENCHMARKS["medical"].grader, "A"),
    "figfont": (BENCHMARKS["figfont"].grader, "WORD"),
}
every_grader = pytest.mark.parametrize("name", GRADERS)
MB = 2**20


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer: a hang is interrupted, so that the suite goes on."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def assert_grades(grader: Grader, completion: str, gold: str) -> dict[str, float]:
    grade = grader.grade(completion, gold, OPTIONS, False, True)
    assert tuple(grade.scores) == grader.names and all(0 <= score <= 1 for score in grade.scores.values())
    assert grade.vote is None or isinstance(grade.vote, str)
    assert grader.grade(completion, gold, OPTIONS, False, True) == grade, "the same again"
    return grade.scores


LONG: dict[str, Callable[[int], str]] = {
    "letters": lambda n: "a" * n,
    "digits": lambda n: "7" * n,
    "words": lambda n: "the answer is " * (n // 14),
    "boxes": lambda n: r"\boxed{1}" * (n // 9),
    "open boxes": lambda n: r"\boxed{" * (n // 7),
    "one box": lambda n: r"\boxed{" + "1+" * (n // 2) + "1}",
    "braces": lambda n: r"\boxed{" + "{" * n,
    "backslashes": lambda n: r"\boxed{" + "\\" * n,
    "hashes": lambda n: "#" * n,
    "hashes, then digits": lambda n: "#### " + "9" * n,
    "lines": lambda n: "\n" * n,
    "blanks": lambda n: "A" + " " * n,
    "commas": lambda n: "1," * (n // 2),
    "thousands": lambda n: "1" + ",000" * (n // 4),
    "signs": lambda n: "-" * n + "5",
    "dollars": lambda n: "$" * n,
    "stars": lambda n: "*" * n + "A",
    "brackets": lambda n: "(" * n + "A" + ")" * n,
    "emoji": lambda n: "\U0001f4a5" * (n // 4),
    "fractions": lambda n: r"\frac{1}{" * (n // 9),
}


@every_grader
@pytest.mark.parametrize("kind", LONG)
def test_ten_megabytes_are_graded_at_once(kind: str, name: str) -> None:
    grader, gold = GRADERS[name]
    text = LONG[kind](10 * MB)
    assert len(text.encode()) > 9 * MB
    assert same_answer("x+1", "1+x")  # the process that compares is started
    with ends_within(20):
        assert_grades(grader, text, gold)


def test_an_answer_behind_ten_megabytes_is_still_found() -> None:
    filling = "so we look at 3 cases. " * (10 * MB // 23)
    endings = [("gsm8k", "\n#### 18"), ("gsm8k", "It is 18."), ("math500", r"\boxed{\pi/2}"), ("medical", "\nA")]
    for name, ending in endings:
        grader, gold = GRADERS[name]
        assert next(iter(grader(filling + ending, gold, OPTIONS).values())) == 1.0, (name, ending)


ODD = ["", " ", "\n", "\x00", "\ufeff", "\ud800", "1\u200b8", "\r\n\r\n", "{", "}", "\\", "$", "%", "\\boxed{%}"]


@every_grader
@pytest.mark.parametrize("text", ODD, ids=repr)
def test_short_oddities_are_graded(text: str, name: str) -> None:
    grader, gold = GRADERS[name]
    with ends_within(30):
        scores = assert_grades(grader, text, gold)
    assert next(iter(scores.values())) == 0.0


@every_grader
@given(text=st.text(st.characters() | st.sampled_from("\\{}$^_&%#-+*/=()[]0123456789.,"), max_size=60))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_is_graded(name: str, text: str) -> None:
    grader, gold = GRADERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_grades(grader, text, gold)
        assert_grades(grader, f"\\boxed{{{text}}}", gold)


# --- answers built to hang a parser ----------------------------------------------------------------------------------

HANGING = [
    "9^{9^{9^{9}}}",  # one power inside one call: no signal of Python's would end it
    "9!!!!!!!",
    r"\sum_{k=1}^{10^{12}} k!",
    "(" * 200 + "1" + ")" * 200,
    "(x+1)^{100000}",
    "10^{10^{10}}",
    "{" * 240 + "1" + "}" * 240,
]


@pytest.fixture(scope="module")
def quick() -> Iterator[Algebra]:
    """One that gives up soon."""
    made = Algebra(calls=100_000)
    yield made
    made.close()


@pytest.mark.parametrize("answer", HANGING)
def test_a_hang_ends_with_its_process(quick: Algebra, answer: str) -> None:
    with ends_within(2 * WALL):
        assert not quick.same("5", answer)
        assert quick.same(r"\frac{\pi}{2}", r"\pi/2"), "the next one is graded"


def test_giving_up_is_an_answer_that_names_the_limit(quick: Algebra) -> None:
    assert quick.ask(("same", "5", HANGING[0], 6)) == GaveUp("size")
    assert quick.ask(("same", "5", HANGING[2], 6)) == GaveUp("calls")


def test_memory_is_limited() -> None:
    made = Algebra(mebibytes=700)
    assert made.same("2^{10}", "4^5") and made._worker is not None
    with open(f"/proc/{made._worker.pid}/limits", encoding="utf-8") as file:
        (limit,) = (line.split()[3:5] for line in file if line.startswith("Max address space"))
    assert limit == [str(700 * MB)] * 2
    made.close()


def test_an_answer_that_is_no_longer_waited_for_is_not_the_next_ones(
    quick: Algebra, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after Ctrl-C, or a limit of time that somebody else has set."""
    assert quick.same("u+1", "1+u")
    with pytest.raises(TimeoutError), ends_within(0.3), monkeypatch.context() as patch:
        patch.setattr(quick, "calls", 10**7)
        quick.same("5", HANGING[2])
    assert quick.same("u+2", "2+u") and not quick.same("u+2", "3+u")


def test_the_grader_itself_survives_a_hang() -> None:
    with ends_within(3 * WALL + 20):
        assert Math()(f"\\boxed{{{HANGING[0]}}}", "5", {}) == {"correct": 0.0}
    assert Math()(r"\boxed{\pi/2}", r"\frac{\pi}{2}", {}) == {"correct": 1.0}


def test_a_worker_that_somebody_killed_is_started_again(quick: Algebra) -> None:
    assert quick.same("x+1", "1+x")
    assert quick._worker is not None
    os.kill(quick._worker.pid, signal.SIGKILL)
    quick._worker.wait()
    assert quick.same("x+2", "2+x")


def test_it_grades_in_threads(quick: Algebra) -> None:
    """Where signals, and math-verify's own limit of time, do not work."""
    found: dict[int, list[bool]] = {}

    def work(n: int) -> None:
        found[n] = [quick.same(f"x+{n}", f"{n}+x"), quick.same(f"x+{n}", f"{n + 1}+x"), same_answer(f"y+{n}", f"{n}+y")]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {n: [True, False, True] for n in range(8)}


def _in_a_fork(results: Any) -> None:
    results.put([same_answer("z+1", "1+z"), same_answer("z+1", "2+z"), os.getpid()])


def test_it_grades_in_forked_processes_with_workers_of_their_own() -> None:
    assert same_answer("w+1", "1+w")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_in_a_fork, args=(results,)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [one[:2] for one in found] == [[True, False]] * 2 and os.getpid() not in [one[2] for one in found]
    assert same_answer("w+2", "2+w")


def test_the_worker_ends_with_its_parent() -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def start() -> None:
        made = Algebra(seconds=1)
        assert made.same("a+b", "b+a") and made._worker is not None
        results.put(made._worker.pid)
        time.sleep(60)

    parent = context.Process(target=start)
    parent.start()
    worker = results.get(timeout=60)
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _alive(worker):
        time.sleep(0.1)
    assert not _alive(worker)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
