"""Answers without their prompts: which tokens stay, and where the values of a pass belong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deft_lightning.data.examples import Prepared
from deft_lightning.data.loading.unprompted import Frame, Unprompted, frame_of, without_prompt
from deft_lightning.errors import UserError

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


def test_values_stand_at_the_labels_of_their_example() -> None:
    values = Unprompted.of([np.array([-1.0, -2.0], np.float32), np.array([], np.float32), np.array([-3.0], np.float32)])
    assert values.at(0, np.array([-100, 5, -100, 6])).tolist() == [0, -1, 0, -2]
    assert values.at(1, np.array([-100, -100])).tolist() == [0, 0]
    assert values.at(2, np.array([-100, 4])).tolist() == [0, -3]


def test_values_for_another_number_of_labels_are_no_match() -> None:
    values = Unprompted.of([np.array([-1.0], np.float32)])
    with pytest.raises(UserError, match="1 values for 2 labels of example 0"):
        values.at(0, np.array([-100, 5, 6]))


def damaged(kind: str, file: Path) -> None:
    if kind == "cut off":
        file.write_bytes(file.read_bytes()[:-30])
    elif kind == "another file":
        file.write_text("no archive", encoding="utf-8")
    elif kind == "above 0":
        np.savez(file.open("wb"), values=np.array([1.0], np.float32), starts=np.array([0, 1]))
    elif kind == "fewer values":
        np.savez(file.open("wb"), values=np.zeros(1, np.float32), starts=np.array([0, 2]))


@pytest.mark.parametrize("kind", ["cut off", "another file", "above 0", "fewer values", "another number of examples"])
def test_a_kept_file_that_is_damaged_counts_as_none(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "kept.npz"
    values = Unprompted.of([np.array([-1.5], np.float32)])
    values.save(file)
    kept = Unprompted.load(file, 1)
    assert kept is not None and kept.values.tolist() == [-1.5] and kept.starts.tolist() == [0, 1]
    damaged(kind, file)
    assert Unprompted.load(file, 2 if kind == "another number of examples" else 1) is None
    assert Unprompted.load(tmp_path / "absent.npz", 1) is None
