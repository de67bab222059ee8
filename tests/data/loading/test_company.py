"""Answers behind other answers: who stands in front of whom, what stays of a row, and what a batch brings along."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deft_lightning.data.examples import Prepared, Unprompted
from deft_lightning.data.loading.collate import TrainCollator, unprompted_fields
from deft_lightning.data.loading.company import ROOM, Company, written_out

SYSTEM, HEADER, END = [1, 2], [7, 8], 9


def row(answer: list[int], question: tuple[int, ...] = (20, 21), source: int = 0) -> Prepared:
    prompt = [*SYSTEM, *question, *HEADER]
    ids = np.array([*prompt, *answer, END])
    labels = np.where(np.arange(len(ids)) < len(prompt), -100, ids)
    return Prepared("r", ids, labels, np.zeros_like(ids), source=source)


def text(*tokens: int) -> Prepared:
    ids = np.array([1, *tokens])
    return Prepared("t", ids, np.array([-100, *tokens]), np.zeros_like(ids))


def questions(at: int) -> tuple[int, ...]:
    """Questions of which no two end or begin alike."""
    return (1000 + at, 2000 + at)


def rows_of(count: int, tokens: int = 3, source: int = 0) -> list[Prepared]:
    return [row([100 + at] * tokens, questions(at), source) for at in range(count)]


def company(rows: list[Prepared], limit: int | None = None, most: int | None = None) -> Company:
    return Company(len(rows), rows.__getitem__, np.array([len(one.input_ids) for one in rows]), limit, most)


def in_front(answer: Unprompted) -> set[int]:
    """Say whose answers stand in front, by their tokens."""
    return {int(token) - 100 for token in answer.ahead[answer.frame :] if token >= 100}


def test_an_answer_keeps_its_header_alone_and_stands_behind_the_frame_and_other_answers() -> None:
    rows = rows_of(40)
    made = company(rows)
    for at, one in enumerate(rows):
        answer = made.of(at, one)
        assert answer.input_ids.tolist() == [*HEADER, 100 + at, 100 + at, 100 + at, END]
        assert answer.labels.tolist() == [-100, -100, 100 + at, 100 + at, 100 + at, END]
        assert answer.ahead[: answer.frame].tolist() == SYSTEM and len(answer.ahead) == answer.frame + ROOM
        assert answer.ahead[-1] == END, "the nearest answer is whole"
    assert made.ahead == ROOM and made.whole == 0


@pytest.mark.parametrize("count", [1, 2, 3, 5, 20, 600])
def test_nobody_stands_in_front_of_his_own_answer(count: int) -> None:
    rows = rows_of(count)
    made = company(rows)
    answers = [made.of(at, one) for at, one in enumerate(rows)]
    for at, answer in enumerate(answers):
        assert at not in in_front(answer)
        assert bool(in_front(answer)) == (count > 1), "somebody does wherever there is another"
    assert len({answer.key for answer in answers}) <= 2
    assert len({len(answer.ahead) for answer in answers}) == 1, "one shape for a batch"
    for one, other in ((a, b) for a in answers for b in answers if a.key == b.key):
        assert one.ahead is other.ahead
    if count == 600:
        assert max(in_front(answers[0])) > 50, "neighbours in a file may be of one kind: who stands there is drawn"
        assert sum(answer.key == answers[0].key for answer in answers) > 500


def test_who_stands_in_front_is_a_function_of_the_rows() -> None:
    one, other = company(rows_of(100)), company(rows_of(100))
    assert all(a.tolist() == b.tolist() for a, b in zip(of_all(one, 100), of_all(other, 100), strict=True))


def of_all(made: Company, count: int) -> list[Any]:
    return [made.of(at, one).ahead for at, one in enumerate(rows_of(count))]


def test_answers_stand_behind_those_of_their_source() -> None:
    rows = [*rows_of(40), *(row([500 + at] * 3, questions(at), source=1) for at in range(40))]
    made = company(rows)
    for at, one in enumerate(rows):
        there = in_front(made.of(at, one))
        assert all((number >= 400) is (at >= 40) for number in there)
        assert (at if at < 40 else at + 360) not in there


def test_a_source_with_one_answer_borrows_from_another() -> None:
    rows = [*rows_of(40), row([900] * 3, questions(50), source=1)]
    made = company(rows)
    assert made.ahead == ROOM and 800 not in in_front(made.of(40, rows[40]))


def test_a_source_that_was_not_looked_at_has_company_too() -> None:
    rows = rows_of(40)
    answer = company(rows).of(99, row([700], questions(99), source=3))
    assert len(answer.ahead) == answer.frame + ROOM


def test_a_row_without_a_prompt_has_no_answer_to_read() -> None:
    rows = [*rows_of(20), text(60, 61), row([3], ())]
    made = company(rows)
    for at in (20, 21):
        answer = made.of(at, rows[at])
        assert not len(answer.input_ids) and not len(answer.labels)
    assert made.whole == 2 and made.looked == 22
    only = company([text(60 + at) for at in range(5)])
    assert only.whole == 5 and only.ahead == 0 and not len(only.of(0, text(60)).input_ids)


@pytest.mark.parametrize(("limit", "room"), [(None, ROOM), (200, ROOM), (40, 40 - 2 - 18), (20, 0), (5, 0)])
def test_a_model_with_few_positions_gets_what_it_has_positions_for(limit: int | None, room: int) -> None:
    rows = [*rows_of(30), row([77] * 15, questions(40))]  # the longest answer: 2 of header, 15, 1
    made = company(rows, limit)
    assert made.ahead == room
    answer = made.of(30, rows[30])
    if limit is not None and limit >= 20:
        assert len(answer.ahead) + len(answer.input_ids) <= limit


def test_of_a_long_answer_the_first_labels_are_read() -> None:
    rows = [row(list(range(100, 130)), questions(at)) for at in range(20)]
    answer = company(rows, most=5).of(0, rows[0])
    assert answer.input_ids.tolist() == [*HEADER, 100, 101, 102, 103, 104]
    assert answer.labels.tolist() == [-100, -100, 100, 101, 102, 103, 104]
    assert len(answer.ahead) == answer.frame + ROOM and answer.ahead[-1] == END, "those in front are whole"


def test_a_row_written_out_has_the_labels_of_the_answer_alone() -> None:
    rows = rows_of(5)
    answer = company(rows).of(0, rows[0])
    ids, labels = written_out(answer)
    assert ids.tolist() == [*answer.ahead, *answer.input_ids]
    assert labels.tolist() == [*[-100] * len(answer.ahead), *answer.labels]


def test_a_batch_has_each_row_in_front_once() -> None:
    rows = rows_of(30)
    made = company(rows)
    answers = [made.of(at, one) for at, one in enumerate(rows)]
    fields = unprompted_fields(answers, pad_id=0)
    assert len(fields["ahead_ids"]) == 2 and fields["frame"] == 2 and fields["has_prompt"].all()
    for answer, place, ids, labels in zip(
        answers, fields["ahead"], fields["unprompted_ids"], fields["unprompted_labels"], strict=True
    ):
        assert fields["ahead_ids"][place].tolist() == answer.ahead.tolist()
        size = len(answer.input_ids)
        assert ids[:size].tolist() == answer.input_ids.tolist() and not ids[size:].any()
        assert labels[:size].tolist() == answer.labels.tolist() and (labels[size:] == -100).all()
    none = unprompted_fields([made.of(0, text(60))] * 2, pad_id=0)
    assert none["unprompted_ids"].shape == (2, 2) and not none["has_prompt"].any(), "the model runs on every rank"


@given(
    st.lists(st.lists(st.integers(10, 99), max_size=40), min_size=1, max_size=40), st.integers(50, 300),
    st.lists(st.booleans(), min_size=40, max_size=40), st.booleans(), st.sampled_from([None, 1, 7]),
)  # fmt: skip
@settings(deadline=None, max_examples=100, derandomize=True)
def test_every_label_of_a_batch_is_read_once_and_in_order(
    answers: list[list[int]], limit: int, prompted: list[bool], packed: bool, most: int | None
) -> None:
    rows = [row(answer, (20, 21) if asks else ()) for answer, asks in zip(answers, prompted, strict=False)]
    made = company(rows, limit, most)
    given = [
        Prepared(one.id, one.input_ids, one.labels, one.noise_code, unprompted=made.of(at, one))
        for at, one in enumerate(rows)
    ]
    batch = TrainCollator(0, packed)([given[:2], given[2:]] if packed and len(given) > 2 else given)
    read = batch["unprompted_labels"][batch["unprompted_labels"] != -100]
    assert torch.equal(batch["labels"][batch["unprompted_at"]], read)
    for number, one in enumerate(rows):
        places = batch["unprompted_at"] & (batch["segment"] == number)
        count = int((one.labels != -100).sum()) if batch["has_prompt"][number] else 0
        assert int(places.sum()) == min(count, most or count)
    longest = max(limit, *(len(one.input_ids) + len(SYSTEM) for one in rows))
    assert len(batch["ahead_ids"][0]) + batch["unprompted_ids"].shape[1] <= longest
