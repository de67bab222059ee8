"""Noise on single tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deft_lightning.data.noise.base import TokenNoise, exact_count
from deft_lightning.data.noise.vocabulary import Ids, Vocabulary
from deft_lightning.errors import UserError
from deft_lightning.hashing import stream

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TokenReplace(TokenNoise):
    """Replace supervised tokens by other ones, each with probability ``rate``; never by the clean one.

    Args:
        rate: Share of supervised tokens, in ``[0, 1]``.
        source: Draw the wrong token uniformly from the vocabulary without special tokens (``uniform``), from the
            unigram distribution of the clean training labels (``unigram``), or among those that look like the clean
            one (``confusable``): a word, number or punctuation mark, with or without a blank before it as the clean
            one is, and next to it in length and frequency (see :class:`Vocabulary`). A special token looks like none
            and is replaced as by ``uniform``.
        target: ``labels`` corrupts what is learnt and leaves the context clean; ``text`` corrupts the input too.
        exact: Replace exactly ``floor(rate * n)`` of the ``n`` supervised tokens of each example.
        rates: Rate of each epoch instead of ``rate``, the last one for all that follow. What a lower one replaces, a
            higher one replaces by the same.
    """

    rate: float = 0.1
    source: Literal["uniform", "unigram", "confusable"] = "uniform"
    target: Literal["labels", "text"] = "labels"
    exact: bool = False
    rates: list[float] | None = None

    def __post_init__(self) -> None:
        """Refuse rates and words that mean nothing."""
        super().__post_init__()
        sources = self.source in ("uniform", "unigram", "confusable")
        self._refuse_unless(sources, f"source must be uniform, unigram or confusable, not {self.source!r}")
        self._refuse_unless(self.target in ("labels", "text"), f"target must be labels or text, not {self.target!r}")
        if self.rates is not None:
            shares = len(self.rates) > 0 and all(0.0 <= rate <= 1.0 for rate in self.rates)
            self._refuse_unless(shares, f"rates {self.rates} must be one or more shares in [0, 1]")

    def at_epoch(self, epoch: int) -> TokenReplace:
        """Return the operation with the rate of an epoch, from 0; itself without ``rates``."""
        if self.rates is None:
            return self
        return replace(self, rate=self.rates[min(epoch, len(self.rates) - 1)], rates=None)

    def corrupt_tokens(self, salt: str, example_id: str, labels: Ids, vocabulary: Vocabulary, skipped: int = 0) -> Ids:
        """Return the labels with the selected ones replaced."""
        # Two streams of one number a token: which tokens are hit and what they become do not depend on the rate.
        where = stream(salt, example_id, "where").random(skipped + len(labels))[skipped:]
        draws = stream(salt, example_id, "what").random(skipped + len(labels))[skipped:]
        hit = where < self.rate
        if self.exact:
            hit = np.zeros(len(labels), dtype=bool)
            hit[np.argsort(where, kind="stable")[: exact_count(self.rate, len(labels))]] = True
        weights = np.ones(len(vocabulary.ids))
        if self.source == "unigram":
            weights = vocabulary.counts.astype(np.float64)
        if np.count_nonzero(weights) < 2:
            raise UserError("TokenReplace: the vocabulary has fewer than two tokens to draw from (--data.noise.ops)")
        order = np.argsort(vocabulary.ids)
        at = order[np.searchsorted(vocabulary.ids, labels, sorter=order).clip(max=len(order) - 1)]
        present = vocabulary.ids[at] == labels
        picked = _by_weight(vocabulary, weights, at, present, draws)
        if self.source == "confusable":
            picked = np.where(present, _look_alike(vocabulary, at, draws), picked)
        return np.where(hit & (picked != labels), picked, labels)


def _by_weight(vocabulary: Vocabulary, weights: Floats, at: Ids, present: NDArray[np.bool_], draws: Floats) -> Ids:
    """Draw from the distribution with the clean token's mass cut out, by jumping over its interval."""
    upper = np.cumsum(weights)
    own = np.where(present, weights[at], 0.0)
    lower = np.where(present, upper[at] - weights[at], np.inf)
    point = draws * (upper[-1] - own)
    point = np.where(point >= lower, point + own, point)
    return vocabulary.ids[np.searchsorted(upper, point, side="right").clip(max=len(upper) - 1)]


def _look_alike(vocabulary: Vocabulary, at: Ids, draws: Floats) -> Ids:
    """Draw evenly among the look-alikes of each token, itself left out."""
    if len(vocabulary.tokens) != len(vocabulary.ids):
        raise UserError("TokenReplace: source confusable needs the spelling of each token (--data.noise.ops)")
    like = vocabulary.look_alikes
    first, last = like.first[at], like.last[at]
    rank = first + (draws * (last - first - 1)).astype(np.int64)
    return vocabulary.ids[like.ranked[rank + (rank >= like.own[at])]]
