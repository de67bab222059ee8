"""The grader of mathematics against verdicts that are known: by hand, and by rule on the gold answers of real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from by_hand import DIFFERENT, SAME
from rewrites import LATEX_RIGHT, LATEX_WRONG, NUMBER_RIGHT, NUMBER_WRONG, Graded, rewritten

from deft_lightning.evaluation import BENCHMARKS
from deft_lightning.evaluation.benchmarks import final_answer

pytestmark = pytest.mark.slow

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
MADE_UP = ["1", "7", "12", "40", "365", "1000", "4096", "27000", "1234567"]
LATEX = [
    r"\frac{3}{4}", r"\left( 3, \frac{\pi}{2} \right)", "x^2 - 2x + 5", r"3\sqrt{13}", "-17", r"\text{north}",
    r"\frac{14}{3}", "[2, 7)", r"\begin{pmatrix} 1 \\ 5 \end{pmatrix}",
]  # fmt: skip


def shared_rows(name: str) -> list[dict[str, Any]]:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def disagreements(benchmark: str, graded: list[Graded]) -> list[Graded]:
    grader = BENCHMARKS[benchmark].grader
    return [one for one in graded if grader(one.completion, one.gold, {}) != {"correct": float(one.right)}]


def assert_agrees(benchmark: str, graded: list[Graded], at_least: int) -> None:
    assert len(graded) >= at_least
    wrong = disagreements(benchmark, graded)
    assert len(wrong) <= 0.01 * len(graded), [(one.rule, one.gold, one.completion[-80:]) for one in wrong[:10]]


def test_verdicts_by_hand() -> None:
    """What is known to be missed: math-verify closes up blanks between digits, and keeps i a symbol."""
    graded = [
        Graded(gold, f"Hence $\\boxed{{{said}}}$.", right, "by hand")
        for pairs, right in ((SAME, True), (DIFFERENT, False))
        for gold, said in pairs
    ]
    assert_agrees("math500", graded, 200)
    assert {(one.gold, one.completion) for one in disagreements("math500", graded)} <= {
        ("i", r"Hence $\boxed{\sqrt{-1}}$."),
        ("18", r"Hence $\boxed{1 8}$."),
    }


@pytest.mark.parametrize("benchmark", ["gsm8k", "svamp", "math"])
def test_every_rule_on_numbers_of_our_own(benchmark: str) -> None:
    graded = [
        Graded(gold, rule(gold), right, name)
        for gold in MADE_UP
        for rules, right in ((NUMBER_RIGHT, True), (NUMBER_WRONG, False))
        for name, rule in rules.items()
    ]
    assert_agrees(benchmark, graded, 300)


def test_every_rule_on_latex_of_our_own() -> None:
    graded = [
        Graded(gold, rule(gold), right, name)
        for gold in LATEX
        for rules, right in ((LATEX_RIGHT, True), (LATEX_WRONG, False))
        for name, rule in rules.items()
    ]
    assert_agrees("math500", graded, 140)


def test_gsm8k_by_rule() -> None:
    answers = [row["answer"] for row in shared_rows("gsm8k_test.jsonl")]
    golds = [final_answer(answer).replace(",", "") for answer in answers]
    official = [Graded(gold, answer, True, "official") for gold, answer in zip(golds, answers, strict=True)]
    positive = [gold for gold in golds if int(gold) > 0]
    assert_agrees("gsm8k", [*official, *rewritten(positive, NUMBER_RIGHT, NUMBER_WRONG)], 3900)


def test_svamp_by_rule() -> None:
    golds = [final_answer(row["Answer"]) for row in shared_rows("svamp_test.jsonl")]
    assert_agrees("svamp", rewritten(golds, NUMBER_RIGHT, NUMBER_WRONG), 2000)


def test_math500_by_rule() -> None:
    """The official solutions, and answers rewritten."""
    found = shared_rows("math500_test.jsonl")
    golds = [final_answer(row["answer"]) for row in found]
    official = [Graded(gold, row["solution"], True, "official") for gold, row in zip(golds, found, strict=True)]
    assert_agrees("math500", [*official, *rewritten(golds, LATEX_RIGHT, LATEX_WRONG)], 1500)
