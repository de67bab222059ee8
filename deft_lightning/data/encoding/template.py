"""Chat templates and exact supervision masks: conversation in, tokens with the assistant's turns marked out."""

from __future__ import annotations

import functools
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deft_lightning.data.encoding.bounds import LETTERS, TEMPLATE, TemplateCost, bounded, check_length
from deft_lightning.data.examples import Example, Ints, Message, Tool
from deft_lightning.data.noise.edits import Mark
from deft_lightning.data.sources.rows import RowError
from deft_lightning.errors import UserError

NOT_SUPERVISED = -1


def chatml(tokenizer: Any) -> str:
    """Return the default template for tokenizers without one.

    ChatML. Where ``<|im_end|>`` is not a token of its own, turns end with the end-of-sequence token instead: a base
    model knows it, generation stops at it, and the embedding keeps its size. Tools are listed in the system turn, one
    JSON object a line; a call is the JSON of its name and arguments.
    """
    end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
    bos = tokenizer.bos_token if _prepends_bos(tokenizer) else ""
    return (
        f"{{{{ {bos!r} }}}}{{% if tools %}}{{{{ '<|im_start|>system\\n' }}}}"
        "{% if messages and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}"
        "{{ '<tools>\\n' }}{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}"
        f"{{{{ '</tools>' + {end!r} + '\\n' }}}}{{% endif %}}"
        "{% for message in messages %}{% if not (tools and loop.first and message['role'] == 'system') %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
        "{% for call in message['tool_calls'] or [] %}"
        "{{ '\\n' if message['content'] or not loop.first }}"
        "{{ '<tool_call>\\n' + (call['function'] | tojson) + '\\n</tool_call>' }}{% endfor %}"
        f"{{{{ {end!r} + '\\n' }}}}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def _prepends_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def set_template(tokenizer: Any, choice: str | None) -> None:
    """Settle the tokenizer's chat template.

    Args:
        tokenizer: Changed in place.
        choice: None keeps the tokenizer's own (ChatML if it has none); ``chatml``; a file with a Jinja template; or
            the template itself.
    """
    if choice is None:
        tokenizer.chat_template = tokenizer.chat_template or chatml(tokenizer)
    elif choice == "chatml":
        tokenizer.chat_template = chatml(tokenizer)
    else:
        tokenizer.chat_template = template_text(choice)
        tokenizer.template_origin = f"that of --data.chat_template{'' if '{' in choice else f' {choice}'}"
    templates = tokenizer.chat_template
    for text in templates.values() if isinstance(templates, dict) else [templates]:
        if len(text) > TEMPLATE:
            raise UserError(f"the chat template has {len(text):,} letters; it is {origin(tokenizer)}")


def origin(tokenizer: Any) -> str:
    """Return where a tokenizer's chat template comes from, for messages."""
    found = getattr(tokenizer, "template_origin", None)
    if found is not None:
        return str(found)
    name = str(tokenizer.name_or_path)
    return f"the tokenizer's own{f' of {name}' if name else ''}; another is chosen with --data.chat_template"


def template_text(choice: str) -> str:
    """Return a chosen template as text: what a file holds, or the choice itself."""
    if choice == "chatml" or "{" in choice:
        return choice
    try:
        return Path(choice).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--data.chat_template {choice!r} is neither chatml, a file, nor a template ({error})"
        ) from None


class Encoded(NamedTuple):
    """Tokens of one example.

    Attributes:
        input_ids: Shape ``(T,)``.
        turn: Shape ``(T,)``: number of the message a supervised token belongs to, -1 elsewhere.
    """

    input_ids: Ints
    turn: Ints


Span = tuple[int, int, int]  # start, end, number of the message
TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@functools.lru_cache(maxsize=8)
def markers(tokenizer: Any) -> Ints:
    """Return the tokens that stand outside the text: special ones, and others that were added to the vocabulary."""
    return np.array(sorted({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}), dtype=np.int64)


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the token that the template writes after what the assistant says; None if it is an ordinary one."""
    conversation = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "zqz"}]
    try:
        with bounded(origin(tokenizer)):
            text = render(tokenizer, conversation, prompt=False)
    except TemplateCost:
        raise
    except Exception:  # a template may insist on more, such as a system message
        return None
    after = tokenizer(text.rpartition("zqz")[2], add_special_tokens=False).input_ids[:1]
    return after[0] if after and after[0] in markers(tokenizer) else None


def render(tokenizer: Any, messages: Sequence[Message], *, prompt: bool, tools: Sequence[Tool] | None = None) -> str:
    """Return the conversation as text, with the assistant's header at the end for a prompt."""
    # As a batch of one: transformers cannot tell an empty conversation from an empty batch.
    (text,) = tokenizer.apply_chat_template(
        [list(messages)], tokenize=False, add_generation_prompt=prompt, tools=list(tools) if tools else None
    )
    assert isinstance(text, str)
    _check_length(text, messages, tools)
    return text


