"""JSON files as people write them: one row, one conversation, a list where lines were promised, objects over lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deft_lightning.data.records.formats import CONVERSATIONS, OTHERS
from deft_lightning.data.sources import json_window
from deft_lightning.data.sources.layouts import FORMS, Expected
from deft_lightning.data.sources.read import read
from deft_lightning.data.sources.remarks import Remarks
from deft_lightning.data.sources.rows import BadRows
from deft_lightning.errors import UserError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
QA = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(4)]


def rows_of(source: Path | str, expected: Expected | None = None) -> tuple[list[Any], list[str]]:
    """The records of a source, and what was remarked."""
    remarks = Remarks()
    records = [record for _, record in read(str(source), expected=expected or Expected(), on_remark=remarks)]
    return records, remarks.lines()


def test_the_fields_of_every_format_make_a_row() -> None:
    known = {name: layout.fields for name, layout in CONVERSATIONS.items()} | OTHERS
    assert {name: FORMS.get(name) for name in known} == known


ONE_ROW: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "messages and tools": {"messages": TURNS, "tools": [{"name": "search"}]},
    "conversations": {"id": 1, "conversations": SHARED},
    "conversations as text": {"conversations": json.dumps(SHARED), "tags": ["a"]},
    "a prompt of turns": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "alpaca with a list": {"instruction": "a", "input": "", "output": "b", "references": [{"text": "c"}]},
    "alpaca with a history": {"instruction": "a", "output": "b", "history": [["c", "d"]]},
    "SQuAD": {"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}},
    "answers": {"question": "q", "answers": ["a", "b"]},
    "tokens": {"input_ids": [1, 2], "labels": [1, 2]},
    "text": {"text": "once", "tags": ["a", "b"]},
    "text and pieces of it": {"text": "once upon", "pieces": [{"text": "once"}, {"text": "upon"}]},
    "text parts": {"question": [{"type": "text", "text": "q"}], "answer": "a"},
    "capitals": {"Instruction": "a", "Output": "b", "sources": [{"url": "c"}]},
}


@pytest.mark.parametrize("name", ONE_ROW)
def test_an_object_with_the_fields_of_a_row_is_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "row.json").write_text(json.dumps(ONE_ROW[name], indent=1))
    records, said = rows_of(tmp_path / "row.json")
    assert records == [ONE_ROW[name]]
    lists_of_objects = name in ("messages and tools", "alpaca with a list", "text and pieces of it", "capitals")
    assert len(said) == lists_of_objects and all("is read as one row" in line for line in said)


WRAPPED: dict[str, Any] = {
    "data": {"data": QA},
    "with what is said of it": {"name": "mine", "version": 1, "data": QA},
    "rows under the name of a field": {"conversations": QA},
    "a text and rows": {"instruction": "Rows of ours", "rows": QA},
    "an answer is lacking": {"question": "what is this?", "rows": QA},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_an_object_around_a_list_is_no_row(tmp_path: Path, name: str) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(WRAPPED[name]))
    assert rows_of(tmp_path / "rows.json") == (QA, [])


def test_a_row_without_a_response_is_one_where_none_is_needed(tmp_path: Path) -> None:
    row = {"question": "q", "links": ["a", "b"]}
    (tmp_path / "row.json").write_text(json.dumps(row))
    assert rows_of(tmp_path / "row.json", Expected(need_response=False))[0] == [row]
    assert rows_of(tmp_path / "row.json")[0] == ["a", "b"]


def test_a_column_map_and_a_format_say_what_a_row_is(tmp_path: Path) -> None:
    row = {"q": "q", "a": "b", "text": "c", "links": [{"url": "d"}]}
    (tmp_path / "row.json").write_text(json.dumps(row))
    (tmp_path / "dialog.json").write_text(json.dumps({"dialog": TURNS, "tags": ["x"]}))
    mapped = Expected("question_answer", {"question": "q", "answer": "a"})
    assert rows_of(tmp_path / "row.json", mapped)[0] == [row]
    assert rows_of(tmp_path / "row.json", Expected("alpaca"))[0] == row["links"]
    assert rows_of(tmp_path / "dialog.json", Expected(column_map={"messages": "dialog"}))[0] == [
        {"dialog": TURNS, "tags": ["x"]}
    ]


def test_a_conversation_under_another_name_is_one_row_that_a_column_map_reads(tmp_path: Path) -> None:
    (tmp_path / "dialog.json").write_text(json.dumps({"id": 3, "dialog": TURNS}))
    assert rows_of(tmp_path / "dialog.json")[0] == [{"id": 3, "dialog": TURNS}]


def test_a_text_beside_rows_of_their_own_is_an_error_that_says_how_to_choose(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps({"text": "Rows of ours", "rows": QA}))
    with pytest.raises(UserError, match=r"rows\.json: has the field 'text'.*'rows'.*--data\.column_map\.text none"):
        rows_of(tmp_path / "rows.json")
    assert rows_of(tmp_path / "rows.json", Expected(column_map={"text": "none"}))[0] == QA


@pytest.mark.parametrize(
    "table",
    [
        {"question": ["a", "b"], "answer": ["c", "d"]},
        {"question": {"0": "a", "1": "b"}, "answer": {"0": "c", "1": "d"}},
    ],
)
def test_a_table_by_columns_is_named(tmp_path: Path, table: Any) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"holds columns.*orient='records'"):
        rows_of(tmp_path / "rows.json")


# --- lists of turns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [TURNS, SHARED, [TURNS[0], {"role": "assistant", "tool_calls": [{"name": "f"}]}]])
@pytest.mark.parametrize("name", ["row.json", "row.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_of_turns_is_one_conversation(tmp_path: Path, turns: Any, name: str, indent: int | None) -> None:
    (tmp_path / name).write_text(json.dumps(turns, indent=indent))
    assert rows_of(tmp_path / name)[0] == [{"messages": turns}]


def test_each_list_of_turns_among_others_is_a_conversation(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([TURNS, SHARED]))
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(TURNS)}\n\n{json.dumps(SHARED)}\n")
    for name in ("rows.json", "rows.jsonl"):
        assert rows_of(tmp_path / name)[0] == [{"messages": TURNS}, {"messages": SHARED}]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_turns_among_other_items_are_rows_in_their_order(tmp_path: Path, at: int) -> None:
    items: list[Any] = list(TURNS)
    items.insert(at, {"text": "a"})
    (tmp_path / "rows.json").write_text(json.dumps(items))
    found = list(read(f"{tmp_path}/rows.json"))
    assert [record for _, record in found] == items
    assert [where.rpartition(" ")[2] for where, _ in found] == ["1", "2", "3"]


def test_a_folder_of_rows_is_read_file_by_file_and_said_once(tmp_path: Path) -> None:
    rows = [{"instruction": f"i{n}", "output": "b", "references": [{"text": "c"}]} for n in range(3)]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.json").write_text(json.dumps(row))
    (tmp_path / "3.json").write_text(json.dumps(TURNS))
    records, said = rows_of(tmp_path)
    assert records == [*rows, {"messages": TURNS}]
    assert len(said) == 1 and said[0].endswith("(and so of 2 more)") and "0.json" in said[0]


# --- lines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("indent", [None, 1, 4])
@pytest.mark.parametrize("blank", ["", "\n \n"])
def test_a_list_in_jsonl_is_read_as_one_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, chunk: int, blank: str
) -> None:
    monkeypatch.setattr(json_window, "CHUNK", chunk)
    (tmp_path / "rows.jsonl").write_text(blank + json.dumps(QA, indent=indent) + "\n\n")
    records, said = rows_of(tmp_path / "rows.jsonl")
    assert records == QA and len(said) == 1 and "holds one list" in said[0]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("between", ["\n", "\n\n", ""])
def test_objects_over_several_lines_are_read_one_after_the_other_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: str, chunk: int
) -> None:
    monkeypatch.setattr(json_window, "CHUNK", chunk)
    (tmp_path / "rows.jsonl").write_text("\n" + between.join(json.dumps(row, indent=2) for row in QA))
    records, said = rows_of(tmp_path / "rows.jsonl")
    assert records == QA and len(said) == 1 and "several lines" in said[0]


@pytest.mark.parametrize("first", ['{"question": ', '{"question": "a', "{", '{"question": [', '{"a": 1}{"b": 2}'])
def test_a_first_line_that_is_broken_is_one_bad_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    monkeypatch.setattr(json_window, "CHUNK", 10)
    lines = ["", first, *map(json.dumps, QA)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    bad = BadRows()
    assert [record for _, record in read(f"{tmp_path}/rows.jsonl", on_bad_row=bad)] == QA
    assert len(bad) == 1 and "rows.jsonl, row 2: is not JSON" in bad.first[0]
