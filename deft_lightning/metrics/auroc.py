"""Area under the ROC curve: of two lists of scores, or from two histograms over the same bins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def spread(log_value: Tensor) -> Tensor:
    """Map the logarithm of a value in ``[0, 1]`` to ``t / (1 + t)`` with ``t = -log``, in ``[0, 1)``.

    A monotone map, so ranks are kept, under which both the values near 1 and those many orders below spread over bins
    of equal width.
    """
    t = (-log_value).clamp_min(0)
    return torch.where(torch.isinf(t), torch.ones_like(t), t / (1 + t))


def binned_auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Return the probability that a positive lies in a higher bin than a negative; a shared bin counts one half.

    Args:
        positive: Counts per bin of what is to be detected.
        negative: Counts per bin of the rest.

    Returns:
        In ``[0, 1]``; 0.5 when either is empty.
    """
    total = sum(positive) * sum(negative)
    if not total:
        return 0.5
    below = wins = 0.0
    for pos, neg in zip(positive, negative, strict=True):
        wins += pos * (below + neg / 2)
        below += neg
    return wins / total


def exact_auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Return the probability that a positive scores higher than a negative; equals count one half.

    Args:
        positive: Scores of what is to be detected.
        negative: Scores of the rest.

    Returns:
        In ``[0, 1]``; 0.5 when either is empty.
    """
    edges = np.unique([*positive, *negative])
    above, below = (np.bincount(np.searchsorted(edges, part), minlength=len(edges)) for part in (positive, negative))
    return binned_auroc(above.tolist(), below.tolist())
