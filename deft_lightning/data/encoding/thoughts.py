"""Reasoning: under which key a template reads it, where the text has it, and blocks that a template leaves empty."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from deft_lightning.data.examples import Message

Reasoning = Literal["template", "text", "drop"]
KEYS = ("reasoning_content", "reasoning", "thinking")  # the first one that a template mentions is given to it
READ = {key: re.compile(rf"""\.{key}\b|['"]{key}['"]""") for key in KEYS}
# A thought at the head of a text; its opening tag may be part of the prompt. Families spell the tag in several ways.
TAGS = r"(?:think|thinking|thought|reasoning|seed:think)"
HEAD = re.compile(rf"^\s*(?:<{TAGS}>)?(.*?)</{TAGS}>", re.DOTALL)
OPENING = re.compile(rf"<{TAGS}>\s*(?:</{TAGS}>\s*)?$")
EMPTY = re.compile(rf"\s*<({TAGS})>\s*</\1>\s*")
OPENED = re.compile(rf"<{TAGS}>\s*\Z")  # the end of a prompt that makes the model think
CLOSED = re.compile(rf"\s*</{TAGS}>\s*")


def key_of(template: str) -> str | None:
    """Return the key under which a template reads the reasoning of a message; None where it reads none."""
    return next((key for key in KEYS if READ[key].search(template)), None)


def for_template(messages: Sequence[Message], template: str, reasoning: Reasoning) -> list[Message]:
    """Return messages as a template is given them: reasoning under its key, and nothing that templates do not know.

    Args:
        messages: As they were read.
        template: The chat template.
        reasoning: ``template`` gives it under the template's key; ``text`` writes it into the content, between tags;
            ``drop`` leaves it out.
    """
    if not any("reasoning_content" in message or "weight" in message for message in messages):
        return list(messages)
    key, given = key_of(template) or KEYS[0], []
    for message in messages:
        bare = {name: value for name, value in message.items() if name not in ("weight", "reasoning_content")}
        thought = message.get("reasoning_content")
        if thought and reasoning == "template":
            bare[key] = thought
        elif thought and reasoning == "text":
            bare["content"] = f"<think>\n{thought.strip()}\n</think>\n\n{bare['content']}"
        given.append(bare)
    return given


def thought_of(message: Message) -> str:
    """Return what the assistant thinks in a message, by key or between tags in its text; empty if nothing."""
    given = next((message[key] for key in KEYS if message.get(key)), "")
    if given:
        return str(given).strip()
    within = _head(message["content"])
    return within[1].strip() if within else ""


def answer_of(message: Message) -> str:
    """Return what the assistant says in a message behind its thought, without blanks around it."""
    within = _head(message["content"])
    return str(message["content"])[within.end() if within else 0 :].strip()


def _head(content: str) -> re.Match[str] | None:
    return HEAD.match(content) if "</" in content else None


def behind_empty_block(text: str, start: int, end: int, message: Message) -> int:
    """Return where a turn begins that the template has opened with an empty block of reasoning.

    What the template writes of its own accord is no answer: to learn it would teach not to think.

    Args:
        text: The conversation.
        start: Where the turn begins.
        end: Where it ends.
        message: What was given; a thought of its own is never left out.
    """
    if thought_of(message) or EMPTY.match(message["content"]):
        return start
    block = EMPTY.match(text, start, end)
    if block is None and OPENED.search(text[max(0, start - 40) : start]):
        block = CLOSED.match(text, start, end)
    return block.end() if block else start
