"""Adapters merged into the weights: in float32, or rounded to the dtype of the base with the loss of it measured."""

from __future__ import annotations

import copy
from typing import Any, Literal, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from deft_lightning.annotations import CausalLM
from deft_lightning.errors import UserError
from deft_lightning.models.dequantized import dequantized
from deft_lightning.models.fingerprint import WRAPPED
from deft_lightning.models.head import base_causal_lm
from deft_lightning.models.lora import changes_base, untie_adapted_head
from deft_lightning.models.quantized import quantization_of

Merge = Literal["float32", "base", "none"]
MUCH = 0.01  # of the update, above which the loss is a warning


def merge_of(asked: Merge | bool) -> Merge:
    """Return how adapters are to be merged; True is float32, False none.

    Raises:
        UserError: There is no such way.
    """
    way: Any = {True: "float32", False: "none"}.get(asked, asked) if isinstance(asked, bool) else asked
    if way not in get_args(Merge):
        raise UserError(f"--merge {asked} is not one of {', '.join(get_args(Merge))}")
    return way


def stand_alone(model: CausalLM) -> bool:
    """Return whether the adapters of a model, if it has any, can be laid over their base again."""
    configs = getattr(model, "peft_config", {}).values()
    return not any(changes_base(getattr(config, "init_lora_weights", True)) for config in configs)


@torch.no_grad()
def merged(model: CausalLM, way: Merge) -> CausalLM:
    """Return a copy of a model, in host memory, with its adapters merged into its weights.

    A quantised base is dequantised first: it is what the adapters were trained on. The sum is made in float32; in the
    dtype of the base it is rounded once, and the share of the update that rounding has lost is told:
    ``|rounded - exact| / |exact - base|`` over all weights that the adapters change.

    Args:
        model: With adapters; stays as it is.
        way: `float32`, or `base` for the dtype of the base.
    """
    dtype, kind = base_causal_lm(model).dtype, quantization_of(model)
    start = {WRAPPED.sub("", name): weight for name, weight in model.named_parameters() if _of_base(name)}
    if kind is None:
        exact = _in_float32(model)
    else:
        rank_zero_info(
            f"merged into the base as dequantised from {kind}, on which the adapters were trained; for the base as it"
            " was before, load the adapters over it"
        )
        exact, before = dequantized(model)
        start |= {WRAPPED.sub("", name): weight for name, weight in before.items()}
    untie_adapted_head(exact)
    exact = exact.merge_and_unload()
    if dtype == torch.float32:
        return exact
    short = str(dtype).removeprefix("torch.")
    if way == "float32":
        rank_zero_info(f"merged in float32: twice the size of {short}, and the update loses no precision")
        return exact
    lost = change = 0.0
    for name, weight in exact.named_parameters():
        change += float((weight - start[name].to("cpu", torch.float32)).square().sum()) if name in start else 0.0
        lost += float((weight.to(dtype).float() - weight).square().sum()) if name in start else 0.0
    share = (lost / change) ** 0.5 if change else 0.0
    tell = rank_zero_warn if share > MUCH else rank_zero_info
    tell(f"merged in {short}: rounding is {share:.1%} of the size of the update; float32 keeps it (--merge float32)")
    return exact.to(dtype)


def _of_base(name: str) -> bool:
    return "lora_" not in name and ".modules_to_save." not in name


def _in_float32(model: CausalLM) -> CausalLM:
    """Return a copy in host memory with float32 weights; buffers keep their dtype."""
    held: dict[int, Tensor] = {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in model.buffers()}
    for weight in model.parameters():
        value = weight.detach().to("cpu", torch.float32 if weight.is_floating_point() else weight.dtype, copy=True)
        held[id(weight)] = nn.Parameter(value, weight.requires_grad)
    return copy.deepcopy(model, held)
