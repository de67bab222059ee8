"""Broken and odd files: each is told in one line with its place, or read as stated here; no row is lost without a word.

A case says how many rows its file has, which of them are bad and why. Stopping at the first bad row, and skipping them
with a count, must both agree with that.
"""

from __future__ import annotations

import datetime
import gzip
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deft_lightning.__main__ import main
from deft_lightning.data import InstructionDataModule
from deft_lightning.data.encoding.encode import encode
from deft_lightning.data.encoding.template import set_template
from deft_lightning.data.encoding.tokenizer import build_tokenizer
from deft_lightning.data.examples import Example
from deft_lightning.data.records.formats import detect_format, normalise
from deft_lightning.data.sources.read import BadRows, read
from deft_lightning.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
QA = {"question": "2 + 2?", "answer": "4"}
USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
CHAT = {"messages": [USER, ANSWER]}

Write = Callable[[Path], Any]
Check = Callable[[list[Example]], bool]


@dataclass
class Case:
    """A file and what must come of it.

    Attributes:
        file: Name, which says the type.
        content: Bytes, or a function that writes the file.
        rows: Rows that are kept or reported when bad ones are skipped.
        bad: Number of each bad row, and words that its line must hold.
        fatal: Words of the line that ends the reading, whether bad rows are skipped or not.
        check: What must be true of the rows that are kept: how an oddity is handled.
        column_map: Canonical field to column.
    """

    file: str
    content: bytes | Write
    rows: int = 0
    bad: Mapping[int, str] = field(default_factory=dict)
    fatal: str = ""
    check: Check = bool
    column_map: Mapping[str, str] = field(default_factory=dict)


def lines(*rows: Any, end: bytes = b"\n") -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + end for row in rows)


def between(row: Any, problem: str, good: Any = QA) -> Case:
    """JSON lines with one bad row between two good ones."""
    return Case("rows.jsonl", lines(good, row, good), 3, {2: problem})


def handled(row: Any, check: Check, good: Any = QA) -> Case:
    """JSON lines with one odd row between two good ones, which is read."""
    return Case("rows.jsonl", lines(good, row, good), 3, check=lambda kept: len(kept) == 3 and check(kept[1:2]))


def qa(**changes: Any) -> dict[str, Any]:
    return {**QA, **changes}


def talk(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


def says(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def response(wanted: str) -> Check:
    return lambda kept: [e.response for e in kept] == [wanted] * len(kept) and bool(kept)


def roles(*wanted: str) -> Check:
    return lambda kept: [m["role"] for m in kept[0].messages or ()] == list(wanted)


def parquet(rows: list[dict[str, Any]], **columns: Any) -> Write:
    def write(path: Path) -> None:
        table = pa.Table.from_pylist(rows)
        for name, values in columns.items():
            table = table.append_column(name, values)
        pq.write_table(table, path)

    return write


def arrow(rows: list[dict[str, Any]], cut: int = 0) -> Write:
    def write(path: Path) -> None:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
        path.write_bytes(path.read_bytes()[: -cut or None])

    return write


def broken_text(path: Path) -> None:
    """Text of which one value is no UTF-8, as careless writers leave it: Arrow itself does not look."""
    raw = pa.array([b"fine", b"\xff\xfe", b"fine"], pa.binary())
    answers = pa.StringArray.from_buffers(3, *raw.buffers()[1:])
    table = pa.table({"question": ["a", "b", "c"], "answer": answers})
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)


def two_columns_of_a_name(path: Path) -> None:
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["question", "answer", "answer"]), path)


DEEP = b"[" * 100_000 + b"]" * 100_000
BIG = "x" * 5_000_000

# --- JSON lines -----------------------------------------------------------------------------------------------------

