"""Sums of figures of tokens by the source of their examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenSources(NamedTuple):
    """Where each of N tokens comes from.

    Attributes:
        names: Of the sources of the data, at least two, whether they are among these tokens or not.
        places: Shape ``(N,)``, int64: of each token the place of its source in ``names``.
    """

    names: tuple[str, ...]
    places: Tensor


class SourceSums(Metric):
    """Sums of K figures of tokens for each of S sources, in one packed float64 state: one all-reduce to sync.

    ``compute`` returns the sums, shape ``(S, K)``; adding to them waits for no device.

    Args:
        names: Of the sources.
        figures: How many figures of each token there are.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, names: Sequence[str], figures: int) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("sums", torch.zeros(len(self.names), figures, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, places: Tensor, *values: Tensor, counted: Tensor | None = None) -> None:
        """Add N tokens.

        Args:
            places: Shape ``(N,)``: of each token the place of its source.
            values: K tensors of shape ``(N,)``.
            counted: Scalar, whether they count; default: they do.
        """
        wide = torch.stack([part.detach().to(torch.float64) for part in values], dim=1)
        if counted is not None:
            wide = torch.where(counted, wide, 0.0)
        # Not in place: sums that were reset while validating are tensors of inference mode.
        self.sums = self.sums + torch.zeros_like(self.sums).index_add_(0, places, wide)

    def compute(self) -> Tensor:
        """Return the sums of all ranks."""
        return self.sums
