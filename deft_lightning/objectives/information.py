"""An objective that is shut at both ends: on what the model knows, and on what is out of its reach."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.objectives.base import Objective


@dataclass(frozen=True, repr=False)
class InfoSFT(Objective):
    """InfoSFT, ``-sg(g / mean g) log p`` with ``g = p [logit t - logit p]_+``: gate ``g / mean g`` (arXiv 2605.14967).

    ``logit p = log p - log(1 - p)``. The gate grows with p while a label is improbable, is largest in between (for t =
    0.93 at p = 0.57) and is 0 from ``p = t`` on: neither what the model knows nor what it finds impossible trains.
    Divided by its mean over the tokens of a micro-batch on a rank, by weight where they have weights, it has mean 1, so
    that the learning rate of NLL carries over. With accumulation or several ranks it is a mean over less than the
    optimizer step. Logarithms throughout: the ratios hold for probabilities that float32 does not have.
    The value is no integral of the gate, and comparable only with itself.

    Args:
        threshold: Probability ``t`` from which on a label no longer trains, in ``(0, 1)``.
        normalize_by: ``mean`` of the gates of the batch, or ``none`` for ``g`` itself.
    """

    threshold: float = 0.93
    normalize_by: Literal["mean", "none"] = "mean"

    def __post_init__(self) -> None:
        """Refuse thresholds without a logit, and words that mean nothing."""
        if not 0.0 < self.threshold < 1.0:
            raise UserError(f"InfoSFT: threshold must be above 0 and below 1, got {self.threshold}")
        if self.normalize_by not in ("mean", "none"):
            raise UserError(f"InfoSFT: normalize_by must be mean or none, not {self.normalize_by!r}")

    @property
    def needs_batch(self) -> bool:
        """Return whether gates are divided by their mean over the batch."""
        return self.normalize_by == "mean"

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return the weighted negative log-likelihood per token."""
        log_gate = self._log_gate(stats.log_prob.detach())
        if self.normalize_by == "mean":
            log_mean = _log_mean(log_gate, stats.weight)
            # Where every gate is shut there is no mean to divide by, and nothing to divide.
            log_gate = log_gate - torch.where(log_mean.isfinite(), log_mean, 0)
        return -log_gate.exp() * stats.log_prob

    def _log_gate(self, log_prob: Tensor) -> Tensor:
        """Return ``log g``, minus infinity where the gate is shut."""
        height = math.log(self.threshold) - math.log1p(-self.threshold)
        below = height - (log_prob - torch.log(-torch.expm1(log_prob)))
        return log_prob + below.clamp_min(0).log()


def _log_mean(log_values: Tensor, weight: Tensor | None) -> Tensor:
    """Return the log of the mean of values given by their logs, by weight if there are weights; a scalar."""
    if weight is None:
        return torch.logsumexp(log_values, 0) - math.log(max(len(log_values), 1))
    return torch.logsumexp(log_values + weight.log(), 0) - weight.sum().log()


__all__ = ["InfoSFT"]