JSONL: dict[str, Case] = {
    "line cut short": between(b'{"question": "a", "ans', "is not JSON"),
    "comma before the brace": between(b'{"question": "a", "answer": "b",}', "is not JSON"),
    "single quotes": between(b"{'question': 'a', 'answer': 'b'}", "is not JSON"),
    "two objects on a line": between(lines(QA).strip() * 2, "is not JSON (Extra data"),
    "a list on a line": between([QA], "is a list, not an object; write one object per line"),
    "a number on a line": between(3, "got int"),
    "a text on a line": between("hello", "got str"),
    "null on a line": between(None, "got NoneType"),
    "true on a line": between(True, "got bool"),
    "no field at all": between({}, "missing field 'question'"),
    "a line of NUL bytes": between(b"\0" * 40, "is not JSON"),
    "a NUL byte within text": between(b'{"question": "a", "answer": "b\0c"}', "is not JSON (Invalid control"),
    "bytes that are not UTF-8": between('{"question": "é", "answer": "b"}'.encode("latin-1"), "is not UTF-8 text"),
    "bytes that are not UTF-8 in broken JSON": between(b'{"question": "\xff', "is not UTF-8 text"),
    "half a surrogate in bytes": between(b'{"question": "\xed\xa0\x80", "answer": "b"}', "is not UTF-8 text"),
    "half a surrogate escaped": between(b'{"question": "\\ud800", "answer": "b"}', "field 'question': holds half"),
    "nested too deeply": between(b'{"question": ' + DEEP + b', "answer": "b"}', "is not JSON (it is nested too"),
    "an integer of 5000 digits": between(b'{"question": "a", "answer": ' + b"1" * 5000 + b"}", "is not JSON (Exceeds"),
    "a key twice": between(b'{"question": "a", "answer": "b", "answer": "c"}', "has the key 'answer' twice"),
    "a key twice within a message": between(
        b'{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}', "has the key 'role' twice", CHAT
    ),
    "answer null": between(qa(answer=None), "missing field 'answer'"),
    "answer NaN": between(b'{"question": "a", "answer": NaN}', "missing field 'answer'"),
    "answer infinite": between(b'{"question": "a", "answer": -Infinity}', "field 'answer': expected text, got an inf"),
    "answer empty": between(qa(answer=""), "field 'answer': is empty"),
    "answer of blanks": between(qa(answer=" \t\n"), "field 'answer': is empty"),
    "answer an object": between(qa(answer={"a": 1}), "field 'answer': expected text, got dict"),
    "answer a nested list": between(qa(answer=[["a"]]), "field 'answer': expected text, got list"),
    "another layout among the rows": between({"instruction": "a", "output": "b"}, "missing field 'question' or"),
    "a list over lines": Case("rows.jsonl", b"[\n" + lines(QA) + b"]\n", 1, check=response("4")),
    "a bracket among the lines": between(b"[", "an object must be on one line"),
    "UTF-16": Case("rows.jsonl", lines(QA).decode().encode("utf-16"), fatal="is not UTF-8 text; it looks like UTF-16"),
    "UTF-16 without a mark": Case("rows.jsonl", lines(QA).decode().encode("utf-16-le"), fatal="looks like UTF-16"),
    # Read as they are:
    "CRLF": Case("rows.jsonl", lines(QA, QA, end=b"\r\n"), 2, check=response("4")),
    "CR alone, as old Macs wrote": Case("rows.jsonl", lines(QA, 3, QA, end=b"\r"), 3, {2: "got int"}),
    "a mark at the start": Case("rows.jsonl", b"\xef\xbb\xbf" + lines(QA, 3), 2, {2: "got int"}),
    "a mark where files were joined": handled(b"\xef\xbb\xbf" + lines(QA).strip(), response("4")),
    "no line break at the end": Case("rows.jsonl", lines(QA) + lines(QA).strip(), 2, check=response("4")),
    "blank lines, which count": Case("rows.jsonl", b"\n" + lines(QA) + b" \n" + lines(3), 2, {4: "got int"}),
    "NUL escaped": handled(qa(answer="a\0b"), response("a\0b")),
    "a line separator within text": handled(qa(answer="a\u2028b\u0085c"), response("a\u2028b\u0085c")),
    "a row of 5 MB": handled(qa(answer=BIG), response(BIG)),
    "an integer of 4000 digits": handled(qa(answer=int("7" * 4000)), response("7" * 4000)),
    "answer a number": handled(qa(answer=4.5), response("4.5")),
    "answer a truth value": handled(qa(answer=True), response("True")),
    "columns in another order": handled(dict(reversed(QA.items())), response("4")),
    "an id of 100000 letters": handled(qa(id="i" * 100_000), lambda kept: kept[0].id == "i" * 100_000),
    "an id that is a whole float": handled(qa(id=7.0), lambda kept: kept[0].id == "7"),
    "an id that is a broken float": handled(qa(id=7.5), lambda kept: kept[0].id == kept[0].digest),
    "an id that is a truth value": handled(qa(id=True), lambda kept: kept[0].id == kept[0].digest),
    "an id that is a list": handled(qa(id=[1]), lambda kept: kept[0].id == kept[0].digest),
    "an id that is NaN": handled(qa(id=float("nan")), lambda kept: kept[0].id == kept[0].digest),
    "an id of blanks": handled(qa(id=" "), lambda kept: kept[0].id == kept[0].digest),
    "an id of half a surrogate": handled(qa(id="\ud800"), lambda kept: kept[0].id == kept[0].digest),
}  # fmt: skip

