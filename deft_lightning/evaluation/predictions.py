"""Reads what `predict` wrote, a line a prompt; whatever else a file may hold is one line of error."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from deft_lightning.annotations import JsonObject
from deft_lightning.errors import UserError

LONGEST = 2**28  # letters of a line: sixteen completions of ten megabytes fit


class Prediction(NamedTuple):
    """A line of a predictions file."""

    where: str
    benchmark: str
    id: str
    completions: list[str]
    gold: str
    truncated: list[bool]
    record: JsonObject


def read_predictions(path: Path) -> Iterator[Prediction]:
    """Yield the lines of a file that `predict` wrote, or another program in its layout.

    A line is an object with ``completions`` (texts) and ``gold``, and may have ``id``, ``benchmark``, ``truncated``
    (one truth value for each completion) and ``record`` (``options`` of a multiple choice, ``source``, ``error``).

    Raises:
        UserError: The file cannot be read, or a line is something else; file, row and field.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number in itertools.count(1):
                line = file.readline(LONGEST + 1)
                if not line:
                    return
                if len(line) > LONGEST:
                    raise UserError(f"{path}, row {number}: has more than {LONGEST:,} letters")
                if line.strip():
                    yield _prediction(f"{path}, row {number}", line)
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _prediction(where: str, line: str) -> Prediction:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, got {type(row).__name__}")

    def field(name: str, kind: type[Any], default: Any = None) -> Any:
        value = row.get(name, default)
        if value is None:
            raise UserError(f"{where}, field {name!r}: is missing (the row has {', '.join(row) or 'none'})")
        if not isinstance(value, kind):
            raise UserError(f"{where}, field {name!r}: expected {_WORDS[kind]}, got {type(value).__name__}")
        return value

    completions = field("completions", list)
    if not completions or not all(isinstance(text, str) for text in completions):
        raise UserError(f"{where}, field 'completions': expected a list of at least one text")
    truncated = field("truncated", list, [False] * len(completions))
    if len(truncated) != len(completions) or not all(isinstance(cut, bool) for cut in truncated):
        raise UserError(f"{where}, field 'truncated': expected {len(completions)} truth values, one per completion")
    id = row.get("id")
    if isinstance(id, bool) or not isinstance(id, str | int | None):
        raise UserError(f"{where}, field 'id': expected text, got {type(id).__name__}")
    return Prediction(
        where, field("benchmark", str, ""), "" if id is None else str(id), completions, field("gold", str), truncated,
        _record(where, field("record", dict, {})),
    )  # fmt: skip


def _record(where: str, record: JsonObject) -> JsonObject:
    """Return the record; refuse values that no grader foresees."""
    for name in ("source", "error"):
        if not isinstance(value := record.get(name), str | int | float | None):
            raise UserError(f"{where}, field 'record.{name}': expected text or a number, got {type(value).__name__}")
    return record


_WORDS: dict[type[Any], str] = {str: "text", list: "a list", dict: "an object"}
