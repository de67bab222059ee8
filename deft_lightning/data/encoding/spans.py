"""Where the assistant's turns lie in a rendered conversation, and that the template has left out nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from deft_lightning.data.encoding.template import check_proportion, is_tagged, render, template_of
from deft_lightning.data.examples import Message, Tool
from deft_lightning.data.sources.rows import RowError
from deft_lightning.errors import UserError

Span = tuple[int, int, int]  # start, end, number of the message


class Rendering(NamedTuple):
    """A conversation as text.

    Attributes:
        text: What the template wrote.
        spans: Where in it each turn of the assistant is.
        tagged: Whether the template marked them itself.
    """

    text: str
    spans: list[Span]
    tagged: bool


def refusal(where: str, problem: str, advice: str = "") -> RowError:
    """Return the error of a row that the chat template refuses."""
    return RowError(where, f"the chat template {problem}{advice} (--data.chat_template)", kind="chat template")


def lay_out(tokenizer: Any, messages: list[Message], where: str, tools: Sequence[Tool] | None = None) -> Rendering:
    """Render a conversation and find the turns of the assistant in it.

    A template with ``{% generation %}`` marks its own spans. Any other is rendered turn by turn: what the assistant's
    turn adds to the prompt that generation would have seen is its span.

    Args:
        tokenizer: With its chat template.
        messages: The conversation.
        where: File and row, for errors.
        tools: What the assistant may call.

    Raises:
        UserError: The template rewrites earlier turns, or leaves out a message, a call of a tool, or the tools.
    """
    try:
        tagged = is_tagged(tokenizer, tools)
        text, spans = (_tagged_spans if tagged else _prefix_spans)(tokenizer, messages, where, tools)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Jinja raises many kinds, raise_exception() of the template among them
        raise refusal(where, f"refuses it: {error}") from None
    _check_tools(text, tools, where)
    behind = 0  # where the message before ends
    for i, message in enumerate(messages):
        content = message["content"].strip()
        start = text.find(content, behind)
        if start < 0:
            start = max(text.find(written, behind) for written in _as_json(content))
        if start < 0:
            if tagged and message["role"] == "assistant" and any(number == i for _, _, number in spans):
                continue  # written in parts
            raise refusal(where, f"leaves out or changes message {i + 1}")
        if "tool_calls" in message:
            _check_calls(text[behind:], message, where, i)
        behind = start + len(content)
    return Rendering(text, spans, tagged)


def lay_out_prompt(
    tokenizer: Any, messages: list[Message], where: str, tools: Sequence[Tool] | None = None
) -> tuple[str, list[int]]:
    """Render what generation starts from; return it with the places where turns of the assistant begin.

    Args:
        tokenizer: With its chat template.
        messages: The conversation before the turn that is generated.
        where: File and row, for errors.
        tools: What the assistant may call.

    Raises:
        UserError: As :func:`lay_out`.
    """
    try:
        text = render(tokenizer, messages, prompt=True, tools=tools)
    except MemoryError:
        raise
    except Exception as error:
        raise refusal(where, f"refuses it: {error}") from None
    _check_tools(text, tools, where)
    if not any(message["role"] == "assistant" for message in messages):
        return text, []
    return text, [start for start, _, _ in lay_out(tokenizer, messages, where, tools).spans]


def _as_json(value: str) -> tuple[str, str]:
    """The two ways to write a text within JSON, without the quotes."""
    return json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]


def _check_tools(text: str, tools: Sequence[Tool] | None, where: str) -> None:
    """A template that knows no tools leaves them out without a word."""
    for tool in tools or ():
        name = tool["function"]["name"]
        if name not in text:
            advice = (
                "; choose one that lists tools, such as chatml, or leave them out with --data.column_map.tools none"
            )
            raise refusal(where, f"leaves out the tool {name!r}", advice)


def _check_calls(text: str, message: Message, where: str, i: int) -> None:
    for call in message.get("tool_calls", ()):
        function = call["function"]
        for value in (function["name"], *_leaves(function["arguments"])):
            spelt = _as_json(value) if isinstance(value, str) else (json.dumps(value, default=str),)
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


def _tagged_spans(
    tokenizer: Any, messages: list[Message], where: str, tools: Sequence[Tool] | None
) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, generated = render_jinja_template(
        conversations=[messages], tools=list(tools) if tools else None, chat_template=template_of(tokenizer, tools),
        return_assistant_tokens_mask=True, add_generation_prompt=False, **tokenizer.special_tokens_map,
    )  # fmt: skip
    check_proportion(rendered[0], messages, tools)
    text, turns = rendered[0], [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans: list[Span] = []
    runs = [(start, end) for start, end in generated[0] if end > start]
    if len(runs) == len(turns):
        return text, [(start, end, i) for (start, end), i in zip(runs, turns, strict=True)]
    for start, end in runs:
        words = text[start:end]
        for token in tokenizer.get_added_vocab():
            words = words.replace(token, "")
        words = words.strip()
        if not words:
            continue
        # Some turns have no tags, or several pairs: a run belongs to the next turn that says it.
        while turns and not _says(messages[turns[0]], words):
            turns.pop(0)
        if not turns:
            raise refusal(where, "has tags that are around no assistant turn")
        spans.append((start, end, turns[0]))
    return text, spans


def _says(message: Message, words: str) -> bool:
    calls, content = message.get("tool_calls"), message["content"].strip()
    if calls and all(call["function"]["name"] in words for call in calls):
        return True
    return bool(content or not calls) and (words in message["content"] or content in words)


def _prefix_spans(
    tokenizer: Any, messages: list[Message], where: str, tools: Sequence[Tool] | None
) -> tuple[str, list[Span]]:
    text = render(tokenizer, messages, prompt=False, tools=tools)
    spans: list[Span] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:i], prompt=True, tools=tools)
        last = i == len(messages) - 1
        after = text if last else render(tokenizer, messages[: i + 1], prompt=False, tools=tools)
        if not (after.startswith(before) and text.startswith(after)):
            raise refusal(
                where,
                f"writes message {i + 1} differently once more turns follow, so its span is"
                " unknown; use a template with generation tags, or chatml",
            )
        turn = after[len(before) :]
        if message["content"].strip() not in turn:
            raise refusal(where, f"leaves out or changes message {i + 1}")
        _check_calls(turn, message, where, i)
        spans.append((len(before), len(after), i))
    return text, spans
