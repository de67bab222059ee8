"""Other families through the same seam: re-weighted and truncated log-likelihoods."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.objectives.base import DeformedLog, Objective
from deft_lightning.objectives.deformed import NLL


@dataclass(frozen=True, repr=False)
class DFT(Objective):
    """DFT, ``-sg(p) log p``: gate ``p``, the same gradient as Likelihood; only the printed value differs.

    Source: arXiv 2508.05629; TRL's ``loss_type="dft"``.
    """

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return ``-sg(p) log p`` per token."""
        return -stats.log_prob.detach().exp() * stats.log_prob


@dataclass(frozen=True, repr=False)
class EAFT(Objective):
    """EAFT, ``-sg(H_k / n) log p``: gate ``H_k / n``, with ``H_k`` the entropy of the k largest probabilities.

    Tokens the model is sure of are left alone, whether it is right or wrong. Source: arXiv 2601.02151.

    Args:
        k: How many of the largest probabilities, renormalised; at least 2. More than the vocabulary means all.
        normalizer: The divisor n: ``log_k`` is ``ln k`` (the paper), ``three`` is 3.0 (LLaMA-Factory), ``none`` is 1
            (Axolotl). Learning rates do not carry over between them.
    """

    k: int = 20
    normalizer: Literal["log_k", "three", "none"] = "log_k"

    def __post_init__(self) -> None:
        """Refuse a k without an entropy and a normaliser nobody uses."""
        if self.k < 2:
            raise UserError(f"EAFT: k must be at least 2, got {self.k}")
        if self.normalizer not in ("log_k", "three", "none"):
            raise UserError(f"EAFT: normalizer must be log_k, three or none, not {self.normalizer!r}")

    @property
    def topk(self) -> int:
        """Return how many probabilities the statistics must cover."""
        return self.k

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return the entropy-weighted negative log-likelihood per token."""
        if stats.topk_entropy is None:
            raise UserError(f"EAFT needs TokenStats.topk_entropy: call token_stats(..., topk={self.k})")
        divisor = {"log_k": math.log(self.k), "three": 3.0, "none": 1.0}[self.normalizer]
        return -(stats.topk_entropy.detach() / divisor) * stats.log_prob


@dataclass(frozen=True, repr=False)
class Focal(Objective):
    """Focal loss, ``-(1 - p)^gamma log p``, nothing detached (arXiv 1708.02002).

    Gate ``(1-p)^gamma - gamma p (1-p)^(gamma-1) log p``: the opposite of DEFT, it spends itself on what the model
    finds improbable.

    Args:
        gamma: At least 0; 0 is NLL.
    """

    gamma: float = 2.0

    def __post_init__(self) -> None:
        """Refuse exponents that reward certainty without bound."""
        if not 0.0 <= self.gamma < math.inf:
            raise UserError(f"Focal: gamma must not be negative, got {self.gamma}")

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return the focal loss per token."""
        if not self.gamma:
            return -stats.log_prob
        # At p = 1 the derivative of (1-p)^gamma can be infinite while the gate's limit is 0: take the limit there, and
        # where 1 - p is subnormal, whose powers overflow.
        certain = stats.log_prob.detach() > -torch.finfo(stats.log_prob.dtype).tiny
        log_prob = torch.where(certain, -torch.ones_like(stats.log_prob), stats.log_prob)
        return torch.where(certain, 0 * stats.log_prob, -((-torch.expm1(log_prob)) ** self.gamma) * log_prob)


@dataclass(frozen=True, repr=False)
class Truncated(Objective):
    """Truncated objective, ``base * 1[p >= t]`` or ``base * 1[p <= t]``: gate of the base times the indicator.

    The official DEFT code's OnlyTopP, OnlyTopLogP (``keep="above"``) and OnlyBottomP, OnlyBottomLogP (``"below"``)
    with base Likelihood or NLL.

    Args:
        threshold: t in ``[0, 1]``.
        keep: Which side of the threshold trains.
        base: The objective that is truncated.
        normalize_by: ``all`` leaves each kept token its weight; ``kept`` multiplies by (all / kept) of the tokens it is
            called with, so that a mean over all tokens is the mean over the kept ones, as in the official code; where
            tokens have weights, by that of their sums.
    """

    threshold: float = 0.5
    keep: Literal["above", "below"] = "above"
    base: Objective = field(default_factory=NLL)
    normalize_by: Literal["all", "kept"] = "all"

    def __post_init__(self) -> None:
        """Refuse thresholds and words that mean nothing."""
        if not 0.0 <= self.threshold <= 1.0:
            raise UserError(f"Truncated: threshold {self.threshold} is outside [0, 1]")
        if self.keep not in ("above", "below"):
            raise UserError(f"Truncated: keep must be above or below, not {self.keep!r}")
        if self.normalize_by not in ("all", "kept"):
            raise UserError(f"Truncated: normalize_by must be all or kept, not {self.normalize_by!r}")

    @property
    def topk(self) -> int:
        """Return what the base needs."""
        return int(self.base.topk)

    @property
    def needs_batch(self) -> bool:
        """Return whether the number of kept tokens, or the base, looks at the batch."""
        return self.normalize_by == "kept" or bool(self.base.needs_batch)

    @property
    def deformed(self) -> DeformedLog | None:
        """Return what the base is."""
        return self.base.deformed

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return the base loss where the token is kept, 0 elsewhere."""
        p = stats.log_prob.detach().exp()
        kept = p >= self.threshold if self.keep == "above" else p <= self.threshold
        loss = torch.where(kept, self.base(stats), torch.zeros_like(p))
        if self.normalize_by == "kept":
            if stats.weight is None:
                return loss * (kept.numel() / kept.sum().clamp_min(1).to(p.dtype))
            share = stats.mean(kept.to(p.dtype))
            loss = loss / torch.where(share > 0, share, 1)
        return loss
