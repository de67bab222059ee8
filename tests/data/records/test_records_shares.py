"""How much of the loss a row, a turn or a token has, under every name that exporters use."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deft_lightning.data.encoding.encode import tokenise
from deft_lightning.data.encoding.tokenizer import build_tokenizer
from deft_lightning.data.examples import Example
from deft_lightning.data.records.formats import normalise
from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX

WHERE = "rows.jsonl, row 4"
QA = {"question": "2 + 2?", "answer": "4"}


def talk(first: dict[str, Any], second: dict[str, Any], user: dict[str, Any] | None = None) -> Example:
    turns = [
        {"role": "user", "content": "Capital of Norway?", **(user or {})},
        {"role": "assistant", "content": "BERGEN", **first},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Oslo", **second},
    ]
    return normalise({"messages": turns}, WHERE, "messages", {})


@pytest.mark.parametrize(
    ("key", "off", "on"),
    [("weight", 0, 1), ("train", False, True), ("loss", False, True), ("loss_mask", 0, 1), ("loss_weight", 0.0, 1.0)],
)
def test_a_turn_of_weight_0_is_context(key: str, off: Any, on: Any) -> None:
    marked, plain = talk({key: off}, {key: on}), talk({}, {})
    tokenizer = build_tokenizer(["x"], 0)
    (prepared,), (whole,) = tokenise(tokenizer, [marked], [()]), tokenise(tokenizer, [plain], [()])
    text = tokenizer.decode(prepared.labels[prepared.labels != IGNORE_INDEX])
    assert text == "Oslo<|end|>" and prepared.weight is None  # masked, and nothing else about it
    assert prepared.input_ids.tolist() == whole.input_ids.tolist() and marked.digest == plain.digest


def test_a_weight_between_reaches_every_token_of_its_turn_and_multiplies_that_of_the_row() -> None:
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5},
                           {"role": "assistant", "content": "c"}], "weight": 3}  # fmt: skip
    (prepared,) = tokenise(build_tokenizer(["x"], 0), [normalise(record, WHERE, "messages", {})], [()])
    assert prepared.weight is not None and prepared.weight.dtype == np.float32
    assert prepared.weight[prepared.labels != IGNORE_INDEX].tolist() == [1.5, 1.5, 3, 3]
    assert (prepared.weight[prepared.labels == IGNORE_INDEX] == 0).all()


def test_a_turn_of_the_user_may_say_that_it_is_not_learnt() -> None:
    assert talk({}, {}, {"weight": 0}).messages == talk({}, {}).messages


@pytest.mark.parametrize("value", [-1, float("inf"), "much", [1]])
def test_a_weight_that_is_none_is_one_line(value: Any) -> None:
    with pytest.raises(UserError, match=r"row 4, field 'messages\[1\].weight': expected true, false, or a finite"):
        talk({"weight": value}, {})


def test_two_keys_that_say_different_things_are_one_line() -> None:
    with pytest.raises(UserError, match="the keys weight and train disagree"):
        talk({"weight": 1, "train": False}, {})


def test_the_column_weight_counts_if_it_holds_a_number() -> None:
    for value, weight in ((0.5, 0.5), ("2", 2.0), ("70 kg", 1.0), (None, 1.0), (True, 1.0)):
        assert normalise({**QA, "weight": value}, WHERE, "question_answer", {}).weight == weight


def test_the_column_that_is_asked_for_must_be_there() -> None:
    def read(record: dict[str, Any]) -> float:
        return normalise(record, WHERE, "question_answer", {}, weight_column="score.mean").weight

    assert read({**QA, "score": {"mean": 0.25}}) == 0.25
    assert read({**QA, "score": {"mean": False}}) == 0.0
    for record, says in ((QA, "is missing"), ({**QA, "score": {"mean": -1}}, "at least 0")):
        with pytest.raises(UserError, match=rf"row 4, field 'score.mean': .*{says}"):
            read(record)


def test_weights_of_tokens_stand_beside_them() -> None:
    record = {"input_ids": [5, 6, 7, 8], "weights": [1, 0.5, 0, 2], "loss_mask": [0, 1, 1, 1], "weight": 2}
    (prepared,) = tokenise(build_tokenizer(["x"], 0), [normalise(record, WHERE, "tokens", {})], [()])
    assert prepared.labels.tolist() == [IGNORE_INDEX, 6, IGNORE_INDEX, 8]
    assert prepared.weight is not None and prepared.weight.tolist() == [0, 1, 0, 4]


@pytest.mark.parametrize("weights", [[1, 1], "1 1 1", [1, -1, 1], [1, None, 1]])
def test_weights_of_tokens_that_do_not_fit_are_one_line(weights: Any) -> None:
    with pytest.raises(UserError, match="row 4, field 'weights"):
        normalise({"input_ids": [5, 6, 7], "weights": weights}, WHERE, "tokens", {})
