"""Turns of a conversation: the names of other exporters become those of chat templates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from deft_lightning.data.examples import Message
from deft_lightning.data.records.calls import read_calls, written_calls
from deft_lightning.data.records.parts import Parts, as_text, leave_out, take_apart
from deft_lightning.data.records.shares import TURN_KEYS, turn_weight
from deft_lightning.data.sources.rows import Row, absent, columns
from deft_lightning.errors import did_you_mean

ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's names, and those of other exporters, for the four roles of chat templates. Templates drop a turn of a role
# that they do not know without a word, so nothing but these four may reach them.
ALIASES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "ai": "assistant", "prompter": "user", "function_call": "assistant", "tool_call": "assistant",
    "observation": "tool", "function_response": "tool", "tool_response": "tool", "function": "tool",
    "ipython": "tool", "developer": "system",
}  # fmt: skip
# Names of what an assistant thought before it spoke; templates read one of them.
REASONING = ("reasoning_content", "reasoning", "thinking")
CHANNELS = ("analysis", "commentary", "final")
# Where turns are plain texts, as LIMA has them, roles take turns; a text that begins with a role is none of these.
ROLE_FIRST = re.compile(rf"\W*({'|'.join((*ROLES, *ALIASES))})\s*:", re.IGNORECASE)
IN_TURN = "turns, plain texts of user and assistant by turns"
PICTURES = ("image", "images", "video", "videos", "audio", "audios")


def read_turns(row: Row, field: str, turns: Any, role_key: str, content_key: str) -> list[Message]:
    """Return the turns as messages with the roles of chat templates.

    Args:
        row: For error messages; keys of turns that become nothing are added to what it has left.
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
    thought = ""  # of a channel of its own, until the turn that it belongs to
    for i, turn in enumerate(turns):
        at = f"{field}[{i}]"
        if not isinstance(turn, Mapping):
            raise row.fail(at, f"expected an object, got {type(turn).__name__}", "type")
        if row.ignore:
            turn = {key: value for key, value in turn.items() if not row.ignores(row.key(at, key))}
        names = [(role_key, content_key), ("role", "content"), ("from", "value")]
        role_name, content_name = next((pair for pair in names if not absent(turn.get(pair[0]))), names[0])
        spelt = _role(row, f"{at}.{role_name}", turn, role_name)
        channel = _channel(row, at, turn, spelt)
        if channel == "analysis":
            thought += ("\n\n" if thought else "") + row.text(f"{at}.{content_name}", turn.get(content_name))
            _note_left(row, field, turn, {role_name, content_name, "channel"})
            continue
        if thought and ALIASES.get(spelt, spelt) != "assistant":
            raise row.fail(at, "follows a thought (channel analysis) that belongs to no assistant turn", "role")
        messages += _Turn(row, field, at, turn, spelt, role_name, content_name).messages(thought)
        thought = ""
    if thought:
        raise row.fail(field, "ends with a thought (channel analysis) that belongs to no answer", "role")
    return messages


def read_conversation(row: Row, field: str, role_key: str, content_key: str) -> list[Message]:
    """Return the conversation of a column, whose turns may be plain texts: the user's first, then the assistant's.

    Args:
        row: As for :func:`read_turns`.
        field: Field of the turns.
        role_key: As for :func:`read_turns`.
        content_key: As for :func:`read_turns`.

    Raises:
        UserError: As for :func:`read_turns`; plain texts that begin with names of roles.
    """
    name, turns = row.require(field)
    turns = row.unpack(turns)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        return read_turns(row, name, turns, role_key, content_key)
    if len(turns) > 1 and all(map(ROLE_FIRST.match, turns)):
        problem = 'is a list of texts that begin with roles; write each as {"role": "user", "content": "..."}'
        raise row.fail(name, problem, "type")
    row.read[name] = IN_TURN
    return [
        {"role": ("user", "assistant")[i % 2], "content": row.text(f"{name}[{i}]", text)}
        for i, text in enumerate(turns)
    ]


def _role(row: Row, at: str, turn: Mapping[str, Any], role_name: str) -> str:
    role = turn.get(role_name)
    if absent(role):
        raise row.fail(at, f"is missing (the message has {columns(turn)})", "missing")
    spelt = role.strip().lower() if isinstance(role, str) else str(role)
    if ALIASES.get(spelt, spelt) not in ROLES:
        every = [*ROLES, *ALIASES]
        hint = did_you_mean(str(role)[:40], every)
        raise row.fail(at, f"unknown role {str(role)[:40]!r}; known: {', '.join(every)}.{hint}", "role")
    return spelt


def _channel(row: Row, at: str, turn: Mapping[str, Any], spelt: str) -> str | None:
    """Return the channel that gpt-oss speaks on; thoughts are on one of their own."""
    channel = turn.get("channel")
    if absent(channel) or channel == "" or ALIASES.get(spelt, spelt) != "assistant":
        return None
    if channel not in CHANNELS:
        raise row.fail(f"{at}.channel", f"unknown channel {channel!r}; known: {', '.join(CHANNELS)}", "role")
    return str(channel)


def _note_left(row: Row, field: str, turn: Mapping[str, Any], used: set[str]) -> None:
    for key, value in turn.items():
        if key not in used and not empty(value):
            row.left.add(f"{field}[].{key}")


