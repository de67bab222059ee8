"""Share of completions that equal their gold response."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class ExactMatch(Metric):
    """Mean over examples of the share of samples that match, with its standard error over examples.

    ``compute`` returns ``exact_match``, ``exact_match_se``, ``truncated`` (share of samples that reached the length
    limit without an end token) and ``examples``.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        # examples, sum of scores, sum of squared scores, sum of truncated shares
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, matches: list[bool], truncated: list[bool]) -> None:
        """Add one example with the outcome of each of its samples."""
        score, cut = sum(matches) / len(matches), sum(truncated) / len(truncated)
        # Not in place: sums that were reset while testing are tensors of inference mode.
        more = torch.tensor([1.0, score, score**2, cut], dtype=torch.float64, device=self.sums.device)
        self.sums = self.sums + more

    def compute(self) -> dict[str, Tensor]:
        """Return the means."""
        n = self.sums[0].clamp_min(1)
        mean = self.sums[1] / n
        variance = (self.sums[2] / n - mean.square()).clamp_min(0) * n / (n - 1).clamp_min(1)
        return {
            "exact_match": mean,
            "exact_match_se": (variance / n).sqrt(),
            "truncated": self.sums[3] / n,
            "examples": self.sums[0],
        }
