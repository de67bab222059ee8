"""Trees of messages: each gives the conversation of its best replies, and what is left out is counted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deft_lightning.data.sources.layouts import Expected
from deft_lightning.data.sources.read import read
from deft_lightning.data.sources.remarks import Remarks
from deft_lightning.data.sources.rows import BadRows
from deft_lightning.errors import UserError


def message(id: str, parent: str | None, role: str, rank: int | None = None, **more: Any) -> dict[str, Any]:
    return {"message_id": id, "parent_id": parent, "text": f"text {id}", "role": role, "rank": rank, **more}


TREES = [
    message("q", None, "prompter", message_tree_id="q"),
    message("a1", "q", "assistant", 1),
    message("a0", "q", "assistant", 0),
    message("f1", "a0", "prompter"),
    message("f2", "a0", "prompter"),
    message("b", "f1", "assistant", 0),
    message("c", "a1", "prompter"),
    message("p", None, "prompter", message_tree_id="p"),
    message("pa", "p", "assistant", 0, deleted=True),
    message("pb", "p", "assistant", 3),
    message("pc", "pb", "prompter"),
    message("pd", "pa", "prompter"),
    message("lost", "nobody", "assistant", 0),
    message("alone", None, "prompter"),
]
CONVERSATIONS = [
    {"id": "b", "turns": ["user q", "assistant a0", "user f1", "assistant b"]},
    {"id": "pb", "turns": ["user p", "assistant pb"]},
]
LEFT_OUT = 14 - 6


def plain(records: list[Any]) -> list[dict[str, Any]]:
    return [
        {
            "id": record["id"],
            "turns": [f"{turn['role']} {turn['content'].removeprefix('text ')}" for turn in record["messages"]],
        }
        for record in records
    ]


def rows_of(source: Path, expected: Expected | None = None) -> tuple[list[Any], list[str]]:
    remarks = Remarks()
    rows = [row for _, row in read(str(source), expected=expected or Expected(), on_remark=remarks)]
    return rows, remarks.lines()


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("seed", range(5))
def test_flat_messages_in_any_order_give_the_path_of_the_best_replies(tmp_path: Path, seed: int) -> None:
    rows = [row for row in TREES if row["message_id"] != "f2"]  # which of two without a rank is the first one's
    random.Random(seed).shuffle(rows)
    found, said = rows_of(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert sorted(plain(found), key=lambda one: str(one["id"])) == CONVERSATIONS
    assert (
        len(said) == 1 and f"3 trees of messages give 2 conversations, of the best replies; {LEFT_OUT - 1}" in said[0]
    )


def test_what_is_left_out_is_counted_with_its_reason(tmp_path: Path) -> None:
    found, said = rows_of(write_jsonl(tmp_path / "rows.jsonl", TREES))
    assert plain(found) == CONVERSATIONS
    assert said == [
        f"{tmp_path}/rows.jsonl: 3 trees of messages give 2 conversations, of the best replies; {LEFT_OUT} messages are"
        " left out (2 without an answer, 2 deleted or rejected, with their replies,"
        " 1 without the message that they answer, 3 of another rank, or replies to such)"
    ]


def test_parquet_and_rows_without_empty_fields_give_the_same(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"deleted": False, **row} for row in TREES]), tmp_path / "rows.parquet")
    assert plain(rows_of(tmp_path / "rows.parquet")[0]) == CONVERSATIONS
    bare = [{key: value for key, value in row.items() if value is not None} for row in TREES]
    assert plain(rows_of(write_jsonl(tmp_path / "bare.jsonl", bare))[0]) == CONVERSATIONS


def nested(id: str) -> dict[str, Any]:
    own = next(row for row in TREES if row["message_id"] == id)
    return {**own, "replies": [nested(row["message_id"]) for row in TREES if row["parent_id"] == id]}


def test_whole_trees_in_rows_give_the_same_conversations(tmp_path: Path) -> None:
    rows = [{"message_tree_id": id, "tree_state": "ready_for_export", "prompt": nested(id)} for id in ("q", "p")]
    rows.append({"message_tree_id": "r", "tree_state": "aborted_low_grade", "prompt": nested("q")})
    found, said = rows_of(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert [one["turns"] for one in plain(found)] == [one["turns"] for one in CONVERSATIONS]
    assert [one["id"] for one in found] == ["q", "p"]
    assert len(said) == 1 and "3 trees of messages give 2 conversations" in said[0] and "rejected" in said[0]


def test_what_is_wrong_with_a_message_is_a_bad_row(tmp_path: Path) -> None:
    rows = [*TREES, message("q", None, "prompter"), {**message("x", "q", "assistant"), "text": None}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    bad = BadRows()
    assert plain([row for _, row in read(str(path), on_bad_row=bad)]) == CONVERSATIONS
    assert len(bad) == 2 and "row 15" in bad.first[0] and "is the message of" in bad.first[0]
    assert "row 16, field 'text': is missing" in bad.first[1]


def test_a_format_or_a_column_map_says_that_rows_are_no_trees(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", TREES)
    assert rows_of(path, Expected("text")) == (TREES, []) == rows_of(path, Expected(column_map={"text": "text"}))


@pytest.mark.parametrize(
    "row",
    [
        {"message_id": 1, "text": "a", "role": "author"},
        {"text": "a", "role": "assistant"},
        {"message_id": 1, "parent_id": 2, "text": "a"},
        {"prompt": {"text": "a"}, "completion": "b"},
    ],
)
def test_other_rows_are_left_as_they_are(tmp_path: Path, row: dict[str, Any]) -> None:
    assert rows_of(write_jsonl(tmp_path / "rows.jsonl", [row, row])) == ([row, row], [])


def test_trees_without_an_answer_are_one_line_and_circles_end(tmp_path: Path) -> None:
    circle = [message("a", "b", "prompter"), message("b", "a", "assistant"), message("c", None, "prompter")]
    with pytest.raises(UserError, match=r"rows\.jsonl: .*nothing is left to learn \(.*2 without the message"):
        rows_of(write_jsonl(tmp_path / "rows.jsonl", circle))


def test_a_deep_tree_is_read_or_refused_in_a_line(tmp_path: Path) -> None:
    deep = [message("0", None, "prompter")]
    deep += [message(str(i), str(i - 1), "assistant" if i % 2 else "prompter", 0) for i in range(1, 5000)]
    found, _ = rows_of(write_jsonl(tmp_path / "rows.jsonl", deep))
    assert len(found) == 1 and len(found[0]["messages"]) == 5000
