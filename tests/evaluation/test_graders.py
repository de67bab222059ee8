"""What each grader reads and how it scores, case by case."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from deft_lightning.answers.locate import boxed, hashed, last_number
from deft_lightning.answers.numbers import Plain, plain, same_number, same_words
from deft_lightning.errors import UserError
from deft_lightning.evaluation import Choice, ExactMatch, FigFont, Math, jaro_winkler, known_graders
from deft_lightning.evaluation.graders.choice import begun_with, label_of, nearest, said_so

# --- where the answer is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} is a set", r"\{1, 2\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\fbox{9}", "9"),
        (r"\boxed {5}", "5"),
        (r"$\boxed 7$", "7"),
        (r"\boxed7.", "7"),
        (r"\boxed{a \\ b}", r"a \\ b"),
        (r"\boxed{ }", None),
        (r"\boxed{}", None),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed", None),
        ("42", None),
        ("", None),
    ],
)
def test_the_last_box_counts(text: str, found: str | None) -> None:
    assert boxed(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a\n#### 42", "42"),
        ("#### 1\n#### 2\n", "2"),
        ("#### 5 apples.\nmore", "5 apples"),
        ("####", None),
        ("### 5", None),
        ("", None),
    ],
)
def test_the_last_hashes_count(text: str, found: str | None) -> None:
    assert hashed(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is 18.", "18"),
        ("18, not 19!", "19"),
        ("costs $1,234.50 in all", "$1,234.50"),
        ("x = -5", "-5"),
        ("10-5", "5"),
        ("10 - 5 = 5", "5"),
        ("one half is 1/2.", "1/2"),
        ("about .75", ".75"),
        ("(1, 2, 3)", "3"),
        ("**9**", "9"),
        ("100km", "100"),
        ("2.5e3", "2.5e3"),
        ("of H2O", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_counts(text: str, found: str | None) -> None:
    assert last_number(text) == found


def test_rules_are_tried_in_their_order() -> None:
    text = "\\boxed{1}\n#### 2\n3"
    assert Math().answer(text) == "1"
    assert Math(("hashes", "boxed")).answer(text) == "2"
    assert Math(("boxed", "hashes", "last_number")).answer("#### 2\n3") == "2"
    assert Math(("boxed", "last_number")).answer("#### 2\n3") == "3"
    assert Math().answer("#### 2\n3") is None
    with pytest.raises(UserError, match="rules must be among boxed, hashes, last_number"):
        Math(("box",))  # type: ignore[arg-type]


# --- plain numbers and words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.5", Fraction(2469, 2)), ("-3/4", Fraction(-3, 4)), (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac12", Fraction(-1, 2)), ("1 1/2", Fraction(3, 2)), (r"2\frac{1}{4}", Fraction(9, 4)),
        (".5", Fraction(1, 2)), ("2.5e3", Fraction(2500)), (r"2 \times 10^{-3}", Fraction(1, 500)),
        ("3 dozen", Fraction(36)),
        (r"18\text{ cm}^2", Fraction(18)), (r"$18$", Fraction(18)), ("18 miles per hour.", Fraction(18)),
    ],
)  # fmt: skip
def test_plain_numbers_are_read_exactly(text: str, value: Fraction) -> None:
    assert plain(text) == Plain(value, False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "18x",
        "5 or 6",
        "3 squared",
        "1,2",
        "1/0",
        "10:30",
        "2 1",
        "9" * 200,
        "1e999",
        "5!",
        r"3\pi",
        "five",
        "18 m",
    ],
)
def test_what_is_no_plain_number(text: str) -> None:
    assert plain(text) is None


@pytest.mark.parametrize(
    ("gold", "said", "same"),
    [
        ("0.333333", "1/3", True), ("0.33333", "1/3", False), ("1000000", "1000001", False),
        ("1e-19", "1.1e-19", False),
        ("1e-19", "1e-19", True), ("50%", "0.5", True), ("0.5", "50%", True), ("50", "50%", True), ("50%", "50%", True),
        ("50%", "0.5%", False), ("50", "0.5", False), ("0", "0.000001", False), ("3.14159265", "3.141593", True),
    ],
)  # fmt: skip
def test_numbers_are_the_same_up_to_rounding(gold: str, said: str, same: bool) -> None:
    right, other = plain(gold), plain(said)
    assert right is not None and other is not None
    assert same_number(right, other) is same


def test_a_benchmark_may_allow_a_tolerance() -> None:
    grader = Math()
    for said, error, verdict in [("2.55", "1e-1", 1), ("2.65", "1e-1", 0), ("2.55", "", 0), ("2.55", None, 0)]:
        assert grader(f"\\boxed{{{said}}}", "2.5", {"error": error}) == {"correct": verdict}, (said, error)
    assert grader("\\boxed{9}", "2.5", {"error": "inf"}) == {"correct": 0.0}
    assert grader("\\boxed{9}", "2.5", {"error": "0.1,0.2"}) == {"correct": 0.0}


@pytest.mark.parametrize(
    ("gold", "said", "same"),
    [
        (r"\text{Evelyn}", "evelyn", True), (r"\text{(C)}", "C", True), ("x", "X", False), ("C", "C.", True),
        ("", "", False), (r"\dfrac{a}{b}", r"\frac{a}{b}", True), ("June 20", r"\text{June }20", True),
        ("east", "west", False),
    ],
)  # fmt: skip
def test_words_are_the_same_without_their_dress(gold: str, said: str, same: bool) -> None:
    assert same_words(gold, said) is same


def test_equal_answers_vote_together() -> None:
    grader, empty = Math(("boxed", "last_number")), dict[str, Any]()
    for answers in (
        ["1/2", "0.5", r"\frac{1}{2}", r"\dfrac12"],
        [r"\frac{\pi}{2}", r"\pi/2"],
        [r"\text{east}", "East"],
    ):
        votes = {grader.vote(f"\\boxed{{{answer}}}", empty) for answer in answers}
        assert len(votes) == 1 and None not in votes, votes
    assert grader.vote("\\boxed{2}", empty) != grader.vote("\\boxed{3}", empty)
    assert grader.vote("no answer", empty) is None


# --- multiple choice -------------------------------------------------------------------------------------------------

CITIES = {"A": "Paris", "B": "London", "C": "New York (city)", "D": "12 mg"}
WORDS = {word: word for word in ("yes", "no", "maybe")}


@pytest.mark.parametrize(
    ("completion", "strict"),
    [
        ("A", "A"), (" B.\n", "B"), ("(A)", "A"), ("**A**", "A"), ("Answer: A", "A"), ("The answer is (A) Paris.", "A"),
        ("B) London", "B"), ("Paris", "A"), ("C) New York (city)", "C"), ("12 mg", "D"), (r"\boxed{A}", "A"),
        (r"\boxed{\text{B}}", "B"), ("so the final answer is: **B**", "B"), ("It is not A.\nAnswer: B", "B"),
        ("Option C", "C"),
        ("A. London", None), ("I think A", None), ("a", None), ("AB", None), ("A or B", None), ("A because of B", None),
        ("the answer is E", None), ("", None), ("\n\n", None),
    ],
)  # fmt: skip
def test_the_strict_answer_is_the_label_as_it_is_asked_for(completion: str, strict: str | None) -> None:
    grader, record = Choice(), {"options": CITIES}
    assert grader.vote(completion, record) == strict
    for gold in CITIES:
        assert grader(completion, gold, record)["strict"] == float(gold == strict)


@pytest.mark.parametrize(
    ("completion", "compat"),
    [
        ("A", "A"), ("The answer is A because of B", "A"), ("First answer: B. Then the answer is C, I believe", "C"),
        ("B) since it is large", "B"), ("it must be the londan one", "B"), ("the city of new york", "C"),
        ("A man walks to paris", "A"), ("zzz###", None), ("", None), ("  ", None),
    ],
)  # fmt: skip
def test_the_compatible_answer_is_the_nearest_option(completion: str, compat: str | None) -> None:
    for gold in CITIES:
        assert Choice()(completion, gold, {"options": CITIES})["compat"] == float(gold == compat), gold


@pytest.mark.parametrize(
    ("completion", "strict", "compat"),
    [
        ("yes", "yes", "yes"), ("Yes.", "yes", "yes"), ("NO", "no", "no"), ("Answer: maybe", "maybe", "maybe"),
        ("No, because yes is wrong", None, "no"), ("Nothing.\nThe answer is yes, clearly", None, "yes"),
        ("Maybe not", None, "maybe"), ("It says no", None, "no"),
    ],
)  # fmt: skip
def test_words_are_options_in_any_case(completion: str, strict: str | None, compat: str | None) -> None:
    for gold in WORDS:
        found = Choice()(completion, gold, {"options": WORDS})
        assert found == {"strict": float(gold == strict), "compat": float(gold == compat)}, gold


def test_of_the_rules_of_compat_the_surer_comes_first() -> None:
    text = "B) I said. The answer is C, of paris paris paris"
    assert (said_so(text, CITIES), begun_with(text, CITIES)) == ("C", "B")
    assert nearest("paris paris", CITIES) == "A"
    assert Choice()(text, "C", {"options": CITIES})["compat"] == 1.0


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("B", "B"),
        (1, "B"),
        ("London", "B"),
        (" london ", "B"),
        ("b", "B"),
        (4, None),
        (True, None),
        ("Rome", None),
        ("", None),
    ],
)
def test_a_rows_answer_is_a_label_a_number_or_a_text(answer: Any, label: str | None) -> None:
    assert label_of(answer, CITIES) == label


def test_a_number_that_is_a_label_is_no_position() -> None:
    options = {"1": "red", "2": "green"}
    assert [label_of(answer, options) for answer in (1, 2, "2", "green", 0)] == ["1", "2", "2", "2", "1"]


# --- FigFont ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # 6 match, H and T out of order: (1 + 1 + 5/6) / 3 = 17/18, prefix MAR.
        ("MARTHA", "MARHTA", 17 / 18 + 0.3 * (1 / 18)),
        # D, I, O, N match in order: (4/5 + 4/8 + 1) / 3 = 23/30, prefix DI.
        ("DIXON", "DICKSONX", 23 / 30 + 0.2 * (7 / 30)),
        # R, A, E within one place of each other: (3/5 + 3/5 + 1) / 3 = 11/15, no prefix.
        ("CRATE", "TRACE", 11 / 15),
        # Below 0.7, where the bonus is given all the same: A alone, (1/4 + 1/4 + 1) / 3 = 1/2.
        ("ABCD", "AXYZ", 0.5 + 0.1 * 0.5),
        # Of five letters in common at the start four count: (5/6 + 5/6 + 1) / 3 = 8/9.
        ("ABCDEF", "ABCDEG", 8 / 9 + 0.4 * (1 / 9)),
        ("SAME", "SAME", 1.0),
        ("", "", 1.0),
        ("A", "", 0.0),
        ("ABC", "XYZ", 0.0),
    ],
)
def test_jaro_winkler_by_hand(a: str, b: str, expected: float) -> None:
    assert jaro_winkler(a, b) == pytest.approx(expected, abs=1e-12)
    assert jaro_winkler(b, a) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("completion", "exact", "normalised", "similar"),
    [
        ("WORD", 1, 1, 1.0),
        (" WORD\n", 1, 1, 1.0),
        ("word", 0, 1, 1.0),
        # W, O, R are within two places of their like, D is three away: (3/7 + 3/4 + 1) / 3 = 61/84, one letter first.
        ("W O R D", 0, 1, 61 / 84 + 0.1 * (23 / 84)),
        ("WORDS", 0, 0, 14 / 15 + 0.4 * (1 / 15)),
        ("word.", 0, 0, 14 / 15 + 0.4 * (1 / 15)),
        ("", 0, 0, 0.0),
    ],
)
def test_figfont_gives_three_figures(completion: str, exact: int, normalised: int, similar: float) -> None:
    found = FigFont()(completion, "WORD", {})
    assert (found["exact_match"], found["exact_match_normalised"]) == (exact, normalised)
    assert found["jaro_winkler"] == pytest.approx(similar)  # whatever the case, as in the paper's figures


# --- all -------------------------------------------------------------------------------------------------------------


def test_graders_are_values_found_by_name() -> None:
    found = known_graders()
    assert found.items() >= {"Choice": Choice, "ExactMatch": ExactMatch, "FigFont": FigFont, "Math": Math}.items()
    for name in ("Choice", "ExactMatch", "FigFont", "Math"):
        grader = found[name]()
        assert grader == found[name]() and hash(grader) == hash(found[name]())
        record = {"options": CITIES}
        scores = grader("x", "A", record)
        assert tuple(scores) == grader.names and all(0 <= score <= 1 for score in scores.values())
        assert grader.grade("x", "A", record, True, False) == (scores, None, True)
