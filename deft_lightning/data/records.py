"""One normaliser: any record a user brings becomes messages, plain text or tokens, or an error that names its place."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deft_lightning.errors import UserError, did_you_mean

Format = Literal[
    "auto", "messages", "sharegpt", "prompt_completion", "alpaca", "question_answer", "text", "tokens"
]  # fmt: skip

ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's names, and those of other exporters, for the four roles of chat templates.
ALIASES = {
    "human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "function_call": "assistant",
    "observation": "tool", "function_response": "tool", "function": "tool", "developer": "system",
}  # fmt: skip

# What column_map may rename.
FIELDS = (
    "id", "messages", "conversations", "system", "prompt", "completion", "instruction", "input", "output", "response",
    "history", "question", "answer", "text", "input_ids", "labels",
)  # fmt: skip

Message = dict[str, str]
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Example:
    """One normalised example. Exactly one of ``messages``, ``text`` and ``tokens`` is set.

    Attributes:
        id: Unique and independent of the row's position: the record's own ``id``, or a hash of its content.
        digest: Hash of the content alone; decides the split, so that duplicates stay on one side.
        where: File and row, for error messages.
        messages: Conversation with roles system, user, assistant, tool.
        text: Raw text, supervised as a whole.
        tokens: ``(input_ids, labels)``, labels -100 where not supervised.
    """

    id: str
    digest: str
    where: str
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    tokens: tuple[list[int], list[int]] | None = None

    @property
    def response(self) -> str | None:
        """The last assistant turn, if the conversation ends with one."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            return self.messages[-1]["content"]
        return None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The conversation before the last assistant turn; empty for text and tokens."""
        messages = self.messages or ()
        return messages[:-1] if self.response is not None else messages


class Row:
    """A record with its place: every access that fails says file, row and field."""

    def __init__(self, record: Any, where: str, column_map: Mapping[str, str]) -> None:
        self.where, self.column_map = where, column_map
        if not isinstance(record, Mapping):
            raise UserError(f"{where}: expected an object with named fields, got {type(record).__name__}")
        self.record = record

    def fail(self, field: str, problem: str) -> UserError:
        """Return the one-line error for a field."""
        return UserError(f"{self.where}, field {field!r}: {problem}")

    def name(self, field: str) -> str:
        """Where a field is looked up, after ``column_map``."""
        return self.column_map.get(field, field)

    def get(self, field: str) -> Any:
        """Return the value of a field, following dotted keys; None when absent, or NaN as pandas writes absence."""
        name = self.name(field)
        value: Any = self.record
        for part in [name] if name in self.record else name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return None if isinstance(value, float) and math.isnan(value) else value

    def require(self, *fields: str) -> tuple[str, Any]:
        """Return the first of the fields that is there, with its name."""
        for field in fields:
            value = self.get(field)
            if value is not None:
                return self.name(field), value
        wanted, columns = " or ".join(repr(self.name(f)) for f in fields), ", ".join(map(str, self.record))
        raise UserError(
            f"{self.where}: missing field {wanted} (the row has {columns}); name it with --data.column_map.{fields[0]}"
        )

    def text(self, field: str, value: Any, *, empty: bool = False) -> str:
        """Return a value as text; numbers are written out, lists of text parts are joined."""
        if isinstance(value, bool | int | float):
            value = str(value)
        if isinstance(value, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in value):
            value = "".join(str(part.get("text", "")) for part in value)
        if not isinstance(value, str):
            raise self.fail(field, f"expected text, got {type(value).__name__}")
        if not value.isascii() and SURROGATE.search(value):
            raise self.fail(field, "holds half a surrogate pair, which is not text")
        if not empty and not value.strip():
            raise self.fail(field, "is empty")
        return value

    def string(self, *fields: str) -> str:
        """Return a required text field that is not empty."""
        name, value = self.require(*fields)
        return self.text(name, value)

    def optional(self, field: str) -> str:
        """Return a text field, or an empty string."""
        value = self.get(field)
        return "" if value is None else self.text(self.name(field), value, empty=True)


def _turns(row: Row, field: str, turns: Any, role_key: str, content_key: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise row.fail(field, "expected a non-empty list of messages")
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise row.fail(f"{field}[{i}]", f"expected an object, got {type(turn).__name__}")
        role_name, content_name = (role_key, content_key) if role_key in turn else ("role", "content")
        role = turn.get(role_name)
        if role is None:
            raise row.fail(f"{field}[{i}].{role_name}", f"is missing (the message has {', '.join(map(str, turn))})")
        known = ALIASES.get(str(role), str(role))
        if known not in ROLES:
            names = [*ROLES, *ALIASES]
            problem = f"unknown role {role!r}; known: {', '.join(names)}.{did_you_mean(str(role), names)}"
            raise row.fail(f"{field}[{i}].{role_name}", problem)
        content_at = f"{field}[{i}].{content_name}"
        if turn.get(content_name) is None:
            raise row.fail(content_at, "is missing")
        content = row.text(content_at, turn[content_name], empty=known != "assistant")
        messages.append({"role": known, "content": content})
    return messages


def _messages(row: Row) -> list[Message]:
    name, turns = row.require("messages")
    return _turns(row, name, turns, "role", "content")


def _sharegpt(row: Row) -> list[Message]:
    name, turns = row.require("conversations")
    messages = _turns(row, name, turns, "from", "value")
    system = row.optional("system")
    return [{"role": "system", "content": system}, *messages] if system else messages


def _prompt_completion(row: Row) -> list[Message]:
    name, prompt = row.require("prompt")
    chat = _turns(row, name, prompt, "role", "content") if isinstance(prompt, list) else None
    messages = chat or [{"role": "user", "content": row.text(name, prompt)}]
    completion = row.get("completion")
    if isinstance(completion, list):
        return messages + _turns(row, row.name("completion"), completion, "role", "content")
    return [*messages, {"role": "assistant", "content": row.string("completion")}]


def _alpaca(row: Row) -> list[Message]:
    messages: list[Message] = []
    if system := row.optional("system"):
        messages.append({"role": "system", "content": system})
    history = row.get("history") or []
    if not isinstance(history, list | tuple):
        raise row.fail(row.name("history"), f"expected a list of pairs, got {type(history).__name__}")
    for i, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise row.fail(f"{row.name('history')}[{i}]", "expected a pair [instruction, response]")
        for role, value in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": row.text(f"{row.name('history')}[{i}]", value)})
    instruction, extra = row.string("instruction"), row.optional("input")
    messages.append({"role": "user", "content": f"{instruction}\n\n{extra}" if extra.strip() else instruction})
    return [*messages, {"role": "assistant", "content": row.string("output", "response")}]


def _question_answer(row: Row) -> list[Message]:
    question = {"role": "user", "content": row.string("question")}
    return [question, {"role": "assistant", "content": row.string("answer")}]


CONVERSATIONS: dict[str, tuple[Callable[[Row], list[Message]], tuple[tuple[str, ...], ...]]] = {
    # format: (normaliser, the fields that identify it; each inner tuple is "one of")
    "messages": (_messages, (("messages",),)),
    "sharegpt": (_sharegpt, (("conversations",),)),
    "prompt_completion": (_prompt_completion, (("prompt",), ("completion",))),
    "alpaca": (_alpaca, (("instruction",), ("output", "response"))),
    "question_answer": (_question_answer, (("question",), ("answer",))),
}
OTHERS: dict[str, tuple[tuple[str, ...], ...]] = {"tokens": (("input_ids",),), "text": (("text",),)}


def detect_format(
    record: Any, where: str, column_map: Mapping[str, str], *, need_response: bool = True
) -> str:  # fmt: skip
    """Return the format whose fields the record has; without need of a response, its prompt is enough.

    Raises:
        UserError: No format fits; the message lists the columns that are there.
    """
    row = Row(record, where, column_map)
    for name, fields in {**{k: v[1] for k, v in CONVERSATIONS.items()}, **OTHERS}.items():
        needed = fields if need_response else fields[:1]
        if all(any(row.get(field) is not None for field in choice) for choice in needed):
            return name
    raise UserError(
        f"{where}: the fields {', '.join(map(str, row.record)) or '(none)'} fit no known format; set --data.format or"
        f" map them, for example --data.column_map.question NAME --data.column_map.answer NAME"
    )


def _tokens(row: Row) -> tuple[list[int], list[int]]:
    name, ids = row.require("input_ids")
    labels = row.get("labels")
    for field, values in ((name, ids), (row.name("labels"), ids if labels is None else labels)):
        if not isinstance(values, list) or not values or not all(type(v) is int for v in values):
            raise row.fail(field, "expected a non-empty list of integers")
        if len(values) != len(ids):
            raise row.fail(field, f"has {len(values)} entries, input_ids has {len(ids)}")
    return ids, list(ids if labels is None else labels)


def normalise(
    record: Any, where: str, format: str, column_map: Mapping[str, str], *, need_response: bool = True
) -> Example:
    """Turn one record into an :class:`Example`.

    Args:
        record: The row as read.
        where: File and row, for messages.
        format: A name of :data:`Format` other than ``auto``.
        column_map: Canonical field to the record's own, dotted for nested ones.
        need_response: Refuse a conversation without an assistant turn (off for ``predict``).

    Raises:
        UserError: Unknown role, missing or empty field, wrong type; one line with file, row and field.
    """
    row = Row(record, where, column_map)
    content: dict[str, Any]
    if format == "text":
        content = {"text": row.string("text")}
    elif format == "tokens":
        content = {"tokens": _tokens(row)}
    else:
        reader = CONVERSATIONS[format][0]
        if not need_response and format in ("prompt_completion", "alpaca", "question_answer"):
            blank = {"prompt_completion": "completion", "alpaca": "output", "question_answer": "answer"}[format]
            fields = (blank, "response") if format == "alpaca" else (blank,)
            absent = all(row.get(f) is None or row.get(f) == "" for f in fields)
            if absent:
                row.record = {**row.record, row.name(blank): "-"}
            messages = reader(row)[:-1] if absent else reader(row)
        else:
            messages = reader(row)
        if need_response and not any(message["role"] == "assistant" for message in messages):
            raise row.fail(row.name(CONVERSATIONS[format][1][0][0]), "has no assistant turn, so nothing to learn")
        content = {"messages": tuple(messages)}
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False)
    digest = hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    own = row.get("id")
    return Example(str(own) if isinstance(own, str | int) and str(own) else digest, digest, where, **content)
