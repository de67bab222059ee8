"""Turns found in the one whole rendering, for templates that write a turn differently once others follow."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from deft_lightning.data.encoding.markup import texts_of
from deft_lightning.data.encoding.refusals import check_calls, left_out, refusal
from deft_lightning.data.encoding.template import Renderer
from deft_lightning.data.encoding.thoughts import HEAD, KEYS, OPENING, answer_of, thought_of
from deft_lightning.data.examples import Message
from deft_lightning.data.sources.rows import RowError

Span = tuple[int, int, int]  # start, end, number of the message
# Two code points that no text may hold. Between them are the number of a message and the piece of it that begins
# (small letter) or ends (capital): t, c, n for thought, content, name of a function with the number of its call; s for
# any other text that spells a special token. Templates that write JSON in ASCII escape the two.
MARK = re.compile(r"(?:\ufdd0|\\ufdd0)(\d+)([a-zA-Z]\d*)(?:\ufdd1|\\ufdd1)")


class Pieces(NamedTuple):
    """Where the pieces of each turn of the assistant are.

    Attributes:
        text: The rendering, without marks.
        of: Number of a message to its pieces, each from its first letter to the one behind its last.
        places: Of every piece, as often as the template writes it.
    """

    text: str
    of: dict[int, dict[str, tuple[int, int]]]
    places: list[tuple[int, int]]


def locate(
    renderer: Renderer, messages: Sequence[Message], where: str, text: str, needed: Collection[int]
) -> list[Span]:
    """Return the spans of turns in a rendering.

    The conversation is rendered once more with marks around what the assistant thinks, says and calls; they show where
    the template has put it. A turn begins behind the header that generation would have seen, and ends with the last
    special token that the template writes alike whether other turns follow or not.

    Args:
        renderer: With the tokenizer and its template.
        messages: The conversation.
        where: File and row, for errors.
        text: The whole rendering.
        needed: Numbers of the turns that are learnt.

    Raises:
        UserError: The place of a needed turn cannot be told, or its thought or its answer is left out.
    """
    pieces = _pieces(renderer, messages)
    if pieces.text != text:
        raise refusal(where, "changes what it writes with the text of a message, so the turns cannot be located")
    spans = []
    added = sorted(renderer.tokenizer.get_added_vocab(), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, added)) or "(?!)")
    behind = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        own = pieces.of.get(i, {})
        if i in needed:
            kept_later = i < max(needed) and "t" in pieces.of.get(max(needed), {})
            _check_complete(message, own, where, i, kept_later)
            first, last = min(start for start, _ in own.values()), max(end for _, end in own.values())
            start = _start(renderer, messages, where, i, text, behind, first)
            end = _end(renderer, messages, where, i, text, last, special)
            spans.append((start, end, i))
        behind = max((end for _, end in own.values()), default=behind)
    return spans


def marked_places(
    renderer: Renderer, messages: Sequence[Message], where: str, text: str, special: re.Pattern[str] | None, *,
    prompt: bool = False,
) -> list[tuple[int, int]]:  # fmt: skip
    """Return where a rendering holds texts of the row, if any of them spells a special token.

    Texts of a row are those of its messages, of the calls in them, and of the tools.

    Args:
        renderer: With the tokenizer and its template.
        messages: The conversation.
        where: File and row, for errors.
        text: The rendering.
        special: What finds special tokens; None for none.
        prompt: Whether the rendering ends with the header of an answer.

    Raises:
        UserError: The template writes something else around a text once there are marks in it.
    """
    if special is None or not any(special.search(part) for part in texts_of(messages, renderer.tools)):
        return []
    try:
        pieces = _pieces(renderer, messages, prompt=prompt, special=special)
    except MemoryError:
        raise
    except Exception as error:  # such as a template that insists on the length of an id
        raise _reads(where, f"; with marks in it, it raises: {error}") from None
    if pieces.text != text:
        raise _reads(where)
    return pieces.places


def _reads(where: str, more: str = "") -> RowError:
    problem = f"changes what it writes with a text of the row, which spells a special token{more}"
    return refusal(where, problem, "; --data.special_tokens token takes it for that token")


def _check_complete(message: Message, own: dict[str, tuple[int, int]], where: str, i: int, kept_later: bool) -> None:
    if answer_of(message) and "c" not in own:
        raise refusal(where, f"leaves out or changes message {i + 1}")
    if thought_of(message) and "t" not in own:
        raise left_out(where, i, kept_later)
    if not own:
        check_calls("", message, where, i)
        raise refusal(where, f"leaves out message {i + 1}")


def _start(
    renderer: Renderer, messages: Sequence[Message], where: str, i: int, text: str, behind: int, first: int
) -> int:  # fmt: skip
    """Return where a turn begins: behind the header with which generation would begin it."""
    header = _header(renderer, messages[:i])
    # A finished turn may lack the tag with which generation begins to think.
    for written in (header, header.rstrip("\n "), OPENING.sub("", header)):
        at = text.rfind(written, behind, first)
        if written and at >= 0:
            return at + len(written)
    if not header:  # generation goes on where the last message ends
        return first
    raise refusal(where, f"begins message {i + 1} with a different header than a generated answer")


def _header(renderer: Renderer, before: Sequence[Message]) -> str:
    """Return what a template adds to a conversation for an answer to follow."""
    for conversation in (before, [{"role": "user", "content": "x"}]):
        try:
            bare, prompt = renderer(conversation, prompt=False), renderer(conversation, prompt=True)
        except Exception:  # a template may insist on a first question; where both fail there is no header
            continue
        return prompt[_common(bare, prompt) :]
    return ""


def _end(
    renderer: Renderer, messages: Sequence[Message], where: str, i: int, text: str, last: int, special: re.Pattern[str]
) -> int:  # fmt: skip
    """Return where a turn ends: behind the token that closes it."""
    if i == len(messages) - 1:
        return len(text)
    alone = _pieces(renderer, messages[: i + 1])
    own = alone.of.get(i)
    if own:
        closing = alone.text[max(end for _, end in own.values()) :]
        same = _common(closing, text[last:])
        ends = [match.end() for match in special.finditer(closing) if match.end() <= same]
        if ends:
            return last + ends[-1]
    # The last turn closes with another token than the ones before it, as in gpt-oss.
    blank = re.compile(r"\s*").match(text, last)
    after = special.match(text, blank.end() if blank else last)
    if after is not None:
        return after.end()
    if own and same and closing[:same].strip():
        return last + same
    raise refusal(where, f"closes message {i + 1} differently when more turns follow, so its end is unknown")


def _common(one: str, other: str) -> int:
    """Return how many letters two texts have in common at their head."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size
    low, high = 0, size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
    return low


