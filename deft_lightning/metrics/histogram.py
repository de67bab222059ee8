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
        counts: Values per bin; of weighted values, their weight.
        total: Number of values, or their weight.
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
        """Return the mean of the values; 0 without any."""
        return self.sum / self.total if self.total else 0.0

    @property
    def effective_sample_size(self) -> float:
        """Return ``(sum g)^2 / (n sum g^2)`` in (0, 1]: 1 when all values are equal; 0 without any weight."""
        return self.sum**2 / (self.total * self.sum_squares) if self.sum_squares else 0.0

    def share_below(self, value: float) -> float:
        """Return the share of the values below ``value``, in ``[0, 1]``; 0 without any.

        Exact where ``value`` is an edge, otherwise as if the values of a bin were spread evenly over it.
        """
        below = 0.0
        for count, left, right in zip(self.counts, self.edges, self.edges[1:], strict=False):
            # Edges are sums of floats: one that is meant to be `value` may be off by an ulp.
            inside = (value - left) / (right - left)
            below += count * (0.0 if inside < 1e-9 else 1.0 if inside > 1 - 1e-9 else inside)
        return below / self.total if self.total else 0.0

    def raw(self) -> dict[str, Any]:
        """Return the keyword arguments of ``SummaryWriter.add_histogram_raw``."""
        filled = [i for i, count in enumerate(self.counts) if count]
        first, last = (filled[0], filled[-1]) if filled else (0, 0)
        return {
            "min": self.edges[first],
            "max": self.edges[last + 1],
            "num": self.total,
            "sum": self.sum,
            "sum_squares": self.sum_squares,
            # TensorBoard wants right edges, and a left neighbour to draw the first filled bin from.
            "bucket_limits": self.edges[1:],
            "bucket_counts": self.counts,
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

    def update(self, row: int, values: Tensor, weight: Tensor | None = None) -> None:
        """Add values to quantity ``row``.

        Args:
            row: Which quantity.
            values: Shape ``(N,)``.
            weight: Shape ``(N,)``, not negative: what each value counts, instead of 1.
        """
        wide = values.detach().to(torch.float64)
        self._add(torch.full_like(wide, row, dtype=torch.long), self.ranges[row], wide, weight)

    def update_bands(self, first: int, bands: int, values: Tensor, by: Tensor) -> None:
        """Add values to one of ``bands`` quantities each: a histogram of two dimensions.

        Args:
            first: Row of the lowest band; the others follow it, with the same range.
            bands: Bands of equal width over ``[0, 1]``.
            values: Shape ``(N,)``.
            by: Shape ``(N,)``, decides on the band; values outside ``[0, 1]`` go to the outermost ones.
        """
        band = _bin(by.detach().to(torch.float64), (0.0, 1.0), bands)
        self._add(first + band, self.ranges[first], values.detach().to(torch.float64), None)

    def _add(self, rows: Tensor, edges: tuple[float, float], wide: Tensor, weight: Tensor | None) -> None:
        weight = torch.ones_like(wide) if weight is None else weight.detach().to(torch.float64)
        width, weighted = self.bins + 3, wide * weight
        flat, start = self.state.view(-1), rows * width
        flat.scatter_add_(0, start + _bin(wide, edges, self.bins), weight)
        for place, part in enumerate((weighted, weighted * wide, weight), start=self.bins):
            flat.scatter_add_(0, start + place, part)

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


def _bin(values: Tensor, edges: tuple[float, float], bins: int) -> Tensor:
    low, high = edges
    return ((values - low) * (bins / (high - low))).nan_to_num(0.0).clamp(0, bins - 1).long()