def empty(value: Any) -> bool:
    """Return whether a value says nothing: absent, or an empty text, list or object."""
    return absent(value) or (isinstance(value, str | list | dict | tuple) and not value)


class _Turn:
    """One turn as it is read.

    Args:
        row: For error messages.
        field: Column of the turns.
        at: Place of this one.
        turn: As the row has it.
        spelt: Its role, in lower case.
        role_name: Key of the role.
        content_name: Key of the content.
    """

    def __init__(
        self, row: Row, field: str, at: str, turn: Mapping[str, Any], spelt: str, role_name: str, content_name: str
    ) -> None:  # fmt: skip
        self.row, self.field, self.at, self.turn, self.spelt = row, field, at, turn, spelt
        self.content_name, self.role = content_name, ALIASES.get(spelt, spelt)
        self.used = {role_name, content_name}

    def messages(self, thought: str) -> list[Message]:
        """Return what the turn becomes: one message, or one for each result of a tool that it holds.

        Args:
            thought: What the assistant thought in turns of their own before this one.
        """
        place = f"{self.at}.{self.content_name}"
        for key in PICTURES:
            if not empty(self.turn.get(key)):
                problem = (
                    f"holds pictures, sound or video, and only text is learnt; {leave_out(self.row, self.at, key)}"
                )
                raise self.row.fail(f"{self.at}.{key}", problem, "media")
        content = self.turn.get(self.content_name)
        parts = Parts(content, "", [], []) if self.role == "tool" else take_apart(self.row, place, content)
        strange = parts.results if self.role == "assistant" else (parts.thought, *parts.calls)
        if any(strange):
            what = "the result of a tool" if self.role == "assistant" else "a thought or a call of a tool"
            raise self.row.fail(place, f"holds {what}, which no turn of role {self.role!r} has", "role")
        if self.role == "assistant":
            made = [self._assistant(place, parts, thought)]
        elif parts.results:
            made = [{"role": "tool", "content": text, **({"tool_call_id": id} if id else {})}
                    for id, text in parts.results]  # fmt: skip
            if str(parts.content).strip():
                made.append({"role": self.role, "content": parts.content})
        else:
            made = [self._other(place, parts)]
        _note_left(self.row, self.field, self.turn, self.used)
        return made

    def _assistant(self, place: str, parts: Parts, thought: str) -> Message:
        calls = self._calls(parts)
        message: Message = {"role": "assistant", "content": self._spoken(place, parts, calls)}
        if thoughts := [text for text in (thought, *self._thoughts(), parts.thought) if text.strip()]:
            message["reasoning_content"] = "\n\n".join(dict.fromkeys(thoughts))
        if calls:
            message["tool_calls"] = calls
        weight = turn_weight(self.row, self.at, self.turn)
        if weight is not None:
            self._report(TURN_KEYS, "weights of turns")
        self.used |= {*TURN_KEYS, *REASONING, "channel", "tool_calls", "function_call"}
        if weight is not None and weight != 1:
            message["weight"] = weight
        return message

    def _calls(self, parts: Parts) -> list[dict[str, Any]]:
        calls = self.turn.get("tool_calls") or self.turn.get("function_call")  # the latter is OpenAI's before 2024
        if not absent(calls):
            calls = self.row.unpack(calls)
            return read_calls(self.row, f"{self.at}.tool_calls", calls if isinstance(calls, list) else [calls])
        if parts.calls:
            return read_calls(self.row, f"{self.at}.{self.content_name}", list(parts.calls))
        if self.spelt in ("function_call", "tool_call") and (written := written_calls(self.row, parts.content)):
            # ShareGPT writes a call as the JSON of it: the template has its own way to put that.
            return read_calls(self.row, f"{self.at}.{self.content_name}", written)
        return []

    def _spoken(self, place: str, parts: Parts, calls: list[dict[str, Any]]) -> str:
        if not calls:
            if absent(parts.content):
                raise self.row.fail(place, "is missing", "missing")
            return self.row.text(place, parts.content)
        spelt_out = self.spelt in ("function_call", "tool_call") and bool(written_calls(self.row, parts.content))
        return "" if absent(parts.content) or spelt_out else self.row.text(place, parts.content, empty=True)

    def _report(self, keys: Iterable[str], meaning: str) -> None:
        """Say which keys of the turn became something beside its content."""
        self.row.read |= {self.row.key(self.at, key): meaning for key in keys if not empty(self.turn.get(key))}

    def _thoughts(self) -> list[str]:
        given = {key: self.turn[key] for key in REASONING if not empty(self.turn.get(key))}
        self._report(given, "reasoning")
        return [self.row.text(f"{self.at}.{key}", value, empty=True) for key, value in given.items()]

    def _other(self, place: str, parts: Parts) -> Message:
        if absent(parts.content):
            raise self.row.fail(place, "is missing", "missing")
        if turn_weight(self.row, self.at, self.turn) == 0:  # says what is so anyway
            self.used |= set(TURN_KEYS)
            self._report(TURN_KEYS, "weights of turns")
        if self.role != "tool":
            return {"role": self.role, "content": self.row.text(place, parts.content, empty=True)}
        self.used |= {"name", "tool_call_id"}
        own = {key: str(self.turn[key]) for key in ("name", "tool_call_id") if not absent(self.turn.get(key))}
        return {"role": "tool", "content": as_text(self.row, place, parts.content), **own}
