"""What is to be said of a row whose text spells what a template or a tokenizer would write itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from deft_lightning.data.encoding.markup import FOREIGN, forging, known, texts_of
from deft_lightning.data.encoding.template import template_of
from deft_lightning.data.examples import Example, Message, Tool

SPELT = "a message, call or tool spells"
# Calls as models write them: Hermes and Qwen, Glaive, Llama, Mistral.
CALL = re.compile(r"<\|?(?:tool|function)_?calls?\|?>|<\|python_tag\|>|\[TOOL_CALLS\]|<function=")
# Of markup, what is named as it is; of the rest there may be many names, which one note is enough for.
NAMED = re.compile(
    r"<\|(?:im_(?:start|end|sep)|(?:start|end)_header_id|eot_id|eom_id|python_tag|begin_of_text|end_of_text|endoftext|end"
    r"|system|user|assistant|prompter|message|channel|(?:begin|end)_of_(?:thought|solution)|image_pad)\|>"
)
JSON_CALL = re.compile(r'\s*\[?\s*\{\s*"name":\s*"[^"]{1,200}",\s*"(?:arguments|parameters)":')
# Turns that a text has headers for: Guanaco's and Alpaca's with hashes, Vicuna's and Anthropic's without.
ASKED = re.compile(r"#{2,4} ?(?:Human|User|Instruction|Question|Input) ?:|(?:^|(?<=\s))(?:USER|User|Human) ?:")
ANSWERED = re.compile(r"#{2,4} ?(?:Assistant|Response|Answer|Output) ?:|(?:^|(?<=\s))(?:ASSISTANT|Assistant) ?:")


def notes_of_conversation(
    example: Example, tokenizer: Any, spelt: Iterable[str] | None, *, thoughts: bool
) -> list[str]:  # fmt: skip
    """Return what is to be said of a conversation.

    Args:
        example: The row.
        tokenizer: With its chat template.
        spelt: Special tokens of its texts that became letters; None where they are kept as tokens.
        thoughts: Whether reasoning is given to the template.
    """
    messages, special = example.messages or (), forging(tokenizer)
    texts = list(texts_of(messages, example.tools, thoughts=thoughts))
    notes: list[str] = []
    if spelt is not None:
        notes += [f"{SPELT} the special token {name}: it is read as plain text" for name in set(spelt)]
    elif special is not None and any(map(special.search, texts)):
        notes.append(f"{SPELT} special tokens: they are read as those tokens")
    if foreign := _foreign(texts, tokenizer):
        notes.append(f"{SPELT} markup of another format, such as {foreign}: it is read as plain text")
    headers = filter(None, (headers_of(message["content"]) for message in messages if message["role"] != "tool"))
    if header := next(headers, None):
        notes.append(f"a message has headers of turns, such as {header!r}: they are read as text of that message")
    return notes + list(_notes_of_tools(messages, example.tools, template_of(tokenizer, example.tools)))


def _notes_of_tools(messages: Sequence[Message], tools: Sequence[Tool] | None, template: str) -> Iterable[str]:
    """Yield what a row has as text although the template has its own way to write it."""
    said = [message for message in messages if message["role"] == "assistant" and not message.get("tool_calls")]
    call = next(filter(None, (_call(message["content"]) for message in said)), None)
    results = any(message["role"] == "tool" for message in messages) and len(said) == len(_answers(messages))
    if "tool_calls" in template and (call or results):
        shown = f" ({call})" if call else ""
        yield f"calls of tools stand in the text{shown}: they stay that text, the template writes none"
    if any(message["role"] == "tool" and "<tool_response>" in message["content"] for message in messages):
        if "<tool_response>" in template:
            yield "results of tools stand in <tool_response> tags: the template writes its own around them"
    listed = [message["content"] for message in messages if message["role"] == "system"]
    if tools and any(_lists(content, tools) for content in listed):
        yield (
            "the system turn lists the tools, and the template lists them again: --data.column_map.tools none leaves"
            " the column out"
        )


def _call(text: str) -> str | None:
    """Return how a text spells a call."""
    markup = CALL.search(text)
    return markup[0] if markup else "as JSON" if JSON_CALL.match(text) else None


def _answers(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message["role"] == "assistant"]


def _lists(content: str, tools: Sequence[Tool]) -> bool:
    names = (re.escape(tool["function"]["name"]) for tool in tools)
    return all(re.search(rf"""["']name["']:\s*["']{name}["']""", content) for name in names)


def notes_of_text(text: str, tokenizer: Any, *, doubled: bool) -> tuple[str, ...]:
    """Return what is to be said of a raw text.

    Args:
        text: Without the beginning and the end of sequence.
        tokenizer: The tokenizer.
        doubled: Whether it had these.
    """
    notes, special = [], forging(tokenizer)
    if doubled:
        notes.append("the text begins or ends with a token that is added anyway: it is added only once")
    if special is not None and (inside := special.search(text)):
        notes.append(f"the text has special tokens such as {inside[0]}: they are learnt as those tokens")
    if foreign := _foreign([text], tokenizer):
        notes.append(
            f"the text has markup of a chat format, such as {foreign}, that is not a token: it is learnt as plain text"
        )
    if header := headers_of(text):
        notes.append(
            f"the text is a conversation with headers such as {header!r}: all of it is learnt, questions "
            "included; in rows of messages, only the answers are"
        )
    return tuple(notes)


def headers_of(text: str) -> str | None:
    """Return the header of a question that a text has beside one of an answer; None where it has not both."""
    asked = ASKED.search(text)
    return asked[0].strip() if asked and ANSWERED.search(text) else None


def _foreign(texts: Sequence[str], tokenizer: Any) -> str | None:
    names = set(chain.from_iterable(map(FOREIGN.findall, texts))) - known(tokenizer)
    shown = {
        name if name[1] not in "|\uff5c" or NAMED.fullmatch(name) else f"<{name[1]}\u2026{name[1]}>" for name in names
    }
    return min(shown, default=None)
