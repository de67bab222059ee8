"""Noise on whole responses."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from deft_lightning.data.noise.base import ResponseNoise
from deft_lightning.data.noise.edits import Edit
from deft_lightning.hashing import key

BUCKET = 16  # Examples of similar length that trade responses among themselves: small keeps lengths alike.


@dataclass(frozen=True)
class ResponseSwap(ResponseNoise):
    """Give the selected examples each other's responses: fluent, well-formed and wrong.

    The selected examples are rotated by one place in the order of their hashes, so nobody keeps its own. Those whose
    neighbour happens to say the same trade among themselves across all lengths ("yes" with "no"); where even that
    leaves the label right, the example stays clean and is not flagged.

    Args:
        rate: Share of examples, in ``[0, 1]``.
        bucket_by_length: Rotate among responses of similar length, so that length does not give the noise away.
        exact: Select exactly ``floor(rate * n)`` of the ``n`` examples; those that cannot trade stay clean.
    """

    whole: ClassVar[bool] = True

    rate: float = 0.1
    bucket_by_length: bool = True
    exact: bool = False

    def edits(
        self, salt: str, ids: Sequence[str], responses: Sequence[str], prompts: Sequence[str]
    ) -> dict[int, list[Edit]]:
        """Return the swapped responses by position."""
        selected = self.select(salt, ids, range(len(ids)))
        selected.sort(key=lambda i: key(salt, ids[i], "order"))
        groups = [selected]
        if self.bucket_by_length:
            # A stable sort keeps the hash order among equals; each slice is a rotation of its own.
            by_length = sorted(selected, key=lambda i: len(responses[i]))
            starts = range(0, max(len(by_length) - BUCKET // 2, 1), BUCKET)
            edges = [*starts, len(by_length)]
            groups = [by_length[a:b] for a, b in itertools.pairwise(edges)]
            for group in groups:
                group.sort(key=lambda i: key(salt, ids[i], "order"))
        givers = {taker: giver for group in groups for taker, giver in zip(group, group[1:] + group[:1], strict=True)}
        same = [taker for taker, giver in givers.items() if responses[giver] == responses[taker]]
        # In order of text, a shift by the largest class gives no one its own text unless that class is the majority.
        same.sort(key=lambda i: (key(salt, responses[i], "text"), key(salt, ids[i], "order")))
        shift = max(Counter(responses[i] for i in same).values(), default=0)
        givers.update({taker: same[(at + shift) % len(same)] for at, taker in enumerate(same)})
        new = {taker: responses[giver] for taker, giver in givers.items() if responses[giver] != responses[taker]}
        return {i: [Edit(0, len(responses[i]), text)] for i, text in new.items()}
