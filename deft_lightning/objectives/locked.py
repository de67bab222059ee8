"""Tokens that an objective holds shut though the model is sure and wrong about them."""

from __future__ import annotations

from torch import Tensor

from deft_lightning.functional import TokenStats

CONCENTRATED = 0.5  # collision probability from which a prediction is sure: one token has at least half of it
SHUT = 0.1 * (
    1 - 1e-5
)  # gate below which a token trains less than a tenth of what it would under NLL, but for rounding


def locked(stats: TokenStats, gate: Tensor) -> Tensor:
    """Return which tokens the model is sure and wrong about while their gate is nearly shut (bool, ``(N,)``).

    Args:
        stats: Statistics of N tokens.
        gate: Their gates, of the objective in force.
    """
    return (stats.collision >= CONCENTRATED) & ~stats.correct & (gate < SHUT)
