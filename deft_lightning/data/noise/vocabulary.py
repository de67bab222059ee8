"""What token noise draws from, and which tokens look like which."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

NEAR = 8  # Neighbours on each side that pass for a token: enough to choose from, few enough to stay alike.
BLANKS = " ▁Ġ\t\n\rĉĊč"  # As they are, as SentencePiece and as byte-level vocabularies write them.
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class LookAlikes(NamedTuple):
    """Of the token at place ``j`` of a vocabulary, ``ranked[first[j]:last[j]]`` are the look-alikes and itself.

    Attributes:
        ranked: Places in the vocabulary, the like beside each other, shape ``(V,)``.
        own: Rank of each token, shape ``(V,)``.
        first: First rank that passes for it, shape ``(V,)``.
        last: Rank behind the last that does, shape ``(V,)``.
    """

    ranked: Ids
    own: Ids
    first: Ids
    last: Ids


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a token operation may draw from.

    Attributes:
        ids: Token ids that are not special, shape ``(V,)``.
        counts: How often each occurs among the clean supervised tokens of the training split, shape ``(V,)``.
        tokens: How the tokenizer writes each of them, with its mark for a blank before a word; empty if nobody needs
            it.
    """

    ids: Ids
    counts: Ids
    tokens: tuple[str, ...] = ()

    @cached_property
    def look_alikes(self) -> LookAlikes:
        """Return who passes for whom; computed once.

        Tokens are of one class when both or neither begin with a blank and both are words, numbers, punctuation, bare
        blanks or byte codes. A class is ordered by length, among equals by how often a token occurs; a token's
        look-alikes are its eight neighbours on either side. One that is alone in its class takes the neighbours of
        its place between the classes: the same kind without (or with) the blank first.
        """
        classes = [_class(token) for token in self.tokens]
        lengths = [len(token) for token in self.tokens]
        ranked = sorted(range(len(classes)), key=lambda j: (classes[j], lengths[j], -self.counts[j], self.ids[j]))
        size = len(ranked)
        own, first, last = (np.zeros(size, dtype=np.int64) for _ in range(3))
        start = 0
        for rank, j in enumerate(ranked):
            own[j] = rank
            if rank + 1 < size and classes[ranked[rank + 1]] == classes[j]:
                continue
            stop = rank + 1
            for r in range(start, stop):
                low, high = max(start, r - NEAR), min(stop, r + NEAR + 1)
                if stop - start == 1:
                    low, high = max(0, r - 1), min(size, r + 2)
                first[ranked[r]], last[ranked[r]] = low, high
            start = stop
        return LookAlikes(np.array(ranked, dtype=np.int64), own, first, last)


def _class(token: str) -> tuple[str, bool]:
    if BYTE.fullmatch(token):
        return "byte", False
    body = token.strip(BLANKS)
    if not body:
        return "blank", False
    spaced = token[0] in BLANKS
    if body.isdecimal():
        return "number", spaced
    return ("word" if any(map(str.isalpha, body)) else "punctuation"), spaced
