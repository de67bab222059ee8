"""Steps that rounding swallows: weights in bfloat16 do not move by less than half the distance to their neighbours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from deft_lightning.annotations import CausalLM

SAMPLE = 1 << 14  # weights that are looked at of each matrix, spread over it


@torch.no_grad()
def share_that_moves(weights: Iterable[Tensor], step: float) -> float:
    """Return the share of weights that a step up or down changes, in their own dtype; a sample of each tensor.

    Args:
        weights: Of any shape; on the meta device they hold nothing and are left out.
        step: How far each is to move; AdamW moves a weight by about the learning rate.
    """
    moved, count = 0.0, 0
    for weight in weights:
        local: Any = weight.to_local() if hasattr(weight, "to_local") else weight
        if local.is_meta or not local.numel():
            continue
        flat = local.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLE)]
        exact = sample.float()
        share = sum(((exact + way).to(sample.dtype) != sample).float().mean().item() for way in (step, -step)) / 2
        moved, count = moved + share * flat.numel(), count + flat.numel()
    return moved / count if count else 1.0


def warn_of_rounding(model: CausalLM, optimizer: Optimizer) -> None:
    """Warn where whole weights are trained in bfloat16 or float16, with the share of them that a step can move.

    Adapters begin near zero, where numbers are dense, and mixed precision keeps weights in float32: of neither is
    anything said.

    Args:
        model: With the weights that training begins with.
        optimizer: Has the learning rate.
    """
    if hasattr(model, "get_base_model"):
        return
    low = (torch.bfloat16, torch.float16)
    groups = [([w for w in group["params"] if w.dtype in low], float(group["lr"])) for group in optimizer.param_groups]
    matrices = [([w for w in weights if w.ndim >= 2], rate) for weights, rate in groups]
    matrices = [(weights, rate) for weights, rate in matrices if weights]
    if not matrices:
        return
    sizes = [sum(weight.numel() for weight in weights) for weights, _ in matrices]
    shares = [share_that_moves(weights, rate) for weights, rate in matrices]
    share = sum(size * own for size, own in zip(sizes, shares, strict=True)) / sum(sizes)
    dtype, rate = str(matrices[0][0][0].dtype).removeprefix("torch."), max(rate for _, rate in matrices)
    rank_zero_warn(
        f"the weights are trained in {dtype}: a step of the learning rate {rate:g} moves {share:.1%} of them, "
        "and rounding swallows the rest; --trainer.precision bf16-mixed with --model.dtype float32 keeps every step"
    )
