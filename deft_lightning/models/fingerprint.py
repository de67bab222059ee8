"""Whether two models have the same weights, without keeping either: a number made of their bits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deft_lightning.hashing import key
from deft_lightning.models.head import base_causal_lm

SAMPLED = 1 << 20  # elements of a weight that are looked at, evenly spread: training moves nearly all of them
MULTIPLIER = 0x1E3779B97F4A7C15  # odd, below 2^62
# What peft puts into the names of weights.
WRAPPED = re.compile(r"^base_model\.model\.|(?<=\.)(?:base_layer|original_module)\.")
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: nn.Module) -> str:
    """Return a number made of the bits of the weights, the same however they are sharded; every rank has to call it.

    It is a sum of integers, which no order of adding changes. Adapters that do nothing yet are left out, and so is
    what peft adds to names: two runs that add adapters to one model start from the same model.
    """
    sums = {"": 0, "lora": 0}
    shared, works = False, False
    for name, weight in base_causal_lm(model).named_parameters():
        local, offset, stride = _of_this_rank(weight.detach())
        shared |= hasattr(weight, "placements")
        works |= "lora_B" in name and bool(local.any())
        if local.numel():
            plain = name.replace(".base_layer.", ".")
            part = _mixed(local, offset, stride) * (key(plain, tuple(weight.shape), str(weight.dtype)) | 1)
            sums["lora" if "lora_" in name else ""] += part
    if shared:
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (sums, works))
        sums = {kind: sum(part[kind] for part, _ in parts) for kind in sums}
        works = any(adapted for _, adapted in parts)
    total = (sums[""] + (sums["lora"] if works else 0)) % (1 << 62)
    return f"{total:016x}"


def weights_fingerprint(weights: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """Return a number made of the bits of some weights in a dtype, the same however they are sharded.

    If they are sharded, every rank has to call it.

    Args:
        weights: By name; what peft adds to names is left out.
        dtype: To which they are rounded first.
    """
    total, shared = 0, False
    for name, weight in weights.items():
        local, offset, stride = _of_this_rank(weight)
        shared |= hasattr(weight, "placements")
        if local.numel():
            plain = WRAPPED.sub("", name)
            total += _mixed(local.to(dtype), offset, stride) * (key(plain, tuple(weight.shape), str(dtype)) | 1)
    if shared:
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, total)
        total = sum(parts)
    return f"{total % (1 << 62):016x}"


def _of_this_rank(weight: Any) -> tuple[Tensor, int, int]:
    """Return the sampled elements that this rank holds, where the first of them is in the whole, and their distance."""
    stride = max(1, weight.numel() // SAMPLED)
    if not hasattr(weight, "placements"):
        return weight.reshape(-1)[::stride], 0, stride
    mesh = weight.device_mesh  # of hybrid sharding: the first dimension holds copies, of which one is counted
    if mesh.ndim > 1 and mesh.get_local_rank(0) > 0:
        return weight.to_local().reshape(-1)[:0], 0, stride
    rows, world = weight.shape[0], mesh.size(-1)
    first_row = min(mesh.get_local_rank(mesh.ndim - 1) * -(-rows // world), rows)  # as torch.chunk shares rows out
    offset = first_row * (weight.numel() // max(rows, 1))
    skipped = -offset % stride
    return weight.to_local().reshape(-1)[skipped::stride], offset + skipped, stride


def _mixed(elements: Tensor, offset: int, stride: int) -> int:
    """Return the sum of the bits of every element, each times a number of its place."""
    bits = elements.contiguous().view(BITS[elements.element_size()]).long()
    places = torch.arange(len(bits), device=bits.device) * stride + offset
    return int((bits * ((places * MULTIPLIER) ^ (places << 7) | 1)).sum())
