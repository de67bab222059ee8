"""Tools that the assistant may call, and the calls that it makes, in the layout that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deft_lightning.data.examples import Tool
from deft_lightning.data.sources.rows import Row, RowError, absent


def written_calls(row: Row, content: Any) -> list[Any]:
    """Return the calls that a text spells in JSON, as ShareGPT writes them; none if it spells anything else."""
    calls = row.unpack(content)
    calls = calls if isinstance(calls, list) else [calls]
    return calls if all(isinstance(call, Mapping) and {"name", "arguments"} <= set(call) for call in calls) else []


def read_calls(row: Row, field: str, calls: list[Any]) -> list[dict[str, Any]]:
    """Return calls as chat templates read them: arguments as an object, not as the JSON that OpenAI sends.

    Raises:
        UserError: A call without a name, or whose arguments are no object.
    """
    result = []
    for i, call in enumerate(calls):
        at = f"{field}[{i}]"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise row.fail(at, "expected a call with the name of a function and its arguments", "tools")
        arguments = _arguments(function.get("arguments"))
        if not isinstance(arguments, Mapping):
            raise row.fail(f"{at}.arguments", "expected an object, or the JSON of one", "tools")
        own = {"id": str(call["id"])} if not absent(call.get("id")) else {}
        described = {"name": function["name"], "arguments": dict(arguments)}
        result.append({**own, "type": "function", "function": described})
    return result


def _arguments(value: Any) -> Any:
    """Return arguments as an object: some exporters encode them as JSON twice."""
    for _ in range(3):
        if absent(value) or value == "":
            return {}
        if not isinstance(value, str):
            break
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            break
    return value


def describes_tools(row: Row) -> bool:
    """Return whether the column of tools holds descriptions of functions, or the JSON of them."""
    tools = row.unpack(row.look("tools"))
    functions = (
        [tool.get("function", tool) for tool in tools if isinstance(tool, Mapping)] if isinstance(tools, list) else []
    )
    described = all(isinstance(function, Mapping) and "name" in function for function in functions)
    return bool(functions) and len(functions) == len(tools) and described


def read_tools(row: Row) -> tuple[Tool, ...] | None:
    """Return the descriptions of the tools beside a conversation, None if there are none.

    Raises:
        UserError: The field is no list of descriptions, nor the JSON of one.
    """
    field = "tools" if row.look("tools") is not None else "functions"  # what OpenAI wrote before 2024
    name, value = row.name(field), row.get(field)
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
