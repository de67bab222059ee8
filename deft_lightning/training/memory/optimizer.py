"""What an optimizer holds: asked of the optimizer itself, in a step on weights of a few numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deft_lightning.training.fused_adam import fuse
from deft_lightning.training.memory.live import LiveBytes

SIDES = (13, 17, 19, 23, 29)  # of the small weights: a side of a state's tensor tells which side of the weight it is


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes of an optimizer.

    Attributes:
        state: Held from the first step on.
        step: At most within a step, beside weights, gradients and state.
    """

    state: int
    step: int


def optimizer_bytes(
    make: Callable[..., Optimizer], groups: Sequence[Mapping[str, Any]], device: str, dtype: torch.dtype | None = None
) -> OptimizerBytes:
    """Return what an optimizer holds for a model's weights.

    The optimizer is made for one small weight of each number of dimensions, dtype and group, and makes a step on them
    with a gradient of zeros. Its state on the model's weights has their sides in place of those of the small ones, and
    its buffers grow with the weights: with all of them where it goes through lists (``foreach``, torch's choice on
    CUDA), with the largest where it takes one after the other; the fused Adam has none.

    Args:
        make: Called with parameter groups.
        groups: As the optimizer of the run gets them; only shapes and dtypes of the weights are looked at.
        device: ``cpu`` or ``cuda``.
        dtype: Of the weights in training, where it is another one than now.
    """
    small: list[dict[str, Any]] = []
    stands_for: list[tuple[Tensor, list[Tensor]]] = []
    for group in groups:
        alike: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        for weight in group["params"]:
            alike.setdefault((weight.ndim, dtype or weight.dtype), []).append(weight)
        own = []
        for (sides, kind), weights in alike.items():
            own.append(torch.nn.Parameter(torch.zeros(SIDES[:sides], dtype=kind)))
            own[-1].grad = torch.zeros_like(own[-1])
            stands_for.append((own[-1], weights))
        small.append({**group, "params": own})
    optimizer = make([group for group in small if group["params"]])
    fuse(optimizer)
    for group in optimizer.param_groups:
        if device == "cuda" and group.get("foreach") is None and not group.get("fused"):
            group["foreach"] = True
    live = LiveBytes()
    optimizer.step()  # makes the state
    with live:
        optimizer.step()
    state = sum(_state(optimizer.state[one], weight) for one, weights in stands_for for weight in weights)
    # A step goes group by group: through lists of all its weights, or from weight to weight.
    together = any(group.get("foreach") for group in optimizer.param_groups)
    most = sum if together else max
    here = max(most(_size(weight, dtype) for weight in group["params"]) for group in small if group["params"])
    there = max(most(_size(weight, dtype) for weight in group["params"]) for group in groups)
    return OptimizerBytes(state, round(live.peak * there / here))


def _size(weight: Tensor, dtype: torch.dtype | None) -> int:
    return weight.numel() * (dtype or weight.dtype).itemsize


def _state(state: Mapping[str, Any], weight: Tensor) -> int:
    """Return the bytes of a small weight's state on a weight of other sides."""
    sides = dict(zip(SIDES, weight.shape, strict=False))
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    return sum(math.prod(sides.get(side, side) for side in value.shape) * value.element_size() for value in tensors)
