"""Rows that fit no format: what they look like, and which option reads them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from deft_lightning.data.sources.layouts import is_conversation, is_message
from deft_lightning.data.sources.rows import Row, columns

# The better and the worse of two answers, under any layout.
PREFERENCE = re.compile(r"(^|_)(chosen|rejected|preferred|dispreferred|nonpreferred)(_|$)", re.IGNORECASE)
PREFERRED = re.compile(r"(^|_)(chosen|preferred)(_|$)", re.IGNORECASE)
# Columns of several answers, and where they are objects the keys of their texts.
SEVERAL = (
    "generations", "completions", "responses", "outputs", "solutions", "candidates", "generated_solutions", "samples",
)  # fmt: skip
TEXTS = ("response", "text", "content", "completion", "answer", "output")


def misfit(row: Row) -> str:
    """Return what is wrong with a row that fits no format, with the options that would read it."""
    if is_message(row.record):
        return (
            f"is one turn ({columns(row.record)}), not a row: a row holds all turns of a conversation,"
            ' {"messages": [{"role": ..., "content": ...}, ...]}'
        )
    problem = f"the fields {columns(row.record) or '(none)'} fit no known format; "
    if ways := list(dict.fromkeys(_ways(row)))[:3]:
        return problem + "; ".join(ways)
    return problem + (
        "set --data.format or map them, for example --data.column_map.question NAME --data.column_map.answer NAME"
    )


def _ways(row: Row) -> Iterator[str]:
    """Yield options for columns that look like turns, or like several answers, and what others lack."""
    for path, value in _columns(row.record, ""):
        worse = PREFERENCE.search(path) and not PREFERRED.search(path)
        if worse:
            continue
        if is_conversation(value):
            yield f"{path!r} looks like turns: --data.column_map.messages {path}"
        elif PREFERENCE.search(path) and isinstance(value, str):
            yield f"{path!r} is one side of a preference: --data.column_map.text {path} learns it as a text"
        elif first := first_answer(row, path, value):
            yield f"{path!r} holds several answers: {first}"
        elif several_texts(value) and len(value) > 1:
            yield f"{path!r} holds several texts: --data.column_map.messages {path} reads them as turns"
        elif isinstance(value, list) and value and all(isinstance(item, Mapping | list) for item in value):
            yield f"the items of {path!r} would be turns if they had role and content, or from and value"


def _columns(record: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping) and prefix.count(".") < 2:
            yield from _columns(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def several_texts(value: Any) -> bool:
    """Return whether a value is a list of texts."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def first_answer(row: Row, path: str, value: Any) -> str | None:
    """Return the options that learn the first of several answers.

    Args:
        row: The row.
        path: Column of the answers.
        value: What it holds.

    Returns:
        None where the column holds no answers, or the row has no question.
    """
    asked = next((field for field in ("question", "problem", "prompt", "instruction") if row.look(field)), None)
    if path.rpartition(".")[2].lower() not in SEVERAL or asked is None:
        return None
    question = "" if asked in ("question", "problem") else f"--data.column_map.question {row.name(asked)} "
    if several_texts(value):
        return f"{question}--data.column_map.answers {path} learns the first"
    described = value[0] if isinstance(value, list) and value and isinstance(value[0], Mapping) else {}
    text = next((key for key in TEXTS if isinstance(described.get(key), str)), None)
    return text and f"{question}--data.column_map.answer {path}.0.{text} learns the first"