# --- conversations --------------------------------------------------------------------------------------------------


def chat(*turns: Any, problem: str) -> Case:
    return between(talk(*turns), problem, CHAT)


def chats(*turns: Any, check: Check) -> Case:
    return handled(talk(*turns), check, CHAT)


TALKS: dict[str, Case] = {
    "no messages": chat(problem="field 'messages': expected a non-empty list"),
    "messages null": between({"messages": None}, "missing field 'messages'", CHAT),
    "messages an object": between({"messages": USER}, "expected a non-empty list", CHAT),
    "a message of null": chat(None, problem="field 'messages[0]': expected an object, got NoneType"),
    "messages in messages": chat([USER, ANSWER], problem="field 'messages[0]': expected an object, got list"),
    "role null": chat(says(None, "a"), problem="field 'messages[0].role': is missing"),
    "role NaN": chat(says(float("nan"), "a"), problem="field 'messages[0].role': is missing"),
    "role a number": chat(says(1, "a"), problem="field 'messages[0].role': unknown role '1'"),
    "role empty": chat(says("", "a"), problem="field 'messages[0].role': unknown role ''"),
    "role unknown": chat(USER, says("asistant", "4"), problem="messages[1].role': unknown role 'asistant'; known"),
    "role of 1 MB": chat(says("x" * 1_000_000, "a"), problem="unknown role 'xxx"),
    "content null": chat(USER, says("assistant", None), problem="field 'messages[1].content': is missing"),
    "content NaN": chat(USER, says("assistant", float("nan")), problem="field 'messages[1].content': is missing"),
    "content an object": chat(says("user", {}), ANSWER, problem="field 'messages[0].content': expected text, got dict"),
    "content a list of texts": chat(says("user", ["a"]), ANSWER, problem="expected text, got list with str"),
    "content a part without text": chat(
        says("user", [{"type": "text", "text": None}]), ANSWER, problem="messages[0].content[0].text': expected text"
    ),
    "content an image": chat(says("user", [{"type": "image"}]), ANSWER, problem="a part of type 'image'"),
    "an answer of blanks": chat(USER, says("assistant", " "), problem="field 'messages[1].content': is empty"),
    "the system alone": chat(says("system", "S"), problem="field 'messages': has no assistant turn"),
    "the user alone": chat(USER, problem="field 'messages': has no assistant turn"),
    "calls that are none": chat(
        USER, {**says("assistant", None), "tool_calls": [{}]}, problem="field 'messages[1].tool_calls[0]'"
    ),
    "a tool result without content": chat(USER, ANSWER, {"role": "tool"}, problem="messages[2].content': is missing"),
    # Read as they are:
    "the assistant first": chats(ANSWER, USER, ANSWER, check=roles("assistant", "user", "assistant")),
    "two answers in a row": chats(USER, ANSWER, ANSWER, check=roles("user", "assistant", "assistant")),
    "the user last": chats(
        USER, ANSWER, USER, check=lambda kept: kept[0].response is None and len(kept[0].prompt) == 3
    ),
    "content a number": chats(USER, says("assistant", 4), check=response("4")),
    "a question of no letters": chats(says("user", ""), ANSWER, check=response("4")),
    "roles in other cases": chats(says("User", "a"), says("ASSISTANT", "b"), check=roles("user", "assistant")),
    "keys that hold null": chats(
        {**USER, "tool_calls": None, "name": None}, {**ANSWER, "function_call": None},
        check=lambda kept: kept[0].messages == (USER, ANSWER),
    ),
}  # fmt: skip

# --- other files ----------------------------------------------------------------------------------------------------

