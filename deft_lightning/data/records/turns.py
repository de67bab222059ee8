"""Turns of a conversation and the tools it may use: the names of other exporters become those of chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deft_lightning.data.examples import Message, Tool
from deft_lightning.data.sources.rows import Row, RowError, absent, columns
from deft_lightning.errors import did_you_mean

ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's names, and those of other exporters, for the four roles of chat templates. Templates drop a turn of a role
# that they do not know without a word, so nothing but these four may reach them.
ALIASES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "ai": "assistant", "function_call": "assistant", "tool_call": "assistant", "observation": "tool",
    "function_response": "tool", "tool_response": "tool", "function": "tool", "ipython": "tool", "developer": "system",
}  # fmt: skip


def read_turns(row: Row, field: str, turns: Any, role_key: str, content_key: str) -> list[Message]:
    """Return the turns as messages with the roles of chat templates.

    Args:
        row: For error messages.
        field: Column of the turns.
        turns: A list of objects, or the JSON of one.
        role_key: Key of the role; a turn that has ``role`` or ``from`` instead is read by that.
        content_key: Key of the content that goes with it.

    Raises:
        UserError: No turns, an unknown role, or content that is missing, empty (assistant) or no text.
    """
    turns = row.unpack(turns)
    if not isinstance(turns, list) or not turns:
        raise row.fail(field, "expected a non-empty list of messages", "type")
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        at = f"{field}[{i}]"
        if not isinstance(turn, Mapping):
            raise row.fail(at, f"expected an object, got {type(turn).__name__}", "type")
        names = [(role_key, content_key), ("role", "content"), ("from", "value")]
        role_name, content_name = next((pair for pair in names if not absent(turn.get(pair[0]))), names[0])
        role = turn.get(role_name)
        if absent(role):
            raise row.fail(f"{at}.{role_name}", f"is missing (the message has {columns(turn)})", "missing")
        spelt = role.strip().lower() if isinstance(role, str) else str(role)
        known = ALIASES.get(spelt, spelt)
        if known not in ROLES:
            every = [*ROLES, *ALIASES]
            hint = did_you_mean(str(role)[:40], every)
            problem = f"unknown role {str(role)[:40]!r}; known: {', '.join(every)}.{hint}"
            raise row.fail(f"{at}.{role_name}", problem, "role")
        messages.append(_message(row, at, turn, spelt, content_name))
    return messages


def _message(row: Row, at: str, turn: Mapping[str, Any], spelt: str, content_name: str) -> Message:
    role, content = ALIASES.get(spelt, spelt), turn.get(content_name)
    calls = turn.get("tool_calls") or turn.get("function_call")  # the latter is what OpenAI wrote before 2024
    if role == "assistant" and not absent(calls):
        calls = row.unpack(calls)
        described = _calls(row, f"{at}.tool_calls", calls if isinstance(calls, list) else [calls])
        spoken = "" if absent(content) else row.text(f"{at}.{content_name}", content, empty=True)
        return {"role": role, "content": spoken, "tool_calls": described}
    if spelt in ("function_call", "tool_call") and (written := _written_calls(row, content)):
        # ShareGPT writes a call as the JSON of it: the template has its own way to put that.
        return {"role": role, "content": "", "tool_calls": _calls(row, f"{at}.{content_name}", written)}
    if absent(content):
        raise row.fail(f"{at}.{content_name}", "is missing", "missing")
    message = {"role": role, "content": row.text(f"{at}.{content_name}", content, empty=role != "assistant")}
    if role == "tool":  # some templates insist on these
        message |= {key: str(turn[key]) for key in ("name", "tool_call_id") if not absent(turn.get(key))}
    return message


def _written_calls(row: Row, content: Any) -> list[Any]:
    calls = row.unpack(content)
    calls = calls if isinstance(calls, list) else [calls]
    return calls if all(isinstance(call, Mapping) and {"name", "arguments"} <= set(call) for call in calls) else []


def _calls(row: Row, field: str, calls: list[Any]) -> list[dict[str, Any]]:
    """Calls in the layout that chat templates read: arguments as an object, not as the JSON that OpenAI sends."""
    result = []
    for i, call in enumerate(calls):
        at = f"{field}[{i}]"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise row.fail(at, "expected a call with the name of a function and its arguments", "tools")
        arguments = function.get("arguments")
        arguments = {} if absent(arguments) or arguments == "" else row.unpack(arguments)
        if not isinstance(arguments, Mapping):
            raise row.fail(f"{at}.arguments", "expected an object, or the JSON of one", "tools")
        own = {"id": str(call["id"])} if not absent(call.get("id")) else {}
        described = {"name": function["name"], "arguments": dict(arguments)}
        result.append({**own, "type": "function", "function": described})
    return result


def read_tools(row: Row) -> tuple[Tool, ...] | None:
    """Return the descriptions of the tools beside a conversation, None if there are none.

    Raises:
        UserError: The field is no list of descriptions, nor the JSON of one.
    """
    name, value = row.name("tools"), row.get("tools")
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise _no_tools(row, name) from None
    if value is None:
        return None
    if not isinstance(value, list):
        raise _no_tools(row, name)
    tools = []
    for i, tool in enumerate(value):
        tool = row.unpack(tool)
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _no_tools(row, f"{name}[{i}]")
        tools.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(function)})
    return tuple(tools) or None


def _no_tools(row: Row, field: str) -> RowError:
    problem = "expected a list of functions with names, or the JSON of one; --data.column_map.tools none leaves it out"
    return row.fail(field, problem, "tools")