def _check_length(text: str, messages: Sequence[Message], tools: Sequence[Tool] | None) -> None:
    if len(text) > LETTERS:
        check_length(text, len(json.dumps([list(messages), list(tools or ())], default=str)))


def _template(tokenizer: Any, tools: Sequence[Tool] | None) -> str:
    """The template as text: a tokenizer may have one for conversations with tools beside the other."""
    return str(tokenizer.get_chat_template(tools=list(tools) if tools else None))


def encode(tokenizer: Any, example: Example) -> Encoded:
    """Tokenise an example that has messages or text.

    A template with ``{% generation %}`` marks its own spans. Any other is rendered turn by turn: what the assistant's
    turn adds to the prompt that generation would have seen is supervised, up to and including the turn's last special
    token, so that a separator after the end of the turn is not.

    Raises:
        UserError: The template rewrites earlier turns, or leaves out a message, a call of a tool, or the tools.
    """
    (encoded,) = encode_many(tokenizer, [example])
    if isinstance(encoded, UserError):
        raise encoded
    return encoded


def encode_many(tokenizer: Any, examples: Sequence[Example]) -> list[Encoded | UserError]:
    """Tokenise examples as :func:`encode` does, in one call of the tokenizer; a refused one gives its error."""
    found: list[Encoded | UserError | tuple[str, list[Span], bool]] = []
    tags: dict[bool, bool] = {}  # whether the template has tags, with tools and without
    plain = {at: _text(tokenizer, example.text) for at, example in enumerate(examples) if example.text is not None}
    with bounded(origin(tokenizer)) as clock:
        for at, example in enumerate(examples):
            if at in plain:
                found.append(plain[at])
                continue
            clock.next(example.where)
            try:
                spans = _spans(tokenizer, list(example.messages or ()), example.where, example.tools)
                tools = bool(example.tools)
                if tools not in tags:
                    tags[tools] = TAG.search(_template(tokenizer, example.tools)) is not None
                found.append((*spans, tags[tools]))
            except UserError as error:
                found.append(error)
    texts = [item[0] for item in found if not isinstance(item, Encoded | UserError)]
    encodings = iter(_encodings(tokenizer, texts))
    ends = frozenset(markers(tokenizer).tolist())
    return [
        item if isinstance(item, Encoded | UserError) else _turns(tokenizer, *item, next(encodings), ends)
        for item in found
    ]


def _text(tokenizer: Any, text: str) -> Encoded:
    ids = tokenizer(text).input_ids
    ids = ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
    return Encoded(np.array(ids, dtype=np.int64), np.zeros(len(ids), dtype=np.int64))