FILES: dict[str, Case] = {
    **{
        f"no bytes, {kind}": Case(f"rows.{kind}", b"", fatal="is not a" if kind in ("parquet", "arrow") else "is empty")
        for kind in ("jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow")
    },
    "no bytes, jsonl.gz": Case("rows.jsonl.gz", b"", fatal="is empty"),
    "gz of nothing": Case("rows.csv.gz", gzip.compress(b""), fatal="is empty"),
    "gz that is text": Case("rows.jsonl.gz", lines(QA), fatal="cannot be read (Not a gzipped file"),
    "gz cut short": Case("rows.jsonl.gz", gzip.compress(lines(*[QA] * 99))[:-9], fatal="is cut short or damaged"),
    "gz with a wrong checksum": Case(
        "rows.jsonl.gz", gzip.compress(lines(QA))[:-8] + b"\0" * 8, fatal="cannot be read (CRC check failed"
    ),
    "gz damaged within": Case(
        "rows.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\xff" * 99, fatal="is cut short or damaged"
    ),
    "zst that is text": Case("rows.jsonl.zst", lines(QA), fatal="cannot be read (ZSTD"),
    "gz of bad rows": Case("rows.jsonl.gz", gzip.compress(lines(QA, 3, QA)), 3, {2: "got int"}),
    # A list hides where the row after a broken one begins, so that nothing can be skipped.
    "json cut short": Case("rows.json", json.dumps([QA] * 9).encode()[:-30], fatal="row 9: is not JSON"),
    "json with a comma at the end": Case("rows.json", lines([QA])[:-2] + b",]", fatal="row 2: is not JSON"),
    "json lines in json": Case("rows.json", lines(QA, QA), fatal="use .jsonl for one object per line"),
    "json nested too deeply": Case("rows.json", DEEP, fatal="row 1: is not JSON (it is nested too deeply"),
    "json of another kind": Case("rows.json", lines([QA, 3, None, qa(answer="")]), 4,
                                 {2: "got int", 3: "got NoneType", 4: "field 'answer': is empty"}),
    "json with a key twice": Case(
        "rows.json", b'[{"question": "a", "answer": "b"}, {"question": "a", "question": "b", "answer": "c"}]', 2,
        {2: "has the key 'question' twice"},
    ),
    "json that is not UTF-8": Case(
        "rows.json", b'[{"question": "a", "answer": "b"}, {"question": "\xff", "answer": "c"}]', 2,
        {2: "is not UTF-8 text"},
    ),
    "json of UTF-16": Case("rows.json", json.dumps([QA]).encode("utf-16"), fatal="looks like UTF-16"),
    "json with a mark": Case("rows.json", b"\xef\xbb\xbf" + lines([QA]), 1, check=response("4")),
    "json over CRLF": Case("rows.json", json.dumps([QA], indent=2).replace("\n", "\r\n").encode(), 1),
    "csv of a header alone": Case("rows.csv", b"question,answer\n", fatal="is empty"),
    "csv without a header": Case("rows.csv", b"1 + 1?,2\n2 + 2?,4\n", 1, {1: "the fields 1 + 1?, 2 fit no known"}),
    "csv with semicolons": Case("rows.csv", b"question;answer\na;4\n", 1, check=response("4")),
    "csv with tabs": Case("rows.csv", b"question\tanswer\na\t4\n", 1, check=response("4")),
    "tsv with commas": Case("rows.tsv", b"question,answer\na,4\n", 1, check=response("4")),
    "csv with semicolons that nothing agrees on": Case(
        "rows.csv", b"frage;antwort\na;b\nc;d;e\n", fatal="has one column, 'frage;antwort'"
    ),
    "csv with a column twice": Case("rows.csv", b"question,answer,answer\na,b,c\n", fatal="two columns are named"),
    "csv with a row too long": Case("rows.csv", b"question,answer\na,b\nc,d,e\nf,g\n", 3, {2: "has more fields"}),
    "csv with a row too short": Case("rows.csv", b"question,answer\na,b\nc\nf,g\n", 3, {2: "missing field 'answer'"}),
    "csv with a quote left open": Case(
        "rows.csv", b'question,answer\na,b\n"c,d\ne,f\n', fatal="row 2, after line 2: is not CSV (a quote that opens"
    ),
    "csv with a header left open": Case("rows.csv", b'question,"answer\na,b\n', fatal="header, after line"),
    "csv with letters behind a quote": Case("rows.csv", b'question,answer\na,"b"c\nd,e\n', 2, {1: "is not CSV"}),
    "csv that is not UTF-8": Case("rows.csv", b"question,answer\na,b\n\xff,d\ne,f\n", 3, {2: "is not UTF-8 text"}),
    "csv with a header that is not UTF-8": Case("rows.csv", b"question,\xff\na,b\n", fatal="header: is not UTF-8"),
    "csv of UTF-16": Case("rows.csv", "question,answer\na,b\n".encode("utf-16"), fatal="looks like UTF-16"),
    # Records count, not lines: neither the header nor blank lines, and a record over lines is one.
    "csv with records over lines": Case("rows.csv", b'question,answer\n"a\nb",c\n\n\nd,\n', 2, {2: "'answer': is"}),
    "csv with CRLF": Case("rows.csv", b"question,answer\r\na,4\r\n", 1, check=response("4")),
    "csv with CR": Case("rows.csv", b"question,answer\ra,4\rb,4\r", 2, check=response("4")),
    "csv with NUL": Case("rows.csv", b"question,answer\na,4\0\n", 1, check=response("4\0")),
    "csv with a field of 5 MB": Case("rows.csv", f"question,answer\na,{BIG}\n".encode(), 1, check=response(BIG)),
    "tsv with quotes within": Case("rows.tsv", b'question\tanswer\nsay "hi"\t4\n', 1, check=response("4")),
    "a column that is not there": Case(
        "rows.jsonl", lines(QA, QA), 2, {1: "fit no known format", 2: "fit no known"}, column_map={"answer": "gold"}
    ),
    "a path through what is no object": Case(
        "rows.jsonl", lines(qa(extra={"gold": "4"}), qa(extra="x"), qa(extra=None), qa(extra=[1])), 4,
        dict.fromkeys((2, 3, 4), "missing field 'extra.gold'"), column_map={"answer": "extra.gold"},
    ),
    "parquet that is text": Case("rows.parquet", lines(QA), fatal="is not a parquet file"),
    "parquet cut short": Case(
        "rows.parquet", lambda path: (parquet([QA] * 50)(path), path.write_bytes(path.read_bytes()[:-40])),
        fatal="is not a parquet file",
    ),
    "parquet damaged within": Case(
        "rows.parquet",
        lambda path: (
            parquet([qa(answer=f"{i}{'x' * 50}") for i in range(500)])(path),
            path.write_bytes(path.read_bytes()[:200] + b"\xff" * 3000 + path.read_bytes()[3200:]),
        ),
        fatal="cannot be read",
    ),
    "parquet without rows": Case(
        "rows.parquet", lambda path: pq.write_table(pa.table({"a": pa.array([], pa.string())}), path), fatal="is empty"
    ),
    "parquet with a column twice": Case("rows.parquet", two_columns_of_a_name, fatal="two columns are named 'answer'"),
    "arrow that is text": Case("rows.arrow", lines(QA), fatal="is not an arrow file"),
    "arrow cut short": Case("rows.arrow", arrow([QA] * 50, cut=40), fatal="is not an arrow file"),
    "arrow with text that is not UTF-8": Case("rows.arrow", broken_text, 3, {2: "cannot be read"}),
    "parquet with nulls": Case(
        "rows.parquet", parquet([QA, qa(answer=None), qa(question=None)]), 3,
        {2: "missing field 'answer'", 3: "missing field 'question'"},
    ),
    "parquet with bytes": Case("rows.parquet", parquet([qa(answer=b"\xc3\xa9")]), 1, check=response("é")),
    "parquet with bytes that are not UTF-8": Case(
        "rows.parquet", parquet([qa(answer=b"x"), qa(answer=b"\xff")]), 2, {2: "field 'answer': holds bytes that are"}
    ),
    "parquet with dates": Case(
        "rows.parquet", parquet([qa(answer=datetime.date(2024, 2, 29))]), 1, check=response("2024-02-29")
    ),
    "parquet with times": Case(
        "rows.parquet", parquet([qa(answer=datetime.datetime(2024, 2, 29, 12, 30))]), 1,
        check=response("2024-02-29T12:30:00"),
    ),
    "parquet with decimals": Case("rows.parquet", parquet([qa(answer=Decimal("4.50"))]), 1, check=response("4.50")),
    "parquet with durations": Case(
        "rows.parquet", parquet([qa(answer=datetime.timedelta(1))]), 1, {1: "expected text, got timedelta"}
    ),
    "parquet with a date out of range": Case(
        "rows.parquet", parquet([QA, QA], when=pa.array([0, 2**40], pa.timestamp("s"))), 2, {2: "cannot be read"}
    ),
    "parquet with objects and null": Case(
        "rows.parquet", parquet([{"x": {"q": "a", "a": "4"}}, {"x": None}, {"x": {"q": "b", "a": None}}]), 3,
        {2: "missing field 'x.q'", 3: "missing field 'x.a'"}, column_map={"question": "x.q", "answer": "x.a"},
    ),
    "parquet with a list of tokens and null": Case(
        "rows.parquet", parquet([{"input_ids": [1, 2]}, {"input_ids": [1, None]}, {"input_ids": []}]), 3,
        {2: "field 'input_ids': expected a non-empty list of integers", 3: "field 'input_ids': expected"},
    ),
    # Arrow gives every message the keys of all; what it fills in is None, and must not be read as text.
    "parquet with messages of different keys": Case(
        "rows.parquet",
        parquet([{"messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
            {"role": "assistant", "tool_calls": [{"name": "g", "arguments": {"y": "2"}}]},
            {"role": "tool", "content": "c", "name": "f"},
        ]}]), 1,
        check=lambda kept: "None" not in str(kept[0].messages) and kept[0].messages == (
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "",
             "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
            {"role": "assistant", "content": "",
             "tool_calls": [{"type": "function", "function": {"name": "g", "arguments": {"y": "2"}}}]},
            {"role": "tool", "content": "c", "name": "f"},
        ),
    ),
    "parquet with parts of different kinds": Case(
        "rows.parquet",
        parquet([
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, says("assistant", [])]},
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "u"}]}, says("assistant", [])]},
        ]), 2, {1: "messages[1].content': is empty", 2: "a part of type 'image'"},
    ),
    "tokens as floats": Case("rows.jsonl", lines({"input_ids": [1.0, 2.0]}), 1, {1: "field 'input_ids': expected"}),
    "tokens as text": Case("rows.jsonl", lines({"input_ids": "1 2"}), 1, {1: "field 'input_ids': expected"}),
    "tokens as texts": Case("rows.jsonl", lines({"input_ids": ["1"]}), 1, {1: "field 'input_ids': expected"}),
    "labels of another length": Case(
        "rows.jsonl", lines({"input_ids": [1, 2], "labels": [1]}), 1, {1: "field 'labels': has 1 entries"}
    ),
    "a prompt of texts": Case("rows.jsonl", lines({"prompt": ["a"], "completion": "b"}), 1, {1: "field 'prompt[0]'"}),
    "a prompt of nothing": Case("rows.jsonl", lines({"prompt": [], "completion": "b"}), 1, {1: "field 'prompt'"}),
}  # fmt: skip

