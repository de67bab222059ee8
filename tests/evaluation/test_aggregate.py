"""Figures of a benchmark against enumeration and against numpy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deft_lightning.evaluation import Choice, ExactMatch, FigFont, Grade, Grader, Math
from deft_lightning.evaluation.aggregate import add, figure_names, figures, majority, no_sums, pass_at, summary, table


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int) -> None:
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        outcomes = [1] * right + [0] * (n - right)
        draws = [max(draw) for draw in itertools.combinations(outcomes, k)]
        assert pass_at(k, n, right) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    assert pass_at(1000, 4096, 1) == pytest.approx(1000 / 4096)


@pytest.mark.parametrize(
    ("votes", "scores", "expected"),
    [
        (["a", "b", "a"], [1, 0, 1], 1.0),
        (["a", "b", "a"], [0, 1, 0], 0.0),
        (["a", "b"], [1, 0], 0.5),
        (["a", "b", "c", "c", "b"], [1, 0, 1, 1, 0], 0.5),
        (["a", None, None], [1, 0, 0], 1.0),
        ([None, None], [0, 0], 0.0),
        (["a"], [1], 1.0),
        (["a", "b", "c"], [1, 0, 0], 1 / 3),
    ],
)
def test_the_majority_decides_and_a_tie_counts_as_its_mean(
    votes: Sequence[str | None], scores: Sequence[float], expected: float
) -> None:
    assert majority(votes, scores) == pytest.approx(expected)
    assert majority(votes[::-1], scores[::-1]) == pytest.approx(expected), "the order of the samples does not matter"


@pytest.mark.parametrize(
    ("grader", "n", "expected"),
    [
        (Math(), 1, ["avg@1", "truncated"]),
        (Math(), 16, ["avg@16", "pass@2", "pass@4", "pass@8", "pass@16", "maj@16", "truncated"]),
        (Math(), 6, ["avg@6", "pass@2", "pass@4", "pass@6", "maj@6", "truncated"]),
        (Choice(), 1, ["strict", "compat", "truncated"]),
        (FigFont(), 2, ["exact_match", "exact_match_normalised", "jaro_winkler", "pass@2", "maj@2", "truncated"]),
        (ExactMatch(), 1, ["exact_match", "truncated"]),
    ],
)
def test_names_of_the_figures(grader: Grader, n: int, expected: list[str]) -> None:
    assert figure_names(grader, n) == expected
    grade = Grade(dict.fromkeys(grader.names, 1.0), "x", False)
    assert figures(grader, [grade] * n) == [1.0] * (len(expected) - 1) + [0.0]


three = st.lists(st.booleans(), min_size=3, max_size=3)
examples = st.lists(st.tuples(st.integers(0, 2), three, st.booleans()), min_size=1, max_size=15)


def standard_error(values: Any) -> float:
    if set(values) in ({0.0}, {1.0}):
        return wilson(int(values.sum()), len(values))
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def wilson(right: int, n: int) -> float:
    """Half of the interval of Wilson (1927) at one standard deviation: of what it calls q, the roots of a quadratic."""
    share = right / n
    low, high = sorted(np.roots([1 + 1 / n, -(2 * share + 1 / n), share**2]).real)
    return float(high - low) / 2


@given(examples)
@settings(max_examples=60, deadline=None)
def test_means_and_errors_are_those_of_numpy(rows: list[tuple[int, list[bool], bool]]) -> None:
    grader, n, sources = Math(), 3, ("one", "three", "two")
    sums, values = no_sums(3, len(figure_names(grader, n))), []
    for source, outcomes, cut in rows:
        grades = [Grade({"correct": float(right)}, str(right), cut) for right in outcomes]
        values.append(figures(grader, grades))
        add(sums, source, values[-1])
    found = summary(sums, grader, n, sources)
    matrix = np.array(values)
    for i, name in enumerate(figure_names(grader, n)):
        assert found[name] == pytest.approx(matrix[:, i].mean(), abs=1e-12)
        if name != "truncated":
            error = standard_error(matrix[:, i])
            assert found[f"{name}_se"] == pytest.approx(error, abs=1e-7)
    named = {s: matrix[[row[0] == s for row in rows], 0] for s in {row[0] for row in rows}}
    assert found["macro"] == pytest.approx(np.mean([part.mean() for part in named.values()]), abs=1e-12)
    errors = [standard_error(part) ** 2 for part in named.values()]
    assert found["macro_se"] == pytest.approx(math.sqrt(sum(errors)) / len(named), abs=1e-7)
    assert {name for name in found if name.startswith("source/")} == {f"source/{sources[s]}" for s in named}
    assert found["examples"] == len(rows) and list(found)[-1] == "examples"


def test_every_score_has_its_macro_mean() -> None:
    grader, sums = Choice(), no_sums(2, 3)
    for source, strict, compat in [(0, 1.0, 1.0), (0, 0.0, 1.0), (0, 0.0, 0.0), (1, 1.0, 1.0)]:
        add(sums, source, figures(grader, [Grade({"strict": strict, "compat": compat}, None, False)]))
    found = summary(sums, grader, 1, ("big", "small"))
    assert found["strict"] == 0.5 and found["compat"] == 0.75
    assert found["macro"] == pytest.approx((1 / 3 + 1) / 2) and found["macro_compat"] == pytest.approx((2 / 3 + 1) / 2)
    assert (found["source/big"], found["source/small"]) == (pytest.approx(1 / 3), 1.0)


def test_no_example_gives_no_number_that_is_not_one() -> None:
    found = summary(no_sums(1, 2), ExactMatch(), 1)
    assert found == {"exact_match": 0.0, "exact_match_se": 0.0, "truncated": 0.0, "examples": 0.0}


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 2, 50])
def test_none_right_of_two_is_no_proof(n: int, value: float) -> None:
    sums = no_sums(1, 2)
    for _ in range(n):
        add(sums, 0, [value, 1.0])
    found = summary(sums, ExactMatch(), 1)
    error = pytest.approx(wilson(round(value * n), n))
    assert found == {"exact_match": value, "exact_match_se": error, "truncated": 1.0, "examples": n}
    assert found["exact_match_se"] == pytest.approx({1: 0.25, 2: 1 / 6, 50: 1 / 102}[n])


def test_the_table_says_every_figure_once_with_its_error() -> None:
    results = {
        "math500": {"avg@4": 0.25, "avg@4_se": 0.01, "truncated": 0.5, "examples": 500.0},
        "": {"exact_match": 1.0, "exact_match_se": 0.0, "truncated": 0.0, "examples": 3.0},
    }
    lines = [line.split() for line in table(results).splitlines()]
    assert lines == [
        ["benchmark", "examples", "figure", "value", "error"],
        ["math500", "500", "avg@4", "0.2500", "0.0100"],
        ["truncated", "0.5000"],
        ["held", "out", "3", "exact_match", "1.0000", "0.0000"],
        ["truncated", "0.0000"],
    ]