def _pieces(
    renderer: Renderer, messages: Sequence[Message], *, prompt: bool = False, special: re.Pattern[str] | None = None
) -> Pieces:
    """Render with marks around pieces of the assistant, or of all that may spell a special token; take them out."""
    if special is None:
        marked = [
            _marked(i, message) if message["role"] == "assistant" else message for i, message in enumerate(messages)
        ]
    else:
        numbers = count()
        marked = [_marked(i, _spelling(message, special, i, numbers)) for i, message in enumerate(messages)]
        tools = _spelt(renderer.tools, special, len(messages), numbers) if renderer.tools else None
        renderer = renderer.with_tools(tools)
    written = renderer(marked, prompt=prompt)
    parts: list[str] = []
    opened: dict[tuple[int, str], int] = {}
    of: dict[int, dict[str, tuple[int, int]]] = {}
    places: list[tuple[int, int]] = []
    at, length = 0, 0
    for match in MARK.finditer(written):
        parts.append(written[at : match.start()])
        length += len(parts[-1])
        at, number, letter = match.end(), int(match[1]), match[2]
        if letter[0].islower():
            opened.setdefault((number, letter), length)
        elif (number, letter.lower()) in opened:
            places.append((opened.pop((number, letter.lower())), length))
            # The name of a function may come again, with its result: the first one is the call.
            of.setdefault(number, {}).setdefault(letter.lower(), places[-1])
    parts.append(written[at:])
    return Pieces("".join(parts), of, places)


def _spelling(message: Message, special: re.Pattern[str], i: int, numbers: Iterator[int]) -> Message:
    """Return a message with marks around special tokens in its calls and names; those of the rest are marked anyway."""
    return {
        key: value if key in ("role", "content", *KEYS) else _spelt(value, special, i, numbers)
        for key, value in message.items()
    }


def _spelt(value: Any, special: re.Pattern[str], i: int, numbers: Iterator[int]) -> Any:
    """Return a value with marks around every text in it that spells a special token."""
    if isinstance(value, str):
        return _wrap(value, i, f"s{next(numbers)}") if special.search(value) else value
    if isinstance(value, Mapping):
        return {_spelt(key, special, i, numbers): _spelt(inner, special, i, numbers) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_spelt(inner, special, i, numbers) for inner in value]
    return value


def _marked(i: int, message: Message) -> Message:
    """Return a message with marks around its pieces, inside the blanks that a template may strip."""
    content: str = message["content"]
    within = HEAD.match(content)
    if within:
        tag = re.match(r"</[^>]*>", content[within.end(1) :])
        assert tag is not None
        head = content[: within.start(1)] + _wrap(within[1], i, "t") + tag[0]
        content = head + _wrap(content[within.end(1) + tag.end() :], i, "c")
    else:
        content = _wrap(content, i, "c")
    marked = {**message, "content": content}
    for key in KEYS:
        if marked.get(key):
            marked[key] = _wrap(marked[key], i, "t")
    if calls := marked.get("tool_calls"):
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "name": _wrap(call["function"]["name"], i, f"n{number}")}}
            for number, call in enumerate(calls)
        ]
    return marked


def _wrap(text: str, i: int, letter: str) -> str:
    core = text.strip()
    if not core:
        return text
    start = text.index(core)
    return f"{text[:start]}\ufdd0{i}{letter}\ufdd1{core}\ufdd0{i}{letter.upper()}\ufdd1{text[start + len(core) :]}"