CASES = {**JSONL, **TALKS, **FILES}
every_case = pytest.mark.parametrize("name", CASES)


def run(case: Case, source: Path | str, on_bad_row: Callable[[UserError], None] | None) -> list[Example]:
    """Read a source as the data module does: the first usable row says the format."""
    kept: list[Example] = []
    format = ""
    for where, record in read(str(source), on_bad_row=on_bad_row):
        try:
            format = format or detect_format(record, where, case.column_map)
            kept.append(normalise(record, where, format, case.column_map))
        except UserError as error:
            if on_bad_row is None:
                raise
            on_bad_row(error)
    return kept


def written(case: Case, folder: Path) -> Path:
    path = folder / case.file
    if callable(case.content):
        case.content(path)
    else:
        path.write_bytes(case.content)
    return path


def one_line(error: BaseException, *parts: str) -> None:
    message = str(error)
    assert isinstance(error, UserError) and len(message.splitlines()) == 1 and len(message) < 1500
    assert all(part in message for part in parts), message


def test_there_are_enough_cases_and_names_do_not_hide_each_other() -> None:
    assert len(CASES) == len(JSONL) + len(TALKS) + len(FILES) >= 100


@pytest.mark.slow
@every_case
def test_reading_stops_at_the_first_bad_row_with_one_line_or_reads_all(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    path = written(case, tmp_path)
    if not case.fatal and not case.bad:
        kept = run(case, path, None)
        assert len(kept) == case.rows and case.check(kept)
        return
    with pytest.raises(UserError) as caught:
        run(case, path, None)
    first = f"row {min(case.bad)}" if case.bad else ""
    one_line(caught.value, str(path), first, case.fatal or case.bad[min(case.bad)])


@pytest.mark.slow
@every_case
def test_skipping_loses_no_row_without_a_word(tmp_path: Path, name: str) -> None:
    case, bad = CASES[name], BadRows(shown=10)
    path = written(case, tmp_path)
    if case.fatal:
        with pytest.raises(UserError) as caught:
            run(case, path, bad)
        one_line(caught.value, str(path), case.fatal)
        return
    kept = run(case, path, bad)
    assert len(kept) + len(bad) == case.rows and len(bad) == len(case.bad) == len(bad.first)
    for message, (row, problem) in zip(bad.first, sorted(case.bad.items()), strict=True):
        one_line(UserError(message), f"{path}, row {row}", problem)
    assert not kept or case.check(kept)
    report = bad.write(tmp_path / "bad.tsv").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[:2] for line in report[1:]] == [[str(path), str(row)] for row in sorted(case.bad)]


