"""Label noise finds the answer of a text where graders find it, and what it found before stays as it was."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deft_lightning.answers.locate import answer_box, boxed, boxes, last_box
from deft_lightning.data.noise import AnswerCorrupt, CharNoise, OptionFlip, apply_edits
from deft_lightning.data.noise.steps import steps
from deft_lightning.evaluation.graders.choice import Choice
from deft_lightning.evaluation.graders.mathematics import Math

WITH_A_NUMBER = [
    r"So $\boxed{12}$.",
    r"So $\fbox{12}$.",
    r"So \fbox {12}.",
    r"So \boxed 12.",
    r"At first \fbox{7}, then \fbox{12}.",
    r"\fbox{\fbox{12}}",
]


@pytest.mark.parametrize("how", ["digits", "offset"])
@pytest.mark.parametrize("text", WITH_A_NUMBER)
def test_the_number_that_a_grader_reads_is_the_one_that_noise_changes(text: str, how: str) -> None:
    grader = Math()
    assert grader(text, "12", {}) == {"correct": 1.0}
    for i in range(10):
        edits = AnswerCorrupt(rate=1.0, style="boxed", how=how).edit("s", f"{i}", text, "")  # type: ignore[arg-type]
        assert edits is not None
        wrong = apply_edits(text, edits, 1, [])[0]
        assert grader(wrong, "12", {}) == {"correct": 0.0}
        assert boxed(wrong) is not None and boxed(wrong) != "12"


@pytest.mark.parametrize("text", [r"\boxed{B}", r"So \boxed B", r"So it is $\boxed B$."])
def test_the_option_that_a_grader_reads_is_the_one_that_noise_flips(text: str) -> None:
    options = {label: f"text {label}" for label in "ABCD"}
    assert Choice().vote(text, {"options": options}) == "B"
    edits = OptionFlip(rate=1.0).edit("s", "id", text, "")
    assert edits is not None
    flipped = apply_edits(text, edits, 1, [])[0]
    assert Choice().vote(flipped, {"options": options}) in {"A", "C", "D"}


@pytest.mark.parametrize("box", [r"\boxed{12 cm}", r"\fbox{12 cm}", r"\boxed twelve", r"\boxed{never closed"])
def test_misspelling_and_broken_steps_leave_what_a_grader_reads(box: str) -> None:
    text = f"First words. {box}"
    edits = CharNoise(rate=1.0, cer=1.0).edit("s", "id", text, "")
    assert edits is not None
    assert apply_edits(text, edits, 1, [])[0].endswith(box)
    assert [step.answer for step in steps(f"One.\nIt is {box}\nDone.\nEnd.")] == [False, True, False, True]


def test_where_there_is_a_box_of_braces_noise_keeps_to_it_as_ever() -> None:
    text = r"\boxed{3} and \fbox{4}"
    box = answer_box(text)
    assert box is not None and text[box.start : box.end] == "3"
    assert boxed(text) == "4"


# The reading of noise before both had one, for comparison.
def _boxed_by_noise(text: str) -> list[tuple[int, int]]:
    found = []
    for opening in re.finditer(r"\\boxed\s*\{", text):
        depth, at = 1, opening.end()
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 2 if text[at] == "\\" else 1
        found.append((opening.end(), at - 1 if not depth else -1))
    return found


pieces = st.sampled_from(["\\boxed", "\\fbox", "\\", "{", "}", "7", " ", "\n", "x", "boxed", "\\{", "\\\\"])


@pytest.mark.slow
@settings(deadline=None, max_examples=2000, derandomize=True)
@given(st.lists(pieces, max_size=14).map("".join))
def test_what_noise_found_before_it_finds_still(text: str) -> None:
    before = _boxed_by_noise(text)
    box = answer_box(text)
    if before:
        assert box is not None and (box.start, box.end) == before[-1]
    else:
        assert box == last_box(text)
    assert {(box.start, box.end) for box in boxes(text)} >= set(before)
    read = boxed(text)
    assert read is None or read in {text[box.start : box.end].strip() for box in boxes(text)}


def test_boxes_within_each_other_take_time_that_grows_with_the_text_alone() -> None:
    assert len(boxes("\\boxed{" * 20_000)) == 20_000
