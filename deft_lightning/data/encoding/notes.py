"""What is to be said of a row whose text spells what a template or a tokenizer would write itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain

from deft_lightning.data.encoding.markup import FOREIGN, texts_of
from deft_lightning.data.examples import Example, Message, Tool

SPELT = "a message, call or tool spells"
# Calls as models write them: Hermes and Qwen, Mistral, Llama, and others.
CALL = re.compile(r"<\|?(?:tool|function)_calls?\|?>|\[TOOL_CALLS\]|<function=")
# Turns that a text has headers for: Guanaco's and Alpaca's with hashes, Vicuna's and Anthropic's without.
ASKED = re.compile(r"#{2,4} ?(?:Human|User|Instruction|Question|Input) ?:|(?:^|(?<=\s))(?:USER|User|Human) ?:")
ANSWERED = re.compile(r"#{2,4} ?(?:Assistant|Response|Answer|Output) ?:|(?:^|(?<=\s))(?:ASSISTANT|Assistant) ?:")


def notes_of_conversation(
    example: Example, template: str, special: re.Pattern[str] | None, spelt: Iterable[str] | None, *, thoughts: bool
) -> list[str]:
    """Return what is to be said of a conversation.

    Args:
        example: The row.
        template: The chat template.
        special: Finds special tokens; None where the tokenizer has none.
        spelt: Special tokens of its texts that became letters; None where they are kept as tokens.
        thoughts: Whether reasoning is given to the template.
    """
    messages = example.messages or ()
    texts = list(texts_of(messages, example.tools, thoughts=thoughts))
    notes: list[str] = []
    if spelt is not None:
        notes += [f"{SPELT} the special token {name}: it is read as letters" for name in set(spelt)]
    elif special is not None and any(map(special.search, texts)):
        notes.append(f"{SPELT} special tokens: they are read as those tokens")
    if foreign := _foreign(texts, special):
        notes.append(f"{SPELT} markup of another format, such as {foreign}: it is read as letters")
    headers = filter(None, (headers_of(message["content"]) for message in messages if message["role"] != "tool"))
    if header := next(headers, None):
        notes.append(f"a message has headers of turns, such as {header!r}: they are read as text of that message")
    return notes + list(_notes_of_tools(messages, example.tools, template))


def _notes_of_tools(messages: Sequence[Message], tools: Sequence[Tool] | None, template: str) -> Iterable[str]:
    """Yield what a row has as text although the template has its own way to write it."""
    for message in messages if "tool_calls" in template else ():
        if (
            message["role"] == "assistant"
            and not message.get("tool_calls")
            and (call := CALL.search(message["content"]))
        ):
            yield f"calls of tools stand in the text ({call[0]}): they stay that text, the template writes none"
            break
    if any(message["role"] == "tool" and "<tool_response>" in message["content"] for message in messages):
        if "<tool_response>" in template:
            yield "results of tools stand in <tool_response> tags: the template writes its own around them"
    listed = [message["content"] for message in messages if message["role"] == "system"]
    if tools and any(_lists(content, tools) for content in listed):
        yield (
            "the system turn lists the tools, and the template lists them again: --data.column_map.tools none leaves"
            " the column out"
        )


def _lists(content: str, tools: Sequence[Tool]) -> bool:
    names = (re.escape(tool["function"]["name"]) for tool in tools)
    return all(re.search(rf"""["']name["']:\s*["']{name}["']""", content) for name in names)


def notes_of_text(text: str, special: re.Pattern[str] | None, *, doubled: bool) -> tuple[str, ...]:
    """Return what is to be said of a raw text.

    Args:
        text: Without the beginning and the end of sequence.
        special: Finds special tokens; None where the tokenizer has none.
        doubled: Whether it had these.
    """
    notes = []
    if doubled:
        notes.append("the text begins or ends with a token that is added anyway: it is there once")
    if special is not None and (inside := special.search(text)):
        notes.append(f"the text has special tokens such as {inside[0]}: they are learnt as those tokens")
    if foreign := _foreign([text], special):
        notes.append(
            f"the text has markup of a chat format, such as {foreign}, that is no token: it is learnt as letters"
        )
    if header := headers_of(text):
        notes.append(
            f"the text is a conversation with headers such as {header!r}: it is learnt as one text, the questions too;"
            " in rows of messages the answers alone would be"
        )
    return tuple(notes)


def headers_of(text: str) -> str | None:
    """Return the header of a question that a text has beside one of an answer; None where it has not both."""
    asked = ASKED.search(text)
    return asked[0].strip() if asked and ANSWERED.search(text) else None


def _foreign(texts: Sequence[str], special: re.Pattern[str] | None) -> str | None:
    names = {
        "<\uff5c\u2026\uff5c>" if name.startswith("<\uff5c") else name  # whatever is between the bars: one note of all
        for name in chain.from_iterable(map(FOREIGN.findall, texts))
    }
    return min((name for name in names if special is None or not special.search(name)), default=None)
