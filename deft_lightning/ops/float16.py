"""Scaling of chunks in float16, so that small entries of a gradient are not lost."""

from __future__ import annotations

import torch
from torch import Tensor

# Entries of gate * (pi - onehot) are small: float16 would make most of them subnormal. A chunk is scaled, by a power of
# two, until its largest entry is at most this; products by it are taken back in float32.
LARGEST = 1024.0


def range_of(slope: Tensor, pull: Tensor | None) -> Tensor:
    """Return a power of two that brings the largest slope to between half of :data:`LARGEST` and that.

    Args:
        slope: Derivative of the loss of each token by ``log p``, shape ``(n,)``.
        pull: Derivative by the KL to a reference, shape ``(n,)``; None without one.
    """
    largest = slope.abs().max()
    if pull is not None:
        largest = torch.maximum(largest, pull.abs().max())
    largest = largest.clamp_min(torch.finfo(torch.float32).tiny)
    return LARGEST * torch.exp2(-torch.ceil(torch.log2(largest))).clamp(1e-30, 1e30)


def multiply(product: Tensor, factor: Tensor, out: Tensor, inverse: Tensor | None) -> None:
    """Write ``product @ factor`` into ``out``, times ``inverse`` where the product was scaled."""
    if inverse is None:
        torch.mm(product, factor, out=out)
    else:
        out.copy_(torch.mm(product, factor)).mul_(inverse)
