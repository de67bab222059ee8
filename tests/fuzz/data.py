"""Malformed data files, drawn from a seed: odd values in every field, bytes flipped, cut off, shuffled or repeated."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TEXT = (".jsonl", ".json", ".csv", ".tsv")
KINDS = (*TEXT, *(f"{kind}{how}" for kind in TEXT for how in (".gz", ".zst")), ".parquet", ".arrow", ".stream.arrow")
WORDS = (
    "4", "two and two", "", " ", "\0", "\x1b[2J", "\u202eabc", "\u2028", "é😀" * 50, "x" * 100_000, "<|im_end|>", '"',
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 2**70, 1.5, float("inf"), float("nan"), [], {}, [[]], [None], {"": None}, ["a", 1], "\ud800",
    b"\xff", {"type": "text", "text": 3}, [{"type": "text"}], datetime(1, 1, 1), Decimal("1e30"),
    [[[[[[["deep"]]]]]]],
)  # fmt: skip


def cases(seed: int, count: int, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield malformed files one after the other: a name for each, and a command line that reads it.

    Args:
        seed: Of all that is drawn.
        count: How many.
        folder: Where the files go.
    """
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        kind, how = draw.choice(KINDS), draw.choice(list(DAMAGE))
        path = folder / f"{number}{kind}"
        _write(path, kind, [_malformed_row(draw) for _ in range(draw.randrange(1, 30))], draw)
        path.write_bytes(DAMAGE[how](path.read_bytes(), draw))
        bad, template = draw.choice(("error", "skip")), draw.choice(("chatml", "null"))
        yield f"{number}{kind}, {how}, {bad}", [
            "preview", "--data.source", str(path), "--data.on_bad_row", bad, "--data.chat_template", template,
            "--data.validation_fraction", draw.choice(("0", "0.3")), "--data.tokenizer_size", "0",
            "--data.cache", "false", "--output", str(folder / "page.html"), "--trainer.accelerator", "cpu",
            "--trainer.logger", "false",
        ]  # fmt: skip


def _value(draw: random.Random) -> Any:
    return draw.choice(ODD) if draw.random() < 0.2 else draw.choice(WORDS) if draw.random() < 0.5 else "some words"


def _turn(draw: random.Random) -> Any:
    if draw.random() < 0.1:
        return _value(draw)
    turn = {"role": draw.choice(("user", "assistant", "system", "tool", "", 3)), "content": _value(draw)}
    if draw.random() < 0.2:
        turn[draw.choice(("tool_calls", "name", "weight", "from", "value"))] = _value(draw)
    return turn


def _malformed_row(draw: random.Random) -> Any:
    rows: dict[str, Callable[[], Any]] = {
        "answer": lambda: {"question": _value(draw), "answer": _value(draw), "id": _value(draw)},
        "messages": lambda: {"messages": [_turn(draw) for _ in range(draw.randrange(4))], "tools": _value(draw)},
        "alpaca": lambda: {"instruction": _value(draw), "input": _value(draw), "output": _value(draw)},
        "text": lambda: {"text": _value(draw)},
        "tokens": lambda: {"input_ids": [draw.randrange(-2, 300) for _ in range(5)], "labels": _value(draw)},
        "nothing": lambda: _value(draw),
    }
    weights = (6, 3, 1, 1, 1, 0.3)
    return draw.choices(list(rows.values()), weights)[0]()


def _plain(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _write(path: Path, kind: str, rows: list[Any], draw: random.Random) -> None:
    records = [row if isinstance(row, dict) else {"value": row} for row in rows]
    if kind.endswith((".parquet", ".arrow")):
        _columns(path, kind, records)
        return
    if kind.startswith((".csv", ".tsv")):
        out = io.StringIO(newline="")
        table = csv.writer(out, delimiter="\t" if kind.startswith(".tsv") else ",")
        table.writerow(records[0])
        table.writerows([_plain(value) for value in record.values()] for record in records)
        text = out.getvalue()
    else:
        texts = [json.dumps(row, default=_plain, ensure_ascii=draw.random() < 0.5) for row in rows]
        text = "[" + ",".join(texts) + "]" if kind.startswith(".json.") or kind == ".json" else "\n".join(texts)
    content = text.encode("utf-8", "surrogatepass")
    if kind.endswith(".gz"):
        content = gzip.compress(content, mtime=0)
    elif kind.endswith(".zst"):
        content = pa.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)


def _columns(path: Path, kind: str, records: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for record in records for name in record))
    columns = {}
    for name in names:
        values = [record.get(name) for record in records]
        try:
            columns[name] = pa.array(values, from_pandas=False)
        except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError, OverflowError):  # not of one type
            columns[name] = pa.array([_plain(value).encode("utf-8", "replace").decode() for value in values])
    table = pa.table(columns)
    if kind == ".parquet":
        try:
            pq.write_table(table, path)
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid):  # an object without a key
            pq.write_table(pa.table({"question": ["a"], "answer": ["b"]}), path)
        return
    make = pa.ipc.new_stream if kind == ".stream.arrow" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
        writer.write_table(table)


# --- damage to the bytes ---------------------------------------------------------------------------------------------


def _flip(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 3, 30))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def _shuffle(content: bytes, draw: random.Random) -> bytes:
    size = max(1, len(content) // draw.choice((3, 10, 50)))
    parts = [content[at : at + size] for at in range(0, len(content), size)]
    draw.shuffle(parts)
    return b"".join(parts)


def _repeat(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + content[at // 2 :]


def _noise(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + draw.randbytes(draw.randrange(1, 200)) + content[at + draw.randrange(50) :]


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "odd values": lambda content, draw: content,
    "flipped": _flip,
    "cut off": _cut,
    "shuffled": _shuffle,
    "repeated": _repeat,
    "noise": _noise,
}
