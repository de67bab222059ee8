"""Predictions files that are not what `score` expects, by a seed."""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    None, True, 0, -1, 2.5, float("nan"), float("inf"), 10**400, "", " ", "\x00", "\ud800", "\x1b[2J", "\u202e", [],
    [[]], [None], ["a", 3], {}, {"": ""}, {"a": {"b": []}}, "x" * 10_000,
]  # fmt: skip
FIELDS = ["completions", "gold", "id", "benchmark", "truncated", "record"]
RECORD = ["options", "source", "error"]
BENCHMARKS = ["", "math500", "gsm8k", "medical", "pubmedqa", "figfont", "os.system", "no.such.module", "..", "a.", "."]
HOSTILE = ["1e400", "nan", "9^{9^{9}}", "(" * 300, "\\frac{" * 40, "10^9!", "\\infty", "{" * 3000, "\U0001f4a5" * 300]


def cases(seed: int, count: int, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of a case and the arguments of the command line; the file lies in the folder.

    Args:
        seed: Chooses the cases; the same seed gives the same ones.
        count: Number of cases.
        folder: Where the files are written.
    """
    rng = random.Random(seed)
    kinds = [_field, _record, _missing, _hostile, _encoded, _torn, _output, _no_file]
    for i in range(count):
        kind = kinds[i % len(kinds)]
        path = folder / f"score-{seed}-{i}.jsonl"
        name, more = kind(rng, path)
        yield f"score {i}: {name}", ["score", str(path), *more]


def _prediction(rng: random.Random) -> dict[str, Any]:
    return {
        "id": str(rng.random()), "benchmark": rng.choice(BENCHMARKS[:6]), "completions": ["so \\boxed{A}"], "gold": "A",
        "truncated": [False], "record": {"options": {"A": "red", "B": "blue"}},
    }  # fmt: skip


def _write_predictions(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _field(rng: random.Random, path: Path) -> tuple[str, list[str]]:
    row, field, value = _prediction(rng), rng.choice(FIELDS), rng.choice([*VALUES, *BENCHMARKS])
    row[field] = value
    _write_predictions(path, _prediction(rng), row)
    return f"field {field} is {str(value)[:20]!r}", []


def _record(rng: random.Random, path: Path) -> tuple[str, list[str]]:
    row, field, value = _prediction(rng), rng.choice(RECORD), rng.choice(VALUES)
    row["record"][field] = value
    if rng.random() < 0.5 and isinstance(value, str):
        row["record"]["options"] = {value: value, "A": value}
    _write_predictions(path, row)
    return f"record.{field} is {str(value)[:20]!r}", []


def _missing(rng: random.Random, path: Path) -> tuple[str, list[str]]:
    row, field = _prediction(rng), rng.choice(FIELDS)
    del row[field]
    _write_predictions(path, row)
    return f"no {field}", ["--benchmark", rng.choice(BENCHMARKS)] if rng.random() < 0.5 else []


def _hostile(rng: random.Random, path: Path) -> tuple[str, list[str]]:
    gold, said = rng.choice(HOSTILE), rng.choice(HOSTILE)
    _write_predictions(path, {"completions": [f"\\boxed{{{said}}}"], "gold": gold})
    return f"gold {gold[:20]}, answer {said[:20]}", ["--benchmark", rng.choice(["math500", "gsm8k", "figfont"])]


def _encoded(rng: random.Random, path: Path) -> tuple[str, list[str]]:
    encoding = rng.choice(["utf-16", "utf-32", "cp1252", "utf-8-sig"])
    row = _prediction(rng) | {"gold": "\xe9"}
    path.write_bytes((json.dumps(row, ensure_ascii=False) + "\n").encode(encoding))
    return f"in {encoding}", []


def _torn(rng: random.Random, path: Path) -> tuple[str, list[str]]:
    text = (json.dumps(_prediction(rng)) + "\n").encode() * 2
    cut = rng.randrange(len(text))
    kinds = [
        text[:cut], text[:cut] + bytes([rng.randrange(256)]) + text[cut + 1 :], text[:cut] + b"\n" + text[cut:],
        b"\x00" * 99, b"", codecs.BOM_UTF8, b"[" * 100_000, b'{"a":' * 5000, b"1" * 5000, rng.randbytes(300),
    ]  # fmt: skip
    which = rng.randrange(len(kinds))
    path.write_bytes(kinds[which])
    return f"torn, kind {which} at byte {cut}", []


def _output(rng: random.Random, path: Path) -> tuple[str, list[str]]:
    _write_predictions(path, _prediction(rng))
    output = rng.choice(
        [str(path / "x.json"), str(path.parent), "/dev/full", "/nowhere/x.json", "/proc/x.json", "\x1b[2J/x"]
    )
    return f"--output {output!r}", ["--output", output]


def _no_file(rng: random.Random, path: Path) -> tuple[str, list[str]]:
    if rng.random() < 0.5:
        path.mkdir()
        return "a folder", []
    return "no file", [rng.choice(["--output", "--benchmark=", "--benchmark", "--trust_benchmarks", "more"])]
