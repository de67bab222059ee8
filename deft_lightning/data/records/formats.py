"""One normaliser: any record a user brings becomes messages, plain text or tokens, or an error that names its place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from deft_lightning.data.examples import Example, Message
from deft_lightning.data.records.turns import ALIASES, ROLES, read_tools, read_turns
from deft_lightning.data.sources.rows import Row, RowError, columns, is_text

__all__ = ["ALIASES", "CONVERSATIONS", "FIELDS", "OTHERS", "ROLES", "Format", "detect_format", "normalise"]

Format = Literal[
    "auto", "messages", "sharegpt", "prompt_completion", "alpaca", "question_answer", "text", "tokens"
]  # fmt: skip

# What column_map may rename.
FIELDS = (
    "id", "messages", "conversations", "system", "tools", "prompt", "completion", "instruction", "input", "output",
    "response", "history", "question", "context", "answer", "answers", "text", "input_ids", "labels",
)  # fmt: skip


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _messages(row: Row) -> list[Message]:
    return read_turns(row, *row.require("messages"), "role", "content")


def _sharegpt(row: Row) -> list[Message]:
    return read_turns(row, *row.require("conversations"), "from", "value")


def _prompt(row: Row) -> list[Message]:
    name, prompt = row.require("prompt")
    if isinstance(prompt, list):
        return read_turns(row, name, prompt, "role", "content")
    return [_user(row.text(name, prompt))]


def _alpaca(row: Row) -> list[Message]:
    messages: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list | tuple):
        raise row.fail(row.name("history"), f"expected a list of pairs, got {type(history).__name__}", "type")
    for i, pair in enumerate(history):
        at = f"{row.name('history')}[{i}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise row.fail(at, "expected a pair [instruction, response]", "type")
        messages += [_user(row.text(at, pair[0])), _assistant(row.text(at, pair[1]))]
    instruction = row.string("instruction")
    extra = row.optional("input") or _context(row)
    return [*messages, _user(f"{instruction}\n\n{extra}" if extra.strip() else instruction)]


def _question(row: Row) -> list[Message]:
    question, context = row.string("question"), _context(row)
    return [_user(f"{context}\n\n{question}" if context.strip() else question)]


def _context(row: Row) -> str:
    """The passage that a question is about: without it the model would be taught to guess."""
    try:
        return row.optional("context")
    except RowError as error:
        raise row.fail(
            row.name("context"), f"{error.problem}; --data.column_map.context none leaves it out", error.kind
        ) from None


class Layout(NamedTuple):
    """How a kind of conversation is laid out.

    Attributes:
        prompt: Reads the turns: all of them, or those before the response if that has fields of its own.
        fields: What identifies it, the prompt first; each inner tuple is "one of".
        response: Fields of the response, the first that is there counts; empty where the turns hold it.
    """

    prompt: Callable[[Row], list[Message]]
    fields: tuple[tuple[str, ...], ...]
    response: tuple[str, ...] = ()


CONVERSATIONS: dict[str, Layout] = {
    "messages": Layout(_messages, (("messages",),)),
    "sharegpt": Layout(_sharegpt, (("conversations",),)),
    "prompt_completion": Layout(_prompt, (("prompt",), ("completion",)), ("completion",)),
    "alpaca": Layout(_alpaca, (("instruction",), ("output", "response")), ("output", "response")),
    "question_answer": Layout(_question, (("question",), ("answer", "answers")), ("answer", "answers")),
}
OTHERS: dict[str, tuple[tuple[str, ...], ...]] = {"tokens": (("input_ids",),), "text": (("text",),)}


def _respond(row: Row, fields: tuple[str, ...]) -> list[Message]:
    field = next((field for field in fields if row.get(field) is not None), fields[0])
    name, value = row.require(*fields)
    if field == "completion" and isinstance(value, list):
        return read_turns(row, name, value, "role", "content")
    if field == "answers":
        # SQuAD's layout, or the bare list. The first answer is taught: the others are other ways to say it.
        name, value = (f"{name}.text", value.get("text")) if isinstance(value, Mapping) else (name, value)
        if not isinstance(value, list | tuple):
            raise row.fail(name, f"expected a list of answers, got {type(value).__name__}", "type")
        if not value:
            raise row.fail(name, "holds no answer", "empty")
        name, value = f"{name}[0]", value[0]
    return [_assistant(row.text(name, value))]


def _blank(value: Any) -> bool:
    """Whether a response is as good as absent: an empty cell is the only way CSV can say so."""
    value = value.get("text") if isinstance(value, Mapping) and "text" in value else value
    return value is None or (isinstance(value, str | list) and not value)


def _conversation(row: Row, format: str, need_response: bool) -> dict[str, Any]:
    layout = CONVERSATIONS[format]
    messages = layout.prompt(row)
    if layout.response and (need_response or not all(_blank(row.get(field)) for field in layout.response)):
        messages += _respond(row, layout.response)
    if need_response and not any(message["role"] == "assistant" for message in messages):
        raise row.fail(row.name(layout.fields[0][0]), "has no assistant turn, so nothing to learn", "no response")
    if (system := row.optional("system")).strip():
        first = messages[0]
        if first["role"] == "system" and first["content"] != system:
            problem = f"differs from the system turn that {row.name(layout.fields[0][0])!r} begins with; keep one"
            raise row.fail(row.name("system"), problem, "system")
        if first["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
    content: dict[str, Any] = {"messages": tuple(messages)}
    if format in ("messages", "sharegpt", "prompt_completion") and (tools := read_tools(row)):
        content["tools"] = tools
    return content


def detect_format(
    record: Any, where: str, column_map: Mapping[str, str], *, need_response: bool = True
) -> str:  # fmt: skip
    """Return the format whose fields the record has; without need of a response, its prompt is enough.

    Where several fit, one that ``column_map`` names a field of comes first, then one with a response.

    Raises:
        UserError: No format fits; the message lists the columns that are there.
    """
    row = Row(record, where, column_map)
    formats = {**{name: layout.fields for name, layout in CONVERSATIONS.items()}, **OTHERS}
    mapped = [name for name, fields in formats.items() if any(field in column_map for field in sum(fields, ()))]
    for answered in (True,) if need_response else (True, False):
        for name in (*mapped, *formats):
            needed = formats[name] if answered else formats[name][:1]
            if all(any(row.get(field) is not None for field in choice) for choice in needed):
                return name
    raise RowError(
        where,
        f"the fields {columns(row.record) or '(none)'} fit no known format; set --data.format or"
        " map them, for example --data.column_map.question NAME --data.column_map.answer NAME",
        kind="format",
    )


def _tokens(row: Row) -> tuple[list[int], list[int]]:
    name, ids = row.require("input_ids")
    labels = row.get("labels")
    for field, values in ((name, ids), (row.name("labels"), ids if labels is None else labels)):
        if not isinstance(values, list) or not values or not all(type(v) is int for v in values):
            raise row.fail(field, "expected a non-empty list of integers", "type")
        if len(values) != len(ids):
            raise row.fail(field, f"has {len(values)} entries, input_ids has {len(ids)}", "length")
    return ids, list(ids if labels is None else labels)


def normalise(
    record: Any, where: str, format: str, column_map: Mapping[str, str], *, need_response: bool = True
) -> Example:
    """Turn one record into an :class:`Example`.

    Args:
        record: The row as read.
        where: File and row, for messages.
        format: A name of :data:`Format` other than ``auto``.
        column_map: Canonical field to the record's own, dotted for nested ones. Naming a column that is not there
            leaves an optional field out.
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
        content = _conversation(row, format, need_response)
    try:
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8")
    except RecursionError:
        raise RowError(where, "is nested too deeply", kind="nesting") from None
    except UnicodeEncodeError:  # within tools and calls; all else was looked at field by field
        raise RowError(where, "holds half a surrogate pair, which is not text", kind="not text") from None
    digest = hashlib.blake2b(canonical, digest_size=8).hexdigest()
    return Example(_own_id(row.get("id")) or digest, digest, where, **content)


def _own_id(value: Any) -> str:
    """An id that can name an example in a file: text, or a whole number (pandas makes floats of numbers with gaps)."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    text = str(value)
    return text if text.strip() and is_text(text) else ""
