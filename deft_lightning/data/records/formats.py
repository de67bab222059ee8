"""One normaliser: any record a user brings becomes messages, plain text or tokens, or an error that names its place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

from deft_lightning.data.examples import Example, Message
from deft_lightning.data.records.calls import describes_tools, read_tools
from deft_lightning.data.records.leftovers import ColumnReport, refuse_leftovers
from deft_lightning.data.records.misfits import misfit
from deft_lightning.data.records.shares import row_weight, token_weights
from deft_lightning.data.records.turns import ALIASES, REASONING, ROLES, read_conversation, read_turns
from deft_lightning.data.sources.rows import Row, RowError, is_text

__all__ = ["ALIASES", "CONVERSATIONS", "FIELDS", "OTHERS", "ROLES", "Format", "detect_format", "normalise"]

Format = Literal[
    "auto", "messages", "sharegpt", "prompt_completion", "alpaca", "question_answer", "text", "tokens"
]  # fmt: skip

# What column_map may rename.
FIELDS = (
    "id", "messages", "conversations", "system", "tools", "prompt", "completion", "instruction", "input", "output",
    "response", "history", "question", "context", "answer", "answers", "text", "input_ids", "labels", "reasoning",
    "weight",
)  # fmt: skip
SYSTEM = ("system", "system_prompt", "system_message")
CONTEXTS = ("context", "passage", "body")
SWITCHES = ("on", "off", "true", "false", "yes", "no", "none")  # a column named reasoning may say whether there is any


_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _messages(row: Row) -> list[Message]:
    return read_conversation(row, "messages", "role", "content")


def _sharegpt(row: Row) -> list[Message]:
    return read_conversation(row, "conversations", "from", "value")


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
    question, context = row.string("question", "problem"), _context(row)
    return [_user(f"{context}\n\n{question}" if context.strip() else question)]


def _context(row: Row) -> str:
    """Return the passage that a question is about: without it the model would be taught to guess."""
    # Who says which column is the question has looked at the others.
    mapped = any(field in row.column_map for field in ("context", "question", "instruction"))
    named = CONTEXTS[:1] if mapped else CONTEXTS
    fields = [field for field in named if row.look(field) is not None and row.name(field) not in row.read]
    field = fields[0] if fields else named[0]
    try:
        return row.optional(field)
    except RowError as error:
        raise row.fail(
            row.name(field), f"{error.problem}; --data.column_map.context none leaves it out", error.kind
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


REPLIES = ("answer", "answers", "solution", "response")
CONVERSATIONS: dict[str, Layout] = {
    "messages": Layout(_messages, (("messages",),)),
    "sharegpt": Layout(_sharegpt, (("conversations",),)),
    "prompt_completion": Layout(_prompt, (("prompt",), ("completion", "response")), ("completion", "response")),
    "alpaca": Layout(_alpaca, (("instruction",), ("output", "response")), ("output", "response")),
    "question_answer": Layout(_question, (("question", "problem"), REPLIES), REPLIES),
}
OTHERS: dict[str, tuple[tuple[str, ...], ...]] = {"tokens": (("input_ids",),), "text": (("text",),)}


def _respond(row: Row, fields: tuple[str, ...]) -> list[Message]:
    # Who says which column is the answer has looked at the others.
    fields = tuple(sorted(fields, key=lambda field: field not in row.column_map))
    field = next((field for field in fields if row.look(field) is not None), fields[0])
    name, value = row.require(*fields)
    if field == "completion" and (isinstance(value, list) or _is_turn(value)):
        return read_turns(row, name, [value] if _is_turn(value) else value, "role", "content")
    if field == "answers":
        # SQuAD's layout, or the bare list. The first answer is taught: the others are other ways to say it.
        if isinstance(value, Mapping):
            del row.read[name]
            name, value = f"{name}.text", value.get("text")
            row.read[name] = "answers"
        if not isinstance(value, list | tuple):
            raise row.fail(name, f"expected a list of answers, got {type(value).__name__}", "type")
        if not value:
            raise row.fail(name, "holds no answer", "empty")
        name, value = f"{name}[0]", value[0]
    return [_assistant(row.text(name, value)) | _thought(row)]


def _is_turn(value: Any) -> bool:
    """Return whether a response is written as a turn alone, as in files of preferences."""
    return isinstance(value, Mapping) and any(key in value for key in ("role", "from"))


def _thought(row: Row) -> Message:
    """Return what stands beside a response as the reasoning that led to it."""
    for field in REASONING:
        value = row.look(field)
        if isinstance(value, str) and value.strip() and value.strip().lower() not in SWITCHES:
            return {"reasoning_content": row.text(row.name(field), row.get(field))}
    return {}


def _blank(value: Any) -> bool:
    """Return whether a response is as good as absent: an empty cell is the only way CSV can say so."""
    value = value.get("text") if isinstance(value, Mapping) and "text" in value else value
    return value is None or (isinstance(value, str | list) and not value)


def _conversation(row: Row, format: str, need_response: bool) -> dict[str, Any]:
    layout = CONVERSATIONS[format]
    messages = layout.prompt(row)
    if layout.response and (need_response or not all(_blank(row.look(field)) for field in layout.response)):
        messages += _respond(row, layout.response)
    if need_response and not any(message["role"] == "assistant" for message in messages):
        raise row.fail(row.name(layout.fields[0][0]), "has no assistant turn, so nothing to learn", "no response")
    field = next((field for field in SYSTEM if row.look(field) is not None), "system")
    if (system := row.optional(field)).strip():
        first = messages[0]
        if first["role"] == "system" and first["content"] != system:
            problem = f"differs from the system turn that {row.name(layout.fields[0][0])!r} begins with; keep one"
            raise row.fail(row.name(field), problem, "system")
        if first["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
    content: dict[str, Any] = {"messages": tuple(messages)}
    # Beside a question a column of that name may be anything: it is read where it describes tools, else named.
    if (format in ("messages", "sharegpt", "prompt_completion") or describes_tools(row)) and (tools := read_tools(row)):
        content["tools"] = tools
    return content


def detect_format(
    record: Any, where: str, column_map: Mapping[str, str], *, need_response: bool = True, ignore: Collection[str] = ()
) -> str:
    """Return the format whose fields the record has; without need of a response, its prompt is enough.

    Where several fit, one that ``column_map`` names a field of comes first, then one with a response.

    Raises:
        UserError: No format fits; the message lists the columns that are there.
    """
    row = Row(record, where, column_map, ignore)
    formats = {**{name: layout.fields for name, layout in CONVERSATIONS.items()}, **OTHERS}
    mapped = [name for name, fields in formats.items() if any(field in column_map for field in sum(fields, ()))]
    for answered in (True,) if need_response else (True, False):
        for name in (*mapped, *formats):
            needed = formats[name] if answered else formats[name][:1]
            if all(any(row.look(field) is not None for field in choice) for choice in needed):
                return name
    raise RowError(where, misfit(row), kind="format")


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
    record: Any,
    where: str,
    format: str,
    column_map: Mapping[str, str],
    *,
    need_response: bool = True,
    ignore: Collection[str] = (),
    weight_column: str | None = None,
    report: ColumnReport | None = None,
) -> Example:
    """Turn one record into an :class:`Example`.

    Args:
        record: The row as read.
        where: File and row, for messages.
        format: A name of :data:`Format` other than ``auto``.
        column_map: Canonical field to the record's own, dotted for nested ones. Naming a column that is not there
            leaves an optional field out.
        need_response: Refuse a conversation without an assistant turn (off for ``predict``).
        ignore: Columns, and keys of turns, that are left out on purpose: the row is read as if it had none.
        weight_column: Column with the weight of each row; default: ``weight`` where that is a number.
        report: Counts what became of the columns.

    Raises:
        UserError: Unknown role, missing or empty field, wrong type, or a column without which the row would mean
            something else; one line with file, row and field.
    """
    row = Row(record, where, column_map, ignore)
    content: dict[str, Any]
    weights = None
    if format == "text":
        content = {"text": row.string("text")}
    elif format == "tokens":
        content = {"tokens": _tokens(row)}
        weights = token_weights(row, len(content["tokens"][0]))
    else:
        content = _conversation(row, format, need_response)
    own_id, weight = _own_id(row.get("id")), row_weight(row, weight_column)
    if need_response:
        responds = format in CONVERSATIONS and bool(CONVERSATIONS[format].response)
        refuse_leftovers(row, ignore, content["messages"][-1]["content"] if responds else None)
    if report is not None:
        report.add(row, ignore)
    try:
        # How much a turn weighs makes no other example of it: those that differ in that alone stay on one side.
        canonical = _CANONICAL.encode(_unweighted(content)).encode("utf-8")
    except RecursionError:
        raise RowError(where, "is nested too deeply", kind="nesting") from None
    except UnicodeEncodeError:  # within tools and calls; all else was looked at field by field
        raise RowError(where, "holds half a surrogate pair, which is not text", kind="not text") from None
    digest = hashlib.blake2b(canonical, digest_size=8).hexdigest()
    return Example(own_id or digest, digest, where, **content, weight=weight, token_weights=weights)


def _unweighted(content: dict[str, Any]) -> dict[str, Any]:
    messages = content.get("messages")
    if messages is None or not any("weight" in message for message in messages):
        return content
    bare = tuple({key: value for key, value in message.items() if key != "weight"} for message in messages)
    return {**content, "messages": bare}


def _own_id(value: Any) -> str:
    """Return an id that can name an example in a file: text, or a whole number, which pandas may write as 3.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    text = str(value)
    return text if text.strip() and is_text(text) else ""
