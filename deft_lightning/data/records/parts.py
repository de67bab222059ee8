"""What a turn holds where its content is a list of parts: text, thoughts, calls of tools and their results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from deft_lightning.data.sources.rows import Row, absent

TEXTS = ("text", "input_text", "output_text")
THOUGHTS = ("thinking", "reasoning")


class Parts(NamedTuple):
    """The parts of a turn by what they are.

    Attributes:
        content: What is left as the turn's content: a text, or what was no list of parts.
        thought: Reasoning, empty where there is none.
        calls: Calls of tools.
        results: Results of tools: the id of the call, and the text.
    """

    content: Any
    thought: str
    calls: list[dict[str, Any]]
    results: list[tuple[str, str]]


def leave_out(row: Row, at: str, key: str) -> str:
    """Return the advice of how a key of a turn, or a type of a part, is left out on purpose."""
    return f"--data.ignore_columns '{row.key(at, key)}' leaves it out"


def take_apart(row: Row, field: str, content: Any) -> Parts:
    """Return the parts of a content.

    A content that is no list is left as it is. OpenAI's, Anthropic's and Mistral's ways to write text, thoughts, calls
    and results are known.

    Raises:
        UserError: A part of another type, such as a picture, which is not left out on purpose.
    """
    if not isinstance(content, list):
        return Parts(content, "", [], [])
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[tuple[str, str]] = []
    for i, part in enumerate(content):
        at = f"{field}[{i}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or not isinstance(kind, str):
            got = f"a part of type {kind!r}" if isinstance(part, Mapping) else type(part).__name__
            raise row.fail(field, f"expected text, got list with {got}", "type")
        if kind in TEXTS:
            texts.append(_text(row, at, part, "text", "value", "content"))
        elif kind in THOUGHTS:
            thoughts.append(_text(row, at, part, kind, "thinking", "text"))
        elif kind == "tool_use":
            calls.append({"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")})
        elif kind == "tool_result":
            inner = part.get("content")
            written = take_apart(row, f"{at}.content", inner).content if isinstance(inner, list) else inner
            results.append((str(part.get("tool_use_id") or ""), as_text(row, f"{at}.content", written)))
        elif not row.ignores(row.key(f"{field}[]", kind)):
            problem = f"expected text, got list with a part of type {kind!r}; {leave_out(row, f'{field}[]', kind)}"
            raise row.fail(field, problem, "type")
    return Parts("".join(texts), "\n".join(thoughts), calls, results)


def _text(row: Row, at: str, part: Mapping[str, Any], *names: str) -> str:
    name = next((name for name in names if not absent(part.get(name))), names[0])
    value = part.get(name)
    if isinstance(value, list):  # Mistral's thoughts hold parts of their own
        return str(take_apart(row, f"{at}.{name}", value).content)
    if not isinstance(value, str):  # "None" would be text too
        raise row.fail(f"{at}.{name}", f"expected text, got {type(value).__name__}", "type")
    return value


def as_text(row: Row, field: str, value: Any) -> str:
    """Return the result of a tool as text: an object, or a list that holds no parts, as its JSON.

    Raises:
        UserError: It is missing, or cannot be written.
    """
    parts = isinstance(value, list) and value and all(isinstance(part, Mapping) and "type" in part for part in value)
    if isinstance(value, Mapping) or (isinstance(value, list) and not parts):
        try:
            return row.text(field, json.dumps(value, ensure_ascii=False, default=str), empty=True)
        except RecursionError:
            raise row.fail(field, "is nested too deeply", "nesting") from None
    if parts:
        apart = take_apart(row, field, value)
        if apart.thought or apart.calls or apart.results:
            raise row.fail(field, "holds a thought, a call or another result, which a tool result cannot hold", "role")
        value = apart.content
    return row.text(field, value, empty=True)
