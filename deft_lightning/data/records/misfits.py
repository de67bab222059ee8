"""Rows that fit no format: what they look like, and which option reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deft_lightning.data.sources.layouts import is_conversation, is_message
from deft_lightning.data.sources.rows import Row, columns


def misfit(row: Row) -> str:
    """Return what is wrong with a row that fits no format, with the options that would read it."""
    if is_message(row.record):
        return (
            f"is one turn ({columns(row.record)}), not a row: a row holds all turns of a conversation,"
            ' {"messages": [{"role": ..., "content": ...}, ...]}'
        )
    problem = f"the fields {columns(row.record) or '(none)'} fit no known format; set --data.format or map them,"
    ways = list(dict.fromkeys(_ways(row)))[:3]
    return f"{problem} {', '.join(ways) or 'for example --data.column_map.question NAME --data.column_map.answer NAME'}"


def _ways(row: Row) -> Iterator[str]:
    """Yield options for columns that look like turns, or like several answers."""
    for path, value in _columns(row.record, ""):
        if is_conversation(value):
            yield f"{path!r} looks like turns: --data.column_map.messages {path}"
        elif several_texts(value):
            first = first_answer(row, path)
            turns = f"--data.column_map.messages {path} reads them as turns of user and assistant"
            yield f"{path!r} holds several texts: {turns if first is None else first}"


def _columns(record: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping) and prefix.count(".") < 2:
            yield from _columns(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def several_texts(value: Any) -> bool:
    """Return whether a value is a list of texts."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def first_answer(row: Row, path: str) -> str | None:
    """Return the options that learn the first text of a list as the answer; None where the row has no question.

    Args:
        row: The row.
        path: Column of the list.
    """
    asked = next((field for field in ("question", "problem", "prompt", "instruction") if row.look(field)), None)
    if asked is None:
        return None
    question = "" if asked in ("question", "problem") else f"--data.column_map.question {row.name(asked)} "
    return f"{question}--data.column_map.answers {path} learns the first as the answer"
