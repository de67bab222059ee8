"""Histograms of several quantities in one packed state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


@dataclass(frozen=True)
class Histogram:
    """One row of a :class:`PackedHistogram` on the host.

    Attributes:
        edges: Bin edges, one more than counts.
        counts: Values per bin.
        total: Number of values.
        sum: Their sum; exact, not from the bins.
        sum_squares: Sum of their squares.
    """

    edges: list[float]
    counts: list[float]
    total: float
    sum: float
    sum_squares: float

    @property
    def mean(self) -> float:
        """Mean of the values; 0 without any."""
        return self.sum / self.total if self.total else 0.0

    @property
    def effective_sample_size(self) -> float:
        """``(sum g)^2 / (n sum g^2)`` in (0, 1]: 1 when all values are equal; 0 without any weight."""
        return self.sum**2 / (self.total * self.sum_squares) if self.sum_squares else 0.0

    def raw(self) -> dict[str, Any]:
        """Return the keyword arguments of ``SummaryWriter.add_histogram_raw``."""
        filled = [i for i, count in enumerate(self.counts) if count]
        first, last = (filled[0], filled[-1]) if filled else (0, 0)
        return {
            "min": self.edges[first],
            "max": self.edges[last + 1],
            "num": int(self.total),
            "sum": self.sum,
            "sum_squares": self.sum_squares,
            # TensorBoard wants right edges, and a left neighbour to draw the first filled bin from.
            "bucket_limits": self.edges[1:],
            "bucket_counts": [int(count) for count in self.counts],
        }


class PackedHistogram(Metric):
    """Histograms, sums and sums of squares of K quantities in one float64 state of shape ``(K, bins + 3)``.

    Sums over ranks and steps are exact; syncing is one all-reduce however many quantities there are.

    Args:
        ranges: Lower and upper edge of each quantity; values outside count in the outermost bins.
        bins: Bins of equal width.
    """

    full_state_update = False
    state: Tensor

    def __init__(self, ranges: Sequence[tuple[float, float]], bins: int = 50) -> None:
        super().__init__()
        self.ranges, self.bins = list(ranges), bins
        self.add_state("state", torch.zeros(len(ranges), bins + 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, row: int, values: Tensor) -> None:
        """Add values, shape ``(N,)``, to quantity ``row``."""
        low, high = self.ranges[row]
        wide = values.detach().to(torch.float64)
        index = ((wide - low) * (self.bins / (high - low))).nan_to_num(0.0).clamp(0, self.bins - 1).long()
        self.state[row].scatter_add_(0, index, torch.ones_like(wide))
        self.state[row, self.bins :] += torch.stack([wide.sum(), wide.square().sum(), wide.new_tensor(wide.numel())])

    def compute(self) -> Tensor:
        """Return the packed state, summed over ranks."""
        return self.state

    def rows(self) -> list[Histogram]:
        """Return the histograms, summed over ranks, on the host."""
        result = []
        for (low, high), row in zip(self.ranges, self.compute().tolist(), strict=True):
            edges = [low + (high - low) * i / self.bins for i in range(self.bins + 1)]
            total, squares, count = row[self.bins :]
            result.append(Histogram(edges, row[: self.bins], count, total, squares))
        return result
