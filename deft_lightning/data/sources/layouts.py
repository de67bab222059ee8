"""Which fields make a row: a file may be one row, and a list may be one conversation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deft_lightning.data.sources.rows import Row, RowError

# The fields that the formats of `records.formats` are known by, each "one of". A test holds the two together.
FORMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "prompt_completion": (("prompt",), ("completion", "response")),
    "alpaca": (("instruction",), ("output", "response")),
    "question_answer": (("question", "problem"), ("answer", "answers", "solution", "response")),
    "tokens": (("input_ids",),),
    "text": (("text",),),
}
LISTS = ("messages", "conversations")  # fields that hold the turns of a conversation


@dataclass(frozen=True)
class Expected:
    """What the rows of a source are expected to be.

    Attributes:
        format: Layout of a row, or auto.
        column_map: Canonical field to the column that holds it.
        need_response: Whether a row without a response is none.
    """

    format: str = "auto"
    column_map: Mapping[str, str] = field(default_factory=dict)
    need_response: bool = True

    def form(self, record: Any) -> str:
        """Return the format that all fields of an object make a row of; an empty string if there is none."""
        if not isinstance(record, Mapping):
            return ""
        row = Row(record, "", self.column_map)
        forms = {self.format: FORMS[self.format]} if self.format in FORMS else FORMS
        for name, fields in forms.items():
            needed = fields if self.need_response else fields[:1]
            try:
                if all(any(_plausible(field, row.get(field)) for field in choice) for choice in needed):
                    return name
            except RowError:  # two columns that differ in case: named once the row is read
                return name
        return ""


def is_message(value: Any) -> bool:
    """Return whether an object is a turn of a conversation and no row of its own."""
    if not isinstance(value, Mapping):
        return False
    named = isinstance(value.get("role"), str) and ("content" in value or "tool_calls" in value)
    return named or (isinstance(value.get("from"), str) and "value" in value)


def is_conversation(value: Any) -> bool:
    """Return whether a value is a list of turns."""
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def is_parts(value: Any) -> bool:
    """Return whether a value is a list of the parts of a text."""
    return isinstance(value, list) and all(isinstance(part, Mapping) and "type" in part for part in value)


def _plausible(field: str, value: Any) -> bool:
    """Return whether a value can be that of a field; a table that is written column by column has lists everywhere."""
    if value is None:
        return False
    if field in LISTS:
        return is_conversation(value) or isinstance(value, str)
    if field == "input_ids":
        return isinstance(value, list) and all(isinstance(token, int) for token in value)
    if field == "answers":
        return True
    if isinstance(value, list):
        return is_conversation(value) or (bool(value) and is_parts(value))
    return not isinstance(value, Mapping)
