"""Noise on single tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from deft_lightning.data.noise.base import Ids, TokenNoise, Vocabulary
from deft_lightning.errors import UserError
from deft_lightning.hashing import stream


@dataclass(frozen=True)
class TokenReplace(TokenNoise):
    """Replace supervised tokens by other ones, each with probability ``rate``; never by the clean one.

    Args:
        rate: Share of supervised tokens, in ``[0, 1]``.
        source: Draw the wrong token uniformly from the vocabulary without special tokens, or from the unigram
            distribution of the clean training labels.
        target: ``labels`` corrupts what is learnt and leaves the context clean; ``text`` corrupts the input too.
    """

    rate: float = 0.1
    source: Literal["uniform", "unigram"] = "uniform"
    target: Literal["labels", "text"] = "labels"

    def __post_init__(self) -> None:
        """Refuse rates and words that mean nothing."""
        super().__post_init__()
        if self.source not in ("uniform", "unigram") or self.target not in ("labels", "text"):
            raise UserError("TokenReplace: source is uniform or unigram, target is labels or text (--data.noise.ops)")

    def corrupt_tokens(self, salt: str, example_id: str, labels: Ids, vocabulary: Vocabulary) -> Ids:
        """Return the labels with the selected ones replaced."""
        # Two streams of one number a token: which tokens are hit and what they become do not depend on the rate.
        chosen = stream(salt, example_id, "where").random(len(labels)) < self.rate
        draws = stream(salt, example_id, "what").random(len(labels))
        if self.source == "unigram":
            weights = vocabulary.counts.astype(np.float64)
        else:
            weights = np.ones(len(vocabulary.ids))
        if np.count_nonzero(weights) < 2:
            raise UserError("TokenReplace: the vocabulary has fewer than two tokens to draw from (--data.noise.ops)")
        upper = np.cumsum(weights)
        # Draw from the distribution with the clean token's mass cut out, by jumping over its interval.
        order = np.argsort(vocabulary.ids)
        at = order[np.searchsorted(vocabulary.ids, labels, sorter=order).clip(max=len(order) - 1)]
        present = vocabulary.ids[at] == labels
        own = np.where(present, weights[at], 0.0)
        lower = np.where(present, upper[at] - weights[at], np.inf)
        point = draws * (upper[-1] - own)
        point = np.where(point >= lower, point + own, point)
        picked = vocabulary.ids[np.searchsorted(upper, point, side="right").clip(max=len(upper) - 1)]
        return np.where(chosen & (picked != labels), picked, labels)
