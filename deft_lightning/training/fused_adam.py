"""Adam and AdamW in one kernel a tensor, where torch has it and nobody asked for something else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from deft_lightning.annotations import State

DEVICES = ("cpu", "cuda")
# In float16 torch's loop, whose epsilon of 1e-8 is 0 there, and its kernel end at other weights.
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
OWN = ("fused", "foreach")  # how a step is computed, not what it is: of this run, whatever a checkpoint says


def fuse(optimizer: Optimizer) -> None:
    """Let Adam and AdamW of torch step by their fused kernel; another optimizer stays as it is.

    On the CPU torch's default is a loop of some ten operations for each tensor, each a pass over memory; on CUDA it
    goes through lists, with a copy of one moment. A ``fused`` or ``foreach`` that was given wins, and a group with
    weights of another device or dtype keeps torch's choice. Both are a matter of the run: a checkpoint of a run that
    stepped otherwise is resumed the way this one steps.

    Args:
        optimizer: Just made, before its first step.
    """
    if type(optimizer) not in (Adam, AdamW):
        return
    for group in optimizer.param_groups:
        if _fits(group):
            # Not as an argument: the optimizer would then unscale gradients itself, which Lightning refuses to clip.
            group.update(fused=True, foreach=False)
    optimizer.register_load_state_dict_pre_hook(_keep_own)


def _fits(group: dict[str, Any]) -> bool:
    asked = any(group[name] is not None for name in OWN) or group["capturable"] or group["differentiable"]
    return not asked and all(_known(weight) for weight in group["params"])


def _known(weight: Tensor) -> bool:
    return weight.device.type in DEVICES and weight.dtype in DTYPES


def _keep_own(optimizer: Optimizer, state: State) -> State:
    """Return a state to load with this optimizer's own way to compute a step."""
    groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
    return {**state, "param_groups": [{**theirs, **{name: own[name] for name in OWN}} for theirs, own in groups]}
