"""The deformed-log family: NLL, Likelihood, Tsallis, Cayley and DEFT differ only in their focus index."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.objectives.base import DeformedLog


@dataclass(frozen=True, repr=False)
class NLL(DeformedLog):
    """NLL, ``-log p``: gate 1, focus 0. Standard supervised fine-tuning."""

    def focus(self, stats: TokenStats) -> Tensor:
        """Return 0 for every token."""
        return torch.zeros_like(stats.log_prob)


@dataclass(frozen=True, repr=False)
class Likelihood(DeformedLog):
    """Likelihood, ``1 - p``: gate ``p``, focus 1. "-p" in arXiv 2510.00526 and 2602.11424.

    Example:
        >>> import torch
        >>> from deft_lightning.functional import token_stats
        >>> stats = token_stats(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]))
        >>> Likelihood()(stats), Likelihood().gate(stats)
        (tensor([0.5000, 0.8808]), tensor([0.5000, 0.1192]))
    """

    def focus(self, stats: TokenStats) -> Tensor:
        """Return 1 for every token."""
        return torch.ones_like(stats.log_prob)


@dataclass(frozen=True, repr=False)
class Tsallis(DeformedLog):
    """Tsallis q-log, ``(1 - p^(1-q)) / (1 - q)``: gate ``p^(1-q)``, focus ``1 - q`` for every token.

    ``q = 1`` is NLL, ``q = 0`` is Likelihood; above 1 the gate exceeds 1 and grows without bound as ``p`` falls.
    The loss is the generalised cross entropy of arXiv 1805.07836. The official DEFT code calls the exponent q: its
    ``GeneralFamily-x`` is ``Tsallis(q=1-x)``.

    Args:
        q: Any finite real number.
    """

    q: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what is not a number."""
        if not math.isfinite(self.q):
            raise UserError(f"Tsallis: q must be finite, not {self.q}")

    def focus(self, stats: TokenStats) -> Tensor:
        """Return ``1 - q`` for every token."""
        return torch.full_like(stats.log_prob, 1.0 - self.q)


@dataclass(frozen=True, repr=False)
class Cayley(DeformedLog):
    r"""Cayley trajectory, focus ``(1 - r) / (1 + r) = p / (2 - p)`` with the uncertainty radius ``r = 1 - p``.

    With a floor ``f0 > 0``: ``f = f0 * mean(p)`` over the supervised tokens it is called with (in the head: one
    micro-batch on one rank; weighted where they have weights), ``alpha = clamp(f + (1 - f) p / (2 - p), 1e-3, 1)``. The
    floor changes behaviour: at ``p = 1e-4`` the gate is 0.9995 without it and 0.10 to 0.016 with 0.5 (mean p 0.5 to
    0.9). The paper's text has no floor, its official code is ``Cayley(floor=0.5)`` (arXiv 2602.11424).

    Args:
        floor: In ``[0, 1]``.
    """

    floor: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a floor that is not a share."""
        if not 0.0 <= self.floor <= 1.0:
            raise UserError(f"Cayley: floor {self.floor} is outside [0, 1]")

    @property
    def needs_batch(self) -> bool:
        """Return whether the mean of p over the batch enters: only with a floor."""
        return self.floor > 0

    def focus(self, stats: TokenStats) -> Tensor:
        """Return the Cayley transform of each token's uncertainty, raised to the floor if there is one."""
        p = stats.log_prob.exp()
        alpha = p / (2 - p)
        if not self.floor:
            return alpha
        lift = self.floor * stats.mean(p)
        return (lift + (1 - lift) * alpha).clamp(1e-3, 1.0)


@dataclass(frozen=True, repr=False)
class DEFT(DeformedLog):
    r"""DEFT, focus ``C = sum_v pi_v^2 = exp(-H_2)``: gate ``p^C``. No hyper-parameter (arXiv 2602.11424).

    A concentrated prediction is trusted (towards the likelihood), a flat one is taught (towards NLL). On a one-hot
    prediction it is exactly Likelihood.

    Args:
        eps: Divide by ``alpha + eps`` as the official code does with 1e-6, for replication only: it scales the gradient
            by 0.868 for a uniform prediction over 152k tokens. 0 is exact.
    """

    eps: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a negative eps."""
        if not 0.0 <= self.eps < math.inf:
            raise UserError(f"DEFT: eps must not be negative, got {self.eps}")

    def focus(self, stats: TokenStats) -> Tensor:
        """Return the collision probability of each token."""
        return stats.collision

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return ``(1 - p^C) / C`` per token."""
        loss = super().__call__(stats)
        if not self.eps:
            return loss
        alpha = stats.collision.detach()
        return loss * (alpha / (alpha + self.eps))


__all__ = ["DEFT", "NLL", "Cayley", "Likelihood", "Tsallis"]