def _encodings(tokenizer: Any, texts: list[str]) -> list[Any]:
    """Tokens and offsets of texts, without the lists of masks that nobody reads."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return list(tokenizer(texts, **options).encodings)


def _turns(
    tokenizer: Any, text: str, spans: list[Span], tagged: bool, encoding: Any, ends: frozenset[int]
) -> Encoded:  # fmt: skip
    """Map character spans to tokens: the first token that starts in a span, up to the first that starts behind it."""
    ids, offsets = encoding.ids, encoding.offsets
    bounds = [(bisect_left(offsets, (start,)), bisect_left(offsets, (end,)), i) for start, end, i in spans]
    # Generation would begin at the start of a span: a token that reaches across it is taken apart.
    if any(first and offsets[first - 1][1] > start for (first, _, _), (start, _, _) in zip(bounds, spans, strict=True)):
        array, starts, stops = _tokens(tokenizer, text, [start for start, _, _ in spans])
        ids, offsets = array.tolist(), list(zip(starts.tolist(), stops.tolist(), strict=True))
        bounds = [(bisect_left(offsets, (start,)), bisect_left(offsets, (end,)), i) for start, end, i in spans]
    turn = np.full(len(ids), NOT_SUPERVISED, dtype=np.int64)
    for (first, last, i), (_, end, _) in zip(bounds, spans, strict=True):
        if not tagged:
            # Only blanks may follow the end of the turn: a template may put special tokens inside the turn as well.
            closing = next((at for at in range(last - 1, first - 1, -1) if ids[at] in ends), None)
            if closing is not None and not text[offsets[closing][1] : end].strip():
                last = closing + 1
        turn[first:last] = i
    return Encoded(np.array(ids, dtype=np.int64), turn)


class _Laid(NamedTuple):
    """A conversation as text, and where in it the tokens and the supervised turns are."""

    encoded: Encoded
    text: str
    spans: list[Span]
    starts: Ints
    ends: Ints


def _lay_out(tokenizer: Any, example: Example) -> _Laid:
    messages = list(example.messages or ())
    with bounded(origin(tokenizer), example.where):
        text, spans = _spans(tokenizer, messages, example.where, example.tools)
    ids, starts, ends = _tokens(tokenizer, text, [start for start, _, _ in spans])
    marks = np.isin(ids, markers(tokenizer))
    tagged = TAG.search(_template(tokenizer, example.tools)) is not None
    turn = np.full(len(ids), NOT_SUPERVISED, dtype=np.int64)
    for start, end, i in spans:
        span = (starts >= start) & (starts < end)
        closing = np.flatnonzero(span & marks)
        # Only blanks may follow the end of the turn: a template may put special tokens inside the turn as well.
        if not tagged and closing.size and not text[ends[closing[-1]] : end].strip():
            span[closing[-1] + 1 :] = False
        turn[span] = i
    return _Laid(Encoded(ids, turn), text, spans, starts, ends)


def encode_marked(tokenizer: Any, example: Example, marks: Sequence[Mark]) -> tuple[Encoded, Ints]:
    """Tokenise a conversation whose last turn holds noise; return the tokens and the code of each, 0 where clean.

    A token is noisy when it holds a letter of a mark, or a cut is inside it. A cut between two tokens, and a mark that
    no token holds, flags the next supervised token: at the end of the response, the end of the turn. Of several
    operations the last counts. Where all of the response and its end are marked, so is every supervised token of the
    turn; and so it is, with the last code, where the template writes the response in a way that cannot be found.

    Args:
        tokenizer: With its chat template.
        example: A conversation that ends with a response.
        marks: Noise in that response; at least one.
    """
    laid = _lay_out(tokenizer, example)
    content, last = example.response or "", len(example.messages or ()) - 1
    turn = np.flatnonzero(laid.encoded.turn == last)
    codes = np.zeros(len(laid.encoded.input_ids), dtype=np.int64)
    end_code = next((mark.code for mark in marks if mark.start == len(content)), 0)
    if end_code and sum(mark.end - mark.start for mark in marks) == len(content):
        codes[turn] = end_code
    places = _places(laid, content, last)
    if places is None:
        codes[turn] = max(mark.code for mark in marks)
    elif turn.size:
        starts, ends = laid.starts[turn], laid.ends[turn]
        for mark in sorted(marks, key=lambda mark: mark.code):
            start, end = places[mark.start], places[mark.end]
            if mark.start < mark.end and start == end:
                continue  # blanks that the template strips
            hit = (starts < end) & (ends > start)
            if not hit.any():
                hit[min(int(np.searchsorted(ends, start, side="right")), len(ends) - 1)] = True
            codes[turn[hit]] = mark.code
    return laid.encoded, codes


def _places(laid: _Laid, content: str, turn: int) -> Ints | None:
    """Return where each letter of a message, and its end, stands in the text; None where that cannot be told."""
    spans = [(start, end) for start, end, i in laid.spans if i == turn]
    if not spans:
        return None
    first, said = spans[0][0], laid.text[spans[0][0] : spans[-1][1]]
    whole, stripped = np.arange(len(content) + 1), content.strip()
    inside = (whole - (len(content) - len(content.lstrip()))).clip(0, len(stripped))
    ways = [(content, whole), (stripped, inside)]
    for ascii_only in (False, True):  # as the tojson of chat templates writes it, and as that of Jinja does
        escaped = [json.dumps(letter, ensure_ascii=ascii_only)[1:-1] for letter in stripped]
        ways.append(("".join(escaped), np.cumsum([0, *map(len, escaped)])[inside]))
    for written, at in ways:
        found = said.find(written)
        # Twice is once too often, unless the first one opens the turn.
        if found >= 0 and (not said[:found].strip() or said.find(written, found + 1) < 0):
            return first + found + at
    return None


def encode_prompt(tokenizer: Any, example: Example) -> tuple[str, list[int]]:
    """Return what generation starts from: the prefix of the tokens that :func:`encode` would give."""
    messages = list(example.prompt)
    cuts = []
    with bounded(origin(tokenizer), example.where):
        try:
            text = render(tokenizer, messages, prompt=True, tools=example.tools)
        except MemoryError:
            raise
        except Exception as error:
            raise _refusal(example.where, f"refuses it: {error}") from None
        _check_tools(text, example.tools, example.where)
        if any(message["role"] == "assistant" for message in messages):
            cuts = [start for start, _, _ in _spans(tokenizer, messages, example.where, example.tools)[1]]
    return text, _tokens(tokenizer, text, cuts)[0].tolist()


def _tokens(tokenizer: Any, text: str, cuts: Sequence[int]) -> tuple[Ints, Ints, Ints]:
    """Return tokens with their first and last letter; none reaches across a cut, where generation would begin."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.array(encoded.input_ids, dtype=np.int64)
    starts, ends = np.array(encoded.offset_mapping, dtype=np.int64).reshape(-1, 2).T
    for cut in cuts:
        if ((starts < cut) & (cut < ends)).any():
            head = _tokens(tokenizer, text[:cut], [c for c in cuts if c < cut])
            tail = _tokens(tokenizer, text[cut:], [c - cut for c in cuts if c > cut])
            ids, starts, ends = (np.concatenate([a, b]) for a, b in zip(head, tail, strict=True))
            starts[len(head[0]) :] += cut
            ends[len(head[0]) :] += cut
            break
    return ids, starts, ends


