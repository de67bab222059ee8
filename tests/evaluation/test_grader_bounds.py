"""Bounds of grading: answers that are expensive to judge, numbers beyond a float, files that are not what they say."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deft_lightning.answers.locate import boxed, hashed, last_number
from deft_lightning.answers.numbers import plain, same_words
from deft_lightning.errors import UserError
from deft_lightning.evaluation import Choice, ExactMatch, FigFont, Math
from deft_lightning.evaluation.command import main
from deft_lightning.evaluation.graders.algebra import Algebra, GaveUp
from deft_lightning.evaluation.graders.judge import Judge, judge, limit_of
from deft_lightning.evaluation.graders.mathematics import same_answer
from deft_lightning.evaluation.grading import Doubts
from deft_lightning.evaluation.score import score

pytestmark = pytest.mark.slow


def write_predictions_of(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(gold: str, answer: str) -> dict[str, Any]:
    return {"completions": [f"so it is \\boxed{{{answer}}}"], "gold": gold}


def test_numbers_beyond_a_float_are_graded() -> None:
    for gold in ("1e400", "1e-400", "-1e400", "9" * 119, "1/" + "9" * 110):
        assert not same_answer(gold, r"\sqrt{2}"), gold
        assert same_answer(gold, gold), gold
    assert same_answer("1e-400", "1e-400") and not same_answer("1e400", "1e399")
    assert Math()(r"\boxed{2}", "2", {"error": 10**400}) == {"correct": 1.0}


@pytest.mark.parametrize("gold", ["nan", "Infinity", "-inf", "", "\x00", "7" * 100_000, "{" * 3000, "x" * 2**20])
def test_absurd_right_answers_are_graded_or_counted(gold: str, tmp_path: Path) -> None:
    doubts = Doubts()
    path = write_predictions_of(tmp_path / "p.jsonl", row(gold, "x+1"), row("2", "1+1"))
    assert score(path, "math500", doubts=doubts)["math500"]["avg@1"] == 0.5
    assert len(gold) < 3000 or "too long a right answer: 1); the first: row 1" in str(doubts)


EXPENSIVE = [
    "9^{9^{9}}", "9^{9^{9^{9}}}", "10^{10^{10}}", "1000000000!", r"\binom{10^9}{10^6}", "2^{-10^{12}}",
    "(x+1)^{100000}", r"\sqrt[3]{10^{20000}+7}",
]  # fmt: skip


@pytest.mark.parametrize("answer", EXPENSIVE)
def test_sizes_are_known_before_they_are_computed(answer: str) -> None:
    """Whether the kernel's limit of time comes first would depend on the machine."""
    for gold in ("5", r"\frac{\sqrt{x+1}}{2}"):
        assert judge().ask(("same", gold, answer, 6)) in (GaveUp("size"), GaveUp("calls"))
    assert judge().ask(("same", "5", answer, 6)) == GaveUp("size")


