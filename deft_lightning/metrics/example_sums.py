"""Sums over examples that become means and their standard errors once all ranks have added theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class ExampleSums(Metric):
    """Number of examples, sum and sum of squares of figures, kept apart by group; one packed state, exact over ranks.

    ``compute`` returns the sums, float64, shape ``(groups, figures, 3)``.

    Args:
        groups: Kinds of examples.
        figures: Values of one example.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, groups: int, figures: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(groups, figures, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, group: int, values: Sequence[float]) -> None:
        """Add one example."""
        value = torch.tensor(values, dtype=torch.float64, device=self.sums.device)
        # Not in place: sums that were reset while testing are tensors of inference mode.
        more = torch.zeros_like(self.sums)
        more[group] = torch.stack([torch.ones_like(value), value, value.square()], dim=-1)
        self.sums = self.sums + more

    def compute(self) -> Tensor:
        """Return the sums of all ranks."""
        return self.sums
