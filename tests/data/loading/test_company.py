"""Answers one after another: who meets whom, what stands in a row, and whose values are whose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deft_lightning.data.examples import Prepared
from deft_lightning.data.loading import company
from deft_lightning.data.loading.company import Group, better_read, by_member, chains_of, groups_of
from deft_lightning.data.loading.unprompted import Frame

SYSTEM, HEADER, END = [1, 2], [7, 8], 9
FRAME = Frame(2, 2)


def row(answer: list[int], question: tuple[int, ...] = (20, 21), source: int = 0) -> Prepared:
    prompt = [*SYSTEM, *question, *HEADER]
    ids = np.array([*prompt, *answer, END])
    labels = np.where(np.arange(len(ids)) < len(prompt), -100, ids)
    return Prepared("r", ids, labels, np.zeros_like(ids), source=source)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 31, 32, 33, 200])
def test_every_example_is_judged_once_and_never_ahead_of_itself(count: int) -> None:
    positions = list(range(100, 100 + count))
    groups = groups_of(positions)
    assert sorted(at for group in groups for at in group.members) == positions
    for group in groups:
        assert not set(group.ahead) & set(group.members) and len(set(group.ahead)) == len(group.ahead)
        assert len(group.ahead) == min(4, count - len(group.members)) and len(group.members) <= 16
        assert group.ahead or count == 1, "somebody stands in front wherever there is another"
    assert groups_of(positions) == groups
    if count == 200:
        assert groups[0].members != tuple(positions[:16]), "neighbours in a file may be of one kind"


@pytest.mark.parametrize("alone", [True, False])
def test_a_model_reads_answers_in_the_way_that_it_finds_more_probable(alone: bool) -> None:
    groups, asked = groups_of(range(100)), list[int]()

    def log_prob(some: Sequence[Group]) -> float:
        asked.extend(at for group in some for at in group.members)
        return -1.0 if (len(some[0].members) == 1) is alone else -2.0

    read = better_read(groups, log_prob)
    assert [at for group in read for at in group.members] == [at for group in groups for at in group.members]
    assert all(group == Group((), group.members) and len(group.members) == 1 for group in read) is alone
    assert (read == groups) is not alone and len(asked) == 2 * 32, "a few groups are tried, both ways"


def test_a_row_is_the_frame_once_and_each_answer_with_its_header() -> None:
    rows = {0: row([50]), 1: row([51, 52]), 2: row([53])}
    (chain,), whole = chains_of(Group((0,), (1, 2)), rows.__getitem__, FRAME)
    assert chain.row.input_ids.tolist() == [1, 2, 7, 8, 50, 9, 7, 8, 51, 52, 9, 7, 8, 53, 9]
    assert chain.row.labels.tolist() == [-100] * 8 + [51, 52, 9, -100, -100, 53, 9]
    assert chain.members == (1, 2) and chain.counts == (3, 2) and whole == ()


def test_a_row_that_is_full_is_followed_by_one_with_the_latest_answers_in_front(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(company, "LONGEST", 14)
    monkeypatch.setattr(company, "AHEAD_TOKENS", 8)
    rows = {at: row([50 + at]) for at in range(4)}
    chains, _ = chains_of(Group((0,), (1, 2, 3)), rows.__getitem__, FRAME)
    assert [chain.members for chain in chains] == [(1, 2), (3,)]
    assert chains[0].row.input_ids.tolist() == [1, 2, 7, 8, 50, 9, 7, 8, 51, 9, 7, 8, 52, 9]
    assert chains[1].row.input_ids.tolist() == [1, 2, 7, 8, 51, 9, 7, 8, 52, 9, 7, 8, 53, 9]


def test_of_one_long_answer_the_end_stands_in_front() -> None:
    long = row(list(range(1000, 1600)))
    (chain,), _ = chains_of(Group((0,), (1,)), {0: long, 1: row([50])}.__getitem__, FRAME)
    assert chain.row.input_ids.tolist() == [1, 2, *range(1600 - 63, 1600), 9, 7, 8, 50, 9]
    assert (chain.row.labels != -100).sum() == 2


def test_a_model_with_few_positions_gets_what_it_has_positions_for() -> None:
    rows = {0: row(list(range(30, 40))), 1: row(list(range(50, 60)))}
    for limit in (15, 16, 20):
        (chain,), _ = chains_of(Group((0,), (1,)), rows.__getitem__, FRAME, limit)
        assert len(chain.row.input_ids) == limit and chain.counts == (11,)


def test_answers_of_one_source_stand_together_and_rows_without_a_prompt_alone() -> None:
    text = np.array([1, 60, 61])
    alone = Prepared("t", text, np.array([-100, 60, 61]), np.zeros_like(text))
    rows = {0: row([50], source=1), 1: row([51]), 2: alone, 3: row([52], source=1), 4: row([53])}
    (chain, other), whole = chains_of(Group((), (0, 1, 2, 3, 4)), rows.__getitem__, FRAME)
    assert chain.members == (1, 4, 0, 3) and whole == (2,)
    assert other.members == (2,) and other.row is alone and other.counts == (2,)


@given(
    st.lists(st.lists(st.integers(10, 99), max_size=40), min_size=1, max_size=40), st.integers(0, 3),
    st.integers(50, 300), st.lists(st.booleans(), min_size=40, max_size=40),
)  # fmt: skip
@settings(deadline=None, max_examples=100, derandomize=True)
def test_every_label_comes_back_to_its_example(
    answers: list[list[int]], before: int, limit: int, prompted: list[bool]
) -> None:
    """A model that says of each label its own number."""
    rows = [row(answer, (20, 21) if asks else ()) for answer, asks in zip(answers, prompted, strict=False)]
    values = dict[int, np.ndarray]()  # type: ignore[type-arg]
    for group in groups_of(range(len(rows))):
        chains, _ = chains_of(group, rows.__getitem__, Frame(before, 2), limit)
        for chain in chains:
            assert len(chain.row.input_ids) == len(chain.row.labels) <= limit
        said = [chain.row.labels[1:][chain.row.labels[1:] != -100].astype(np.float32) for chain in chains]
        values |= by_member(chains, said)
    assert sorted(values) == list(range(len(rows)))
    for at, example in enumerate(rows):
        assert values[at].tolist() == example.labels[example.labels != -100].tolist()
