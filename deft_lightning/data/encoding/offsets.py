"""Tokens of many texts in one call of the tokenizer, and where each token is, without a list of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerFast

from deft_lightning.data.encoding.pieces import PIECE, Joined, in_pieces

LETTERS = 1 << 20


class Offsets(Sequence[tuple[int, int]]):
    """First letter of each token, and the one behind its last, asked of the tokenizer's encoding one at a time.

    A row has some hundred tokens and needs a handful of their places; a row of a megabyte would have a list of them
    that takes more memory than all else.

    Args:
        encoding: An ``Encoding`` of the tokenizers library.
    """

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self._encoding)

    def __getitem__(self, at: Any) -> Any:
        """Return the place of one token."""
        if isinstance(at, slice):
            return list(self)[at]
        return self._encoding.token_to_chars(range(len(self._encoding))[at])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield the place of every token."""
        return iter(self._encoding.offsets)

    def before(self, letter: int) -> int:
        """Return how many tokens begin before a letter."""
        encoding, count = self._encoding, len(self._encoding)
        token = encoding.char_to_token(letter)
        if token is None:  # behind the last letter, or a blank that no token has
            token = count if count and encoding.token_to_chars(count - 1)[0] < letter else None
        elif encoding.token_to_chars(token)[0] != letter or (
            token and encoding.token_to_chars(token - 1)[0] >= letter
        ):  # inside a token, or one of several that share a letter
            token = None
        return bisect_left(self, (letter,)) if token is None else int(token)


def before(offsets: Sequence[tuple[int, int]], letter: int) -> int:
    """Return how many tokens begin before a letter.

    Args:
        offsets: Letters of each token, in order.
        letter: Its place in the text.
    """
    return offsets.before(letter) if isinstance(offsets, Offsets | Joined) else bisect_left(offsets, (letter,))


class Spelt(NamedTuple):
    """Tokens of a text, and where each is.

    Attributes:
        ids: Tokens.
        offsets: First letter of each, and the one behind its last.
    """

    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]


def encodings(tokenizer: Any, texts: Sequence[str]) -> Iterator[Spelt]:
    """Yield the tokens of each text, without special tokens around it; memory holds those of a million letters.

    Args:
        tokenizer: A fast one.
        texts: To encode.
    """
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    own, plain = type(tokenizer), PreTrainedTokenizerFast
    ready = own._encode_plus is plain._encode_plus and own.__call__ is plain.__call__
    for group in _groups(texts):
        if not ready:
            yield from (Spelt(one.ids, Offsets(one)) for one in tokenizer(group, **options).encodings)
            continue
        # The call settles how the tokenizer behind this one cuts, pads and reads special tokens.
        tokenizer("", **options)
        long = in_pieces(tokenizer, group[0]) if len(group) == 1 else None
        if long is not None:
            yield Spelt(cast(Sequence[int], long.ids), long.places)
            continue
        for one in tokenizer.backend_tokenizer.encode_batch(group, add_special_tokens=False):
            yield Spelt(one.ids, Offsets(one))


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield texts in groups of at most a million letters; one that is too long for one piece is alone."""
    group: list[str] = []
    letters = 0
    for text in texts:
        if group and (len(text) > PIECE or letters + len(text) > LETTERS):
            yield group
            group, letters = [], 0
        group.append(text)
        letters += len(text)
        if len(text) > PIECE:
            yield group
            group, letters = [], 0
    if group:
        yield group