@pytest.mark.slow
@every_case
def test_what_is_kept_survives_a_tokenizer(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    if case.fatal or "5 MB" in name or "5000" in name:
        return
    tokenizer = build_tokenizer(["a few words"], 0)
    set_template(tokenizer, "chatml")
    for kept in run(case, written(case, tmp_path), BadRows()):
        if kept.messages:
            assert (encode(tokenizer, kept).turn >= 0).any()


# --- paths ----------------------------------------------------------------------------------------------------------

PLAIN = Case("", b"")


@pytest.mark.parametrize(
    "name", ["with blanks.jsonl", "日本 é 😀.jsonl", "a'b\"c.jsonl", "a, row 3.jsonl", "50%&x=1.jsonl", "[x].jsonl"]
)
def test_a_path_of_any_letters_is_read_and_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / name).write_bytes(lines(QA, 3))
    bad = BadRows()
    assert len(run(PLAIN, tmp_path / "a b" / name, bad)) == 1
    assert f"{tmp_path}/a b/{name}, row 2" in bad.first[0]
    assert bad.write(tmp_path / "bad.tsv").read_text().splitlines()[1].startswith(f"{tmp_path}/a b/{name}\t2\t")


def missing(folder: Path) -> Path:
    return folder / "rows.jsonl"


