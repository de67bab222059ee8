"""Where the assistant's turns lie in a rendered conversation, and that the template has left out nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deft_lightning.data.encoding.bounds import TemplateCost
from deft_lightning.data.encoding.located import Span, locate, marked_places
from deft_lightning.data.encoding.refusals import as_json, check_calls, check_tools, left_out, refusal
from deft_lightning.data.encoding.template import SHAPES, Renderer, check_proportion, is_tagged, template_of
from deft_lightning.data.encoding.thoughts import (
    Reasoning,
    answer_of,
    behind_empty_block,
    for_template,
    thought_of,
)
from deft_lightning.data.examples import Message, Tool
from deft_lightning.errors import UserError

__all__ = ["Rendering", "Span", "lay_out", "lay_out_prompt"]


@dataclass(frozen=True)
class Rendering:
    """A conversation as text.

    Attributes:
        text: What the template wrote.
        spans: Where in it each turn of the assistant is.
        tagged: Whether the template marked them itself.
        thoughts: Number of a message to the place of its reasoning, from the start of its span to its answer.
        places: Where texts of the row stand, if one spells a special token: first letter, and the one behind the last.
        left_out: Numbers of messages that are not learnt and whose reasoning the template leaves out.
        shape: In which calls were given to the template.
    """

    text: str
    spans: list[Span]
    tagged: bool
    thoughts: dict[int, tuple[int, int]] = field(default_factory=dict)
    places: list[tuple[int, int]] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    shape: int = 0


def lay_out(
    tokenizer: Any,
    messages: Sequence[Message],
    where: str,
    tools: Sequence[Tool] | None = None,
    *,
    needed: Collection[int] | None = None,
    reasoning: Reasoning = "template",
    special: re.Pattern[str] | None = None,
) -> Rendering:
    """Render a conversation and find the turns of the assistant in it.

    A template with ``{% generation %}`` marks its own spans. Any other is rendered turn by turn: what the assistant's
    turn adds to the prompt that generation would have seen is its span. Where the template writes a turn differently
    once others follow, the span is found in the one whole rendering. A block of reasoning that the template opens and
    closes around nothing is part of no span.

    Args:
        tokenizer: With its chat template.
        messages: The conversation.
        where: File and row, for errors.
        tools: What the assistant may call.
        needed: Numbers of the turns whose spans are wanted; None for all.
        reasoning: What becomes of ``reasoning_content``.
        special: Finds special tokens in the texts of the row; where there are any, the places of those are wanted.

    Raises:
        UserError: The place of a wanted turn is unknown, or the template leaves out a message, the reasoning of a
            wanted turn, a call of a tool, or the tools.
    """
    given = for_template(messages, template_of(tokenizer, tools), reasoning)
    calls = any("tool_calls" in message for message in given)
    problem: UserError | None = None
    for shape in range(len(SHAPES) if calls else 1):
        try:
            renderer = Renderer(tokenizer, tools, shape)
            rendering = _lay_out(renderer, given, where, needed)
            return replace(rendering, places=marked_places(renderer, given, where, rendering.text, special))
        except TemplateCost:
            raise
        except UserError as error:
            # What a template raised at a shape that it does not read says less than what it does to the other.
            problem = error if problem is None or "refuses it" in str(problem) else problem
    assert problem is not None
    raise problem


def _lay_out(renderer: Renderer, messages: list[Message], where: str, needed: Collection[int] | None) -> Rendering:
    tokenizer, tools = renderer.tokenizer, renderer.tools
    asked = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    asked = asked if needed is None else [i for i in asked if i in needed]
    try:
        tagged = is_tagged(tokenizer, tools)
        text, spans = _tagged_spans(renderer, messages, where) if tagged else _spans(renderer, messages, where, asked)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Jinja raises many kinds, raise_exception() of the template among them
        raise refusal(where, f"refuses it: {error}") from None
    spans = [(behind_empty_block(text, start, end, messages[i]), end, i) for start, end, i in spans]
    check_tools(text, tools, where)
    thoughts, lost = _thoughts(text, spans, messages, where, asked)
    _check_said(text, messages, where, {i for _, _, i in spans} if tagged else set(), lost)
    return Rendering(text, spans, tagged, thoughts, [], sorted(lost), SHAPES.index(renderer.shape))


def lay_out_prompt(
    tokenizer: Any, messages: Sequence[Message], where: str, tools: Sequence[Tool] | None = None,
    reasoning: Reasoning = "template", special: re.Pattern[str] | None = None,
) -> tuple[str, list[int], list[tuple[int, int]]]:  # fmt: skip
    """Render what generation starts from.

    Args:
        tokenizer: With its chat template.
        messages: The conversation before the turn that is generated.
        where: File and row, for errors.
        tools: What the assistant may call.
        reasoning: What becomes of ``reasoning_content``.
        special: As for :func:`lay_out`.

    Returns:
        The text, where turns of the assistant begin, and where texts of the row stand if one spells a special token.

    Raises:
        UserError: As :func:`lay_out`.
    """
    given = for_template(messages, template_of(tokenizer, tools), reasoning)
    if any(message["role"] == "assistant" for message in messages):
        whole = lay_out(tokenizer, messages, where, tools, needed=(), reasoning=reasoning)
    else:
        whole = None
    renderer = Renderer(tokenizer, tools, whole.shape if whole else 0)
    try:
        text = renderer(given, prompt=True)
    except MemoryError:
        raise
    except Exception as error:
        raise refusal(where, f"refuses it: {error}") from None
    check_tools(text, tools, where)
    cuts = [] if whole is None else [start for start, _, _ in whole.spans if text.startswith(whole.text[:start])]
    return text, cuts, marked_places(renderer, given, where, text, special, prompt=True)


def _spans(renderer: Renderer, messages: list[Message], where: str, asked: list[int]) -> tuple[str, list[Span]]:
    text = renderer(messages, prompt=False)
    spans = _prefix_spans(renderer, messages, where, text)
    return text, locate(renderer, messages, where, text, asked) if spans is None else spans


def _prefix_spans(renderer: Renderer, messages: list[Message], where: str, text: str) -> list[Span] | None:
    """Return what each turn adds to the rendering before it; None where the template writes that differently."""
    spans: list[Span] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before = renderer(messages[:i], prompt=True)
            last = i == len(messages) - 1
            after = text if last else renderer(messages[: i + 1], prompt=False)
        except UserError:
            raise
        except Exception:  # a template that insists on a question first, or on an answer to every call
            return None
        if not (after.startswith(before) and text.startswith(after)):
            return None
        turn = after[len(before) :]
        if answer_of(message) not in turn:
            raise refusal(where, f"leaves out or changes message {i + 1}")
        check_calls(turn, message, where, i)
        spans.append((len(before), len(after), i))
    return spans


def _thoughts(
    text: str, spans: list[Span], messages: list[Message], where: str, asked: list[int]
) -> tuple[dict[int, tuple[int, int]], set[int]]:
    """Find the reasoning of each turn; one that is not learnt may lose it, as it would in a prompt."""
    found: dict[int, tuple[int, int]] = {}
    lost = {i for i, message in enumerate(messages) if message["role"] == "assistant" and thought_of(message)}
    gone: list[int] = []
    for start, end, i in spans:
        thought, answer = thought_of(messages[i]), answer_of(messages[i])
        if not thought:
            continue
        at = text.find(thought, start, end)
        if at >= 0:
            lost.discard(i)
            behind = text.find(answer, at + len(thought), end) if answer else -1
            found[i] = (start, behind if behind >= 0 else _behind_tag(text, at + len(thought), end))
        elif i in asked:
            gone.append(i)
    if gone:
        raise left_out(where, gone[0], max(asked) in found)
    return found, lost


def _behind_tag(text: str, at: int, end: int) -> int:
    """Return where the tag ends that closes a thought with no answer behind it."""
    for tag in ("</think>", "</thinking>", "</thought>", "</reasoning>"):
        closing = text.find(tag, at, end)
        if closing >= 0:
            return closing + len(tag)
    return at


def _check_said(text: str, messages: list[Message], where: str, in_parts: set[int], lost: set[int]) -> None:
    """Refuse a rendering that lacks a message: what each says must be there, one behind the other."""
    behind = 0  # where the message before ends
    for i, message in enumerate(messages):
        content = answer_of(message) if i in lost else message["content"].strip()
        place = _find(text, content, behind) or _find(text, answer_of(message), behind)
        if place is not None:
            check_calls(text[behind:], message, where, i)
            behind = place[1]
        elif i not in in_parts:  # in tagged templates a turn may be written in parts
            raise refusal(where, f"leaves out or changes message {i + 1}")


def _find(text: str, content: str, behind: int) -> tuple[int, int] | None:
    start = text.find(content, behind)
    if start >= 0:
        return start, start + len(content)
    for written in as_json(content):
        start = text.find(written, behind)
        if start >= 0:
            return start, start + len(written)
    return None


def _tagged_spans(renderer: Renderer, messages: list[Message], where: str) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer, tools = renderer.tokenizer, renderer.tools
    rendered, generated = render_jinja_template(
        conversations=[list(renderer.shape(messages))], tools=list(tools) if tools else None,
        chat_template=template_of(tokenizer, tools),
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
            raise refusal(where, "has generation tags that enclose no assistant turn")
        spans.append((start, end, turns[0]))
    return text, spans


def _says(message: Message, words: str) -> bool:
    calls, content = message.get("tool_calls"), message["content"].strip()
    if calls and all(call["function"]["name"] in words for call in calls):
        return True
    return bool(content or not calls) and (words in message["content"] or content in words)
