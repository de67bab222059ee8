"""What a chat template may not do with a conversation: leave out a message, a thought, a tool, or a call of one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deft_lightning.data.examples import Message, Tool
from deft_lightning.data.sources.rows import RowError


def refusal(where: str, problem: str, advice: str = "") -> RowError:
    """Return the error of a row that the chat template refuses."""
    return RowError(where, f"the chat template {problem}{advice} (--data.chat_template)", kind="chat template")


def left_out(where: str, i: int, kept_later: bool) -> RowError:
    """Return the error of a template that leaves out the reasoning of a turn.

    Args:
        where: File and row.
        i: Number of the message, from 0.
        kept_later: Whether it keeps that of the last turn, as many do.
    """
    ways = ["use one that writes it, such as chatml or trl:qwen3", "put it into the text (--data.reasoning text)"]
    ways = ["learn only the last turn (--data.supervise last)", *ways] if kept_later else ways
    advice = f"; {', '.join(ways)}, or leave it out on purpose (--data.reasoning drop)"
    return refusal(where, f"leaves out the reasoning of message {i + 1}", advice)


def as_json(value: str) -> tuple[str, str]:
    """Return the two ways to write a text within JSON, without the quotes."""
    return json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]


def check_tools(text: str, tools: Sequence[Tool] | None, where: str) -> None:
    """Refuse a template that knows no tools: it leaves them out without a word."""
    for tool in tools or ():
        name = tool["function"]["name"]
        if name not in text:
            advice = (
                "; choose one that lists tools, such as chatml, or leave them out with --data.column_map.tools none"
            )
            raise refusal(where, f"leaves out the tool {name!r}", advice)


def check_calls(text: str, message: Message, where: str, i: int) -> None:
    """Refuse a template that leaves out a call of a tool, or what it is called with."""
    for call in message.get("tool_calls", ()):
        function = call["function"]
        for value in (function["name"], *_leaves(function["arguments"])):
            spelt = as_json(value) if isinstance(value, str) else (json.dumps(value, default=str),)
            if not any(way in text for way in (str(value), *spelt)):
                advice = "; choose one that writes them, such as chatml"
                raise refusal(where, f"leaves out or changes the tool calls of message {i + 1}", advice)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value