def loop(folder: Path) -> Path:
    (folder / "rows.jsonl").symlink_to(folder / "other.jsonl")
    (folder / "other.jsonl").symlink_to(folder / "rows.jsonl")
    return folder / "rows.jsonl"


def dangling(folder: Path) -> Path:
    (folder / "rows.jsonl").symlink_to(folder / "nowhere.jsonl")
    return folder / "rows.jsonl"


def too_long(folder: Path) -> Path:
    return folder / ("x" * 5000 + ".jsonl")


def with_nul(folder: Path) -> Path:
    return folder / "a\0b.jsonl"


def below_a_file(folder: Path) -> Path:
    (folder / "rows.jsonl").write_bytes(lines(QA))
    return folder / "rows.jsonl" / "more.jsonl"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "rows.jsonl")
    return folder / "rows.jsonl"


@pytest.mark.parametrize("make", [missing, loop, dangling, too_long, with_nul, below_a_file, pipe])
def test_a_path_that_leads_nowhere_is_one_line(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(UserError) as caught:
        run(PLAIN, make(tmp_path), None)
    one_line(caught.value, str(tmp_path), "--data.source")


def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(QA))
    path.chmod(0)
    if os.access(path, os.R_OK):  # as root: what others would meet

        def refuse(*_: Any, **__: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError) as caught:
        run(PLAIN, path, BadRows())
    one_line(caught.value, str(path), "cannot be read (Permission denied)")


def test_a_folder_of_good_and_broken_files_names_the_broken_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(QA, 3))
    (tmp_path / "b.csv").write_bytes(b"question,answer\na,b\nc,d,e\n")
    bad = BadRows()
    assert len(run(PLAIN, tmp_path, bad)) == 2
    assert f"{tmp_path}/a.jsonl, row 2" in bad.first[0] and f"{tmp_path}/b.csv, row 2" in bad.first[1]
    (tmp_path / "c.jsonl.gz").write_bytes(b"hello")
    with pytest.raises(UserError) as caught:
        run(PLAIN, tmp_path, BadRows())
    one_line(caught.value, f"{tmp_path}/c.jsonl.gz")


# --- through the data module ----------------------------------------------------------------------------------------


