"""Answers without their prompts: which tokens stay."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deft_lightning.data.examples import Prepared
from deft_lightning.data.loading.unprompted import Frame, frame_of, without_prompt

SYSTEM, HEADER, END = [1, 2], [7, 8], 9  # what every prompt has in front and behind


def row(question: list[int], answer: list[int], number: int = 0) -> Prepared:
    prompt = [*SYSTEM, *question, *HEADER]
    ids = np.array([*prompt, *answer, END])
    labels = np.where(np.arange(len(ids)) < len(prompt), -100, ids)
    return Prepared(f"r{number}", ids, labels, np.zeros_like(ids))


def questions(count: int) -> list[list[int]]:
    return [[20 + i, 30 + i % 3, 40 + i % 5] for i in range(count)]


def test_the_frame_is_what_prompts_share() -> None:
    rows = [row(question, [50, 51]) for question in questions(20)]
    assert frame_of(rows) == Frame(before=2, after=2)


def test_one_odd_prompt_in_ten_does_not_change_the_frame() -> None:
    rows = [row(question, [50]) for question in questions(19)]
    odd = Prepared("odd", np.array([60, 61, 62]), np.array([-100, -100, 62]), np.zeros(3, dtype=np.int64))
    assert frame_of([*rows, odd]) == Frame(before=2, after=2)


def test_a_question_that_is_left_out_leaves_frame_and_answer() -> None:
    bare = without_prompt(row([20, 21, 22], [50, 51]), Frame(2, 2))
    assert bare is not None
    assert bare.input_ids.tolist() == [1, 2, 7, 8, 50, 51, 9]
    assert bare.labels.tolist() == [-100, -100, -100, -100, 50, 51, 9]


def test_every_turn_of_a_conversation_keeps_its_header_alone() -> None:
    ids = np.array([1, 2, 20, 7, 8, 50, 9, 21, 22, 7, 8, 51, 9])
    learnt = np.isin(np.arange(13), [5, 6, 11, 12])
    conversation = Prepared("c", ids, np.where(learnt, ids, -100), np.zeros_like(ids))
    bare = without_prompt(conversation, Frame(2, 2))
    assert bare is not None and bare.input_ids.tolist() == [1, 2, 7, 8, 50, 9, 7, 8, 51, 9]


def test_rows_that_are_answer_alone_have_nothing_to_leave_out() -> None:
    ids = np.array([1, 50, 51])
    text = Prepared("t", ids, np.array([-100, 50, 51]), np.zeros_like(ids))
    assert without_prompt(text, Frame(1, 1)) is None
    masked = Prepared("m", ids, np.full(3, -100), np.zeros_like(ids))
    assert without_prompt(masked, Frame(1, 1)) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=30), st.integers(0, 4),
       st.integers(1, 4), st.booleans())  # fmt: skip
@settings(deadline=None, max_examples=200, derandomize=True)
def test_no_label_is_lost_or_moved(tokens: list[tuple[int, bool]], before: int, after: int, weighted: bool) -> None:
    ids = np.array([token for token, _ in tokens])
    learnt = np.array([False, *(learn for _, learn in tokens[1:])])
    labels = np.where(learnt, ids, -100)
    weight = np.where(learnt, 1.0 + np.arange(len(ids)), 0).astype(np.float32) if weighted else None
    bare = without_prompt(Prepared("x", ids, labels, np.zeros_like(ids), weight=weight), Frame(before, after))
    if bare is None:
        return
    kept = bare.labels != -100
    assert bare.labels[kept].tolist() == ids[learnt].tolist()
    assert not kept[0], "a first token has nothing before it that could say it"
    assert len(bare.input_ids) < len(ids)
    if weight is not None:
        assert bare.weight is not None and bare.weight[kept].tolist() == weight[learnt].tolist()
