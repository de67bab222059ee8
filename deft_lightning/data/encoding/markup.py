"""Special tokens and markup spelt in messages, calls and tools: no text may forge a turn."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from deft_lightning.data.encoding.thoughts import KEYS
from deft_lightning.data.examples import Message, Tool

# Tags of what a model itself writes inside a turn; some tokenizers make special tokens of them.
OWN = re.compile(r"think|tool|reason|channel|thought", re.IGNORECASE)
# Markup of chat formats, and placeholders of pictures; where a tokenizer has a token of that name it is a token.
FOREIGN = re.compile(  # the bars of DeepSeek's tokens are fullwidth ones
    r"\[/?INST\]|<</?SYS>>|<\|\w{2,40}\|>|<(?:start|end)_of_turn>|<\uff5c[^\uff5c>]{1,30}\uff5c>|</?s>"
    r"|<image>|<video>|<audio>"
)


@functools.lru_cache(maxsize=8)
def known(tokenizer: Any) -> frozenset[str]:
    """Return the names of the tokens that a tokenizer splits off before anything else, special or not."""
    return frozenset(tokenizer.get_added_vocab())


@functools.lru_cache(maxsize=8)
def forging(tokenizer: Any) -> re.Pattern[str] | None:
    """Return what finds the special tokens of a tokenizer that are spelt in a text; None where it has none."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    names = {name for name in names if name.strip() and not OWN.search(name)}
    if not names:
        return None
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))


def texts_of(messages: Sequence[Message], tools: Sequence[Tool] | None, *, thoughts: bool = True) -> Iterator[str]:
    """Yield every text that a row gives to a chat template: of messages, of the calls in them, and of the tools.

    Args:
        messages: The conversation.
        tools: What the assistant may call.
        thoughts: Whether reasoning is given.
    """
    left: list[Any] = list(tools or ())
    for message in messages:
        left += [value for key, value in message.items() if key != "role" and (thoughts or key not in KEYS)]
    while left:  # a loop, since tools may be nested deeply
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            left += value


class Spelling(NamedTuple):
    """Tokens of a text, and where each is.

    Attributes:
        ids: Tokens.
        offsets: First letter of each, and the one behind its last.
        names: Special tokens that a text of the row spelt, in order.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    names: list[str]


def as_letters(
    tokenizer: Any,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    text: str,
    places: Sequence[tuple[int, int]],
) -> Spelling:
    """Replace special tokens that a text of the row spells by the tokens of their letters.

    Special tokens are split off before anything else is tokenised, so the tokens around them stay as they are.

    Args:
        tokenizer: The tokenizer.
        ids: Tokens of a rendered conversation.
        offsets: Letters of each of them.
        text: The conversation.
        places: Where in it texts of the row stand.
    """
    pattern = forging(tokenizer)
    spelt: dict[int, tuple[int, str]] = {}
    for place in places:
        if pattern is not None:
            spelt |= {match.start(): (match.end(), match[0]) for match in pattern.finditer(text, *place)}
    if not spelt:
        return Spelling(list(ids), list(offsets), [])
    new_ids: list[int] = []
    new_offsets: list[tuple[int, int]] = []
    names: list[str] = []
    special = {int(id) for id in tokenizer.convert_tokens_to_ids([name for _, name in spelt.values()])}
    for id, (start, end) in zip(ids, offsets, strict=True):
        # A token that takes blanks around it (lstrip, rstrip) begins before its name or ends behind it.
        name = next((name for at, (stop, name) in spelt.items() if start <= at and stop <= end), None)
        if id not in special or name is None:
            new_ids.append(id)
            new_offsets.append((start, end))
            continue
        letters = tokenizer(
            text[start:end], add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        new_ids += letters.input_ids
        new_offsets += [(start + first, start + last) for first, last in letters.offset_mapping]
        names.append(name)
    return Spelling(new_ids, new_offsets, names)


def without_doubles(tokenizer: Any, text: str) -> tuple[str, bool]:
    """Return a raw text without the beginning and end of sequence that the tokenizer adds anyway.

    Args:
        tokenizer: The tokenizer.
        text: As the row has it.

    Returns:
        The text, and whether it spelt one of them.
    """
    bos, eos, bare = tokenizer.bos_token, tokenizer.eos_token, text
    if eos and bare.rstrip().endswith(eos):
        bare = bare.rstrip()[: -len(eos)]
    if bos and bare.lstrip().startswith(bos) and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        bare = bare.lstrip()[len(bos) :]
    return (bare, True) if bare and bare != text else (text, False)
