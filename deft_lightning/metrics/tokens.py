"""Token-weighted means that are exact over micro-batches, steps and ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from deft_lightning.functional import TokenStats


class TokenMeter(Metric):
    """Sums of loss, NLL, correct predictions, tokens and weights in one packed float64 state: one all-reduce to sync.

    ``compute`` returns per-token means ``loss``, ``nll``, ``ppl = exp(nll)``, ``token_accuracy``, ``weight`` and the
    number of ``tokens``; zeros (ppl 1) when no token was seen. Where tokens have weights the loss is the weighted mean,
    ``sum w l / sum w``; what says how good the model is, NLL and accuracy, stays the plain one.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(5, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss_sum: Tensor, stats: TokenStats) -> None:
        """Add supervised tokens.

        Args:
            loss_sum: Sum of the objective over them, each times its weight.
            stats: Their statistics, shape ``(N,)``, with the weights if they have any.
        """
        tokens = torch.full((), stats.log_prob.numel(), device=loss_sum.device)  # CUDA would wait for a copy
        weight = tokens if stats.weight is None else stats.weight.sum(dtype=torch.float64)
        parts = (loss_sum.detach(), -stats.log_prob.sum(), stats.correct.sum(), tokens, weight)
        finite = torch.isfinite(loss_sum.detach())  # such a micro-batch is not counted: its step is skipped
        # Not in place: sums that were reset while validating are tensors of inference mode.
        self.sums = self.sums + torch.stack([torch.where(finite, part, 0).to(torch.float64) for part in parts])

    def compute(self) -> dict[str, Tensor]:
        """Return the means."""
        loss, tokens, weight = self.sums[0], self.sums[3], self.sums[4]
        nll, correct, mean_weight = (self.sums[[1, 2, 4]] / tokens.clamp_min(1)).unbind()
        return {
            "loss": loss / torch.where(weight > 0, weight, 1), "nll": nll, "ppl": nll.exp(), "token_accuracy": correct,
            "weight": mean_weight, "tokens": tokens,
        }  # fmt: skip