def module(folder: Path, *rows: Any, **options: Any) -> InstructionDataModule:
    build_tokenizer(["a few words"], 0).save_pretrained(folder / "tokenizer")
    (folder / "rows.jsonl").write_bytes(lines(*rows))
    return InstructionDataModule(
        str(folder / "rows.jsonl"), tokenizer=str(folder / "tokenizer"), validation_fraction=0.0, **options
    )


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input_ids": [5, -5, 6]}, "field 'input_ids[1]': token -5"),
        ({"input_ids": [5, 10**6]}, "field 'input_ids[1]': token 1000000"),
        ({"input_ids": [5, 6], "labels": [-100, -1]}, "field 'labels[1]': token -1"),
    ],
)
def test_tokens_outside_the_vocabulary_are_one_line(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        module(tmp_path, {"input_ids": [5, 6]}, row).setup("fit")
    one_line(caught.value, "rows.jsonl, row 2", says)


def test_rows_without_a_label_are_dropped_and_counted(tmp_path: Path) -> None:
    data = module(tmp_path, {"input_ids": [5, 6]}, {"input_ids": [5, 6], "labels": [-100, -100]})
    data.setup("fit")
    assert (data.reports["train"].examples, data.reports["train"].dropped) == (1, 1)


def test_ids_that_rows_share_are_told_apart(tmp_path: Path) -> None:
    rows = [qa(id="x"), qa(id="x", answer="5"), qa(id="x"), qa(id=None), qa(id=None)]
    data = module(tmp_path, *rows, batch_size=5)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert len(set(batch["example_id"])) == 5


def test_calls_that_the_built_tokenizers_template_cannot_write_are_one_line(tmp_path: Path) -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    with pytest.raises(UserError) as caught:
        module(tmp_path, CHAT, talk(USER, turn)).setup("fit")
    one_line(caught.value, "rows.jsonl, row 2", "tool calls of message 2", "--data.chat_template")
    module(tmp_path, CHAT, talk(USER, turn), chat_template="chatml").setup("fit")


# --- the command line -----------------------------------------------------------------------------------------------

TOLD = [
    "line cut short", "nested too deeply", "half a surrogate escaped", "role unknown", "gz cut short", "json cut short",
    "csv with a quote left open", "csv with semicolons that nothing agrees on", "parquet that is text",
    "a column that is not there", "UTF-16", "parquet with bytes that are not UTF-8",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TOLD)
def test_the_command_line_ends_with_one_line_and_status_2(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    path = written(case, tmp_path)
    mapped = [part for item in case.column_map.items() for part in (f"--data.column_map.{item[0]}", item[1])]
    args = ["fit", "--config", str(ROOT / "configs" / "from_scratch.yaml"), "--data.source", str(path), *mapped]
    monkeypatch.setattr(sys, "argv", ["deft_lightning", *args, "--trainer.default_root_dir", str(tmp_path / "logs")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    told = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and error.rstrip().splitlines()[-1] == told[0] and "Traceback" not in error
    assert str(path) in told[0] and (case.fatal or case.bad[min(case.bad)]) in told[0]


# --- the paper's layout ---------------------------------------------------------------------------------------------


def test_the_papers_parquet_layout_loads_through_its_config(tmp_path: Path) -> None:
    import yaml

    rows = [
        {
            "data_source": "numina",
            "prompt": [{"role": "user", "content": f"{i} + {i}? Put it in a box."}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            "extra_info": {"index": i, "split": "train", "question": f"{i} + {i}?", "answer": f"It is {2 * i}."},
        }
        for i in range(30)
    ]
    rows[7]["extra_info"]["answer"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=8)
    config = yaml.safe_load((ROOT / "configs" / "data" / "math.yaml").read_text())["data"]
    case, bad = Case("", b"", column_map=config["column_map"]), BadRows()
    kept = run(case, tmp_path / "train.parquet", bad)
    assert [e.messages for e in kept] == [
        ({"role": "user", "content": f"{i} + {i}?"}, {"role": "assistant", "content": f"It is {2 * i}."})
        for i in range(30)
        if i != 7
    ]
    assert "row 8: missing field 'extra_info.answer'" in bad.first[0] and len(bad) == 1
    # Where no response is needed, the prompt is still the question and not the column of that name.
    where, row = next(iter(read(str(tmp_path / "train.parquet"))))
    assert detect_format(row, where, case.column_map, need_response=False) == "question_answer"
    data = InstructionDataModule(str(tmp_path / "train.parquet"), on_bad_row="skip", **config)
    with pytest.warns(UserWarning, match="skipped 1 row"):
        data.setup("fit")
    assert data.reports["train"].examples + data.reports["validation"].examples == 29
