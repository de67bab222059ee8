"""Whether two models have the same weights, without keeping either: a number made of their bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deft_lightning.hashing import key

SAMPLED = 1 << 20  # elements of a weight that are looked at, evenly spread: training moves nearly all of them
MULTIPLIER = 0x1E3779B97F4A7C15  # odd, below 2^62
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: nn.Module) -> str:
    """Return a number made of the bits of the weights, the same however they are sharded; every rank has to call it.

    It is a sum of integers, which no order of adding changes.
    """
    total = 0
    shared: Any = None
    for name, weight in model.named_parameters():
        local, offset, stride = _of_this_rank(weight.detach())
        shared = weight if hasattr(weight, "placements") else shared
        if local.numel():
            total += _mixed(local, offset, stride) * (key(name, tuple(weight.shape), str(weight.dtype)) | 1)
    total %= 1 << 62
    if shared is not None:
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, total)
        total = sum(parts) % (1 << 62)
    return f"{total:016x}"


def _of_this_rank(weight: Any) -> tuple[Tensor, int, int]:
    """Return the sampled elements that this rank holds, where the first of them is in the whole, and their distance."""
    stride = max(1, weight.numel() // SAMPLED)
    if not hasattr(weight, "placements"):
        return weight.reshape(-1)[::stride], 0, stride
    rows, world = weight.shape[0], weight.device_mesh.size()
    first_row = min(weight.device_mesh.get_local_rank() * -(-rows // world), rows)  # as torch.chunk shares rows out
    offset = first_row * (weight.numel() // max(rows, 1))
    skipped = -offset % stride
    return weight.to_local().reshape(-1)[skipped::stride], offset + skipped, stride


def _mixed(elements: Tensor, offset: int, stride: int) -> int:
    """Return the sum of the bits of every element, each times a number of its place."""
    bits = elements.contiguous().view(BITS[elements.element_size()]).long()
    places = torch.arange(len(bits), device=bits.device) * stride + offset
    return int((bits * ((places * MULTIPLIER) ^ (places << 7) | 1)).sum())
