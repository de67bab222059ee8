"""How kinds of evidence against a row become one score: the odds that the row is noisy in any of these ways."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

ROUNDS = 50  # of EM: the rates of a few kinds settle within some twenty
LEAST_RATE = 0.01  # of a kind: one that no row shows may still be there


class Joined(NamedTuple):
    """Kinds of evidence with the rates of the kinds.

    Attributes:
        odds: Log odds that a row is noisy in any way, shape ``(n,)``, in nats.
        parts: ``log rate + evidence`` of each kind, shape ``(kinds, n)``, in nats: the largest explains the row best.
        rates: Shares of the rows that are right, and noisy in each way, shape ``(1 + kinds,)``.
    """

    odds: Numbers
    parts: Numbers
    rates: Numbers


def joined(*evidence: Numbers) -> Joined:
    r"""Return ``log sum_k r_k e^{x_k} - log r_0``: how much more likely a row is noisy in one of k ways than right.

    ``x_k`` is the evidence for each way. Rates come from the rows themselves, by EM from equal ones: evidence of a
    kind that many rows show strongly counts for more, and where no row shows a kind its ups and downs are drowned. A
    row has one kind of noise at a time: evidence against one kind says nothing against the others, so that a long
    answer that fits its prompt does not hide its wrong tokens.

    Args:
        evidence: In nats, shape ``(n,)`` each; at least one.
    """
    logs = np.stack([np.zeros(len(evidence[0])), *evidence])
    rates = np.full(len(logs), 1 / len(logs))
    for _ in range(ROUNDS if logs.size else 0):
        weighted = logs + np.log(rates)[:, None]
        shares = np.exp(weighted - np.logaddexp.reduce(weighted)).mean(1)
        rates = np.maximum(shares, LEAST_RATE)
        rates /= rates.sum()
    parts = logs[1:] + np.log(rates[1:])[:, None]
    return Joined(np.logaddexp.reduce(parts) - np.log(rates[0]), parts, rates)