def _refusal(where: str, problem: str, advice: str = "") -> RowError:
    return RowError(where, f"the chat template {problem}{advice} (--data.chat_template)", kind="chat template")


def _spans(
    tokenizer: Any, messages: list[Message], where: str, tools: Sequence[Tool] | None = None
) -> tuple[str, list[Span]]:
    try:
        tagged = TAG.search(_template(tokenizer, tools)) is not None
        text, spans = (_tagged_spans if tagged else _prefix_spans)(tokenizer, messages, where, tools)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Jinja raises many kinds, raise_exception() of the template among them
        raise _refusal(where, f"refuses it: {error}") from None
    _check_tools(text, tools, where)
    at = 0
    for i, message in enumerate(messages):
        content = message["content"].strip()
        found = text.find(content, at)
        if found < 0:
            found = max(text.find(written, at) for written in _as_json(content))
        if found < 0:
            if tagged and message["role"] == "assistant" and any(number == i for _, _, number in spans):
                continue  # written in parts
            raise _refusal(where, f"leaves out or changes message {i + 1}")
        if "tool_calls" in message:
            _check_calls(text[at:], message, where, i)
        at = found + len(content)
    return text, spans


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
            raise _refusal(where, f"leaves out the tool {name!r}", advice)


def _check_calls(text: str, message: Message, where: str, i: int) -> None:
    for call in message.get("tool_calls", ()):
        function = call["function"]
        for value in (function["name"], *_leaves(function["arguments"])):
            spelt = _as_json(value) if isinstance(value, str) else (json.dumps(value, default=str),)
            if not any(way in text for way in (str(value), *spelt)):
                advice = "; choose one that writes them, such as chatml"
                raise _refusal(where, f"leaves out or changes the tool calls of message {i + 1}", advice)


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
        conversations=[messages], tools=list(tools) if tools else None, chat_template=_template(tokenizer, tools),
        return_assistant_tokens_mask=True, add_generation_prompt=False, **tokenizer.special_tokens_map,
    )  # fmt: skip
    _check_length(rendered[0], messages, tools)
    text, turns = rendered[0], [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans: list[Span] = []
    runs = [(start, end) for start, end in generated[0] if end > start]
    if len(runs) == len(turns):
        return text, [(start, end, i) for (start, end), i in zip(runs, turns, strict=True)]
    for start, end in runs:
        said = text[start:end]
        for token in tokenizer.get_added_vocab():
            said = said.replace(token, "")
        said = said.strip()
        if not said:
            continue
        # Some turns have no tags, or several pairs: a run belongs to the next turn that says it.
        while turns and not _says(messages[turns[0]], said):
            turns.pop(0)
        if not turns:
            raise _refusal(where, "has tags that are around no assistant turn")
        spans.append((start, end, turns[0]))
    return text, spans


def _says(message: Message, said: str) -> bool:
    calls, content = message.get("tool_calls"), message["content"].strip()
    if calls and all(call["function"]["name"] in said for call in calls):
        return True
    return bool(content or not calls) and (said in message["content"] or content in said)


def _prefix_spans(
    tokenizer: Any, messages: list[Message], where: str, tools: Sequence[Tool] | None
) -> tuple[str, list[Span]]:
    whole = render(tokenizer, messages, prompt=False, tools=tools)
    spans: list[Span] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:i], prompt=True, tools=tools)
        last = i == len(messages) - 1
        after = whole if last else render(tokenizer, messages[: i + 1], prompt=False, tools=tools)
        if not (after.startswith(before) and whole.startswith(after)):
            raise _refusal(
                where,
                f"writes message {i + 1} differently once more turns follow, so its span is"
                " unknown; use a template with generation tags, or chatml",
            )
        turn = after[len(before) :]
        if message["content"].strip() not in turn:
            raise _refusal(where, f"leaves out or changes message {i + 1}")
        _check_calls(turn, message, where, i)
        spans.append((len(before), len(after), i))
    return whole, spans