def test_a_hostile_file_ends_soon_and_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is given up is not asked again, and a question given up is no longer than a question."""
    answers = [f"9^{{9^{{{i}}}}}" for i in range(8, 24)] + ["(" * 200 + "1" + ")" * 200, r"\sqrt{4}"]
    path = write_predictions_of(tmp_path / "p.jsonl", *(row("2", answer) for answer in answers * 20))
    before, known = time.process_time(), len(judge().memory)
    main([str(path), "--benchmark", "math500"])
    told = capsys.readouterr()
    assert "0.0556" in told.out and time.process_time() - before < 10
    assert told.err.count("\n") == 1
    assert "340 answers could not be judged and count as wrong" in told.err and "the first: row 1" in told.err
    assert "too large a number: 320, brackets nested too deeply: 20" in told.err
    assert len(judge().memory) == known + len(answers)


def test_answers_depend_neither_on_the_number_of_workers_nor_on_the_order() -> None:
    questions = [("same", "5", answer, 6) for answer in ("9^{9^9}", "x+1", r"\sqrt{25}", "10^{10^{10}}")]
    questions += [("same", "x+1", f"{i}+x", 6) for i in range(3)] + [("form", r"\sin{" * 20 + "x" + "}" * 20)]
    made = Judge(2)
    made.settle(questions)
    made.close()
    assert made.memory == {question: judge().ask(question) for question in reversed(questions)}
    assert GaveUp("size") in made.memory.values()


def test_a_question_gets_the_same_number_of_calls_whatever_came_before() -> None:
    question = ("same", "x+1", "2+x", 6)
    made = Algebra(calls=1)

    def enough() -> int:
        """Return how many calls it takes, by bisection."""
        low, high = 1, 2**15
        while high - low > 64:
            made.calls = (low + high) // 2
            low, high = (low, made.calls) if made.ask(question) is False else (made.calls, high)
        return low

    first = enough()
    for answer in ("1+x", "3+x", r"\frac{x}{2}"):
        made.calls = 10**6
        made.same("x+1", answer)
    assert enough() == first and 1000 < first < 2**15 - 64
    made.close()


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_no_process_is_left(ended_by: signal.Signals, tmp_path: Path) -> None:
    path = write_predictions_of(
        tmp_path / "p.jsonl", *(row("5", f"\\sum_{{k=1}}^{{10^{{12}}}} k!+{i}") for i in range(500))
    )
    with subprocess.Popen(
        [sys.executable, "-m", "deft_lightning", "score", str(path), "--benchmark", "math500"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as process:  # fmt: skip
        try:
            while not (workers := children(process.pid)) or not any(children(worker) for worker in workers):
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(ended_by)
            process.wait(30)
        finally:
            process.kill()
    until = time.monotonic() + 30
    while left := [worker for worker in workers if group_lives(worker)]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def group_lives(group: int) -> bool:
    """Whether a worker or a fork of its is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_limits_that_need_no_question() -> None:
    assert limit_of(("same", "5", "(" * 41, 6)) == "nesting" and limit_of(("same", "5", "(" * 40, 6)) is None
    assert limit_of(("same", "x" * 2001, "5", 6)) == "length" and limit_of(("form", "5")) is None


def test_a_system_without_processes_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UserError, match=r"grader of mathematics does not start \(No such file"):
        Algebra().same("x+1", "1+x")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="does not start; the reason is in /bin/false -m"):
        Algebra().same("x+1", "1+x")


def test_answers_run_no_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    code = f"__import__('os').system('touch {marker}')"
    for answer in (code, f"\\text{{{code}}}", f"1+{code}", f"${code}$", f"x={code}", f"({code}, 1)"):
        assert not same_answer("x+1", answer)
        assert isinstance(Math().vote(f"\\boxed{{{answer}}}", {}), str)
    assert not marker.exists()


HARD = [
    "1,000", ",000", "1,", "9", "-", "1/", "1e", "$", r"\boxed{", "{", "}", "\\", r"\text{", r"\text", " ", "\n", "#",
    "a/b", "aa/", "aa ", "the answer is ", "so, ", "*", "(", ". ", "yes", "A.", r"\,", "\u2212", "\u0130", "a1",
]  # fmt: skip


def test_extractors_take_linear_time() -> None:
    """Ten times the text takes about ten times as long: no pattern tries all the ways to divide it."""
    options = {"A": "aa aa aa", "B": "the answer is A", "yes": "so so", "": "", "\u0130": "\xdf"}
    rng = random.Random(5)
    for case in range(40):
        unit = "".join(rng.choice(HARD) for _ in range(rng.randint(1, 3)))
        text = unit * (100_000 // len(unit)) + rng.choice(["", "!", "x", "\n", "}"])
        start = time.process_time()
        for read in (boxed, hashed, last_number, plain, lambda t: same_words(t, t)):
            read(text)
            read(text[:400])
            read(f"\\boxed{{{text[:490]}}}")
        for grader in (Choice(), ExactMatch(), FigFont()):
            grader.grade(text, "A", {"options": options}, False, True)
            grader.grade(text[:480], text, {"options": options}, False, True)
        assert time.process_time() - start < 2, (case, unit)
