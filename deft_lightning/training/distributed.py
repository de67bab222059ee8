"""Ranks and their shares of tensors, whatever the strategy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer


def ranks() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(value: Any) -> list[Any]:
    """Return a plain value of every rank, in the order of ranks; every rank has to call it."""
    if ranks() == 1:
        return [value]
    values: list[Any] = [None] * ranks()
    dist.all_gather_object(values, value)
    return values


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's share of sharded tensors, and others as they are."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def whole(norm: Tensor) -> Tensor:
    """Return a norm over sharded gradients as a plain tensor."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients of what an optimizer trains, as far as there are any."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
