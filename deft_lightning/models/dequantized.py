"""A quantised base in floating point again, for adapters to be merged into it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from deft_lightning.annotations import CausalLM
from deft_lightning.models.head import base_causal_lm
from deft_lightning.models.quantized import LAYERS, quantized_layers

# What transformers writes beside the weights of a quantised model, and asks for again where it is saved.
MARKS = ("hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method")


def float_weight(layer: Any) -> Tensor:
    """Return the weight ``(out, in)`` of a quantised layer in float32, where the layer is."""
    import bitsandbytes

    weight = layer.weight
    if type(layer).__name__ == LAYERS["int8"]:
        scale = weight.SCB if layer.state.SCB is None else layer.state.SCB
        return weight.data.float() * (scale.float() / 127).unsqueeze(1)
    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32  # not that in which the weights were loaded
    return bitsandbytes.functional.dequantize_4bit(weight.data, state)


@torch.no_grad()
def dequantized(model: CausalLM) -> tuple[CausalLM, dict[str, Tensor]]:
    """Return a copy of a model, in host memory and float32, in whose quantised layers the adapters are merged.

    Other adapters, of the head or of what is trained whole, are still there.

    Args:
        model: With adapters over a quantised base; stays as it is.

    Returns:
        The copy, and by name in it the weights ``(out, in)`` of these layers before anything was merged.
    """
    memo: dict[int, Any] = {}
    for _, layer in quantized_layers(model):
        memo[id(layer.weight)] = nn.Parameter(float_weight(layer).cpu(), requires_grad=False)
        if hasattr(layer, "state"):
            memo[id(layer.state)] = layer.state
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in memo:
            own = isinstance(tensor, nn.Parameter)
            value = tensor.detach().to("cpu", torch.float32 if own else tensor.dtype, copy=True)
            memo[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if own else value
    copied, before = copy.deepcopy(model, memo), dict[str, Tensor]()
    modules = dict(copied.named_modules())
    for name, layer in list(quantized_layers(copied)):
        with torch.device("meta"):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        place = name.removesuffix(".base_layer")
        before[f"{place}.weight"] = weight = layer.weight.detach()
        if place != name:
            adapter = modules[place]
            weight = sum((adapter.get_delta_weight(one) for one in adapter.active_adapters), weight)
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        copied.set_submodule(place, linear)
    unmark(base_causal_lm(copied))
    return copied, before


def unmark(causal: CausalLM) -> None:
    """Take from a model what says that it is quantised, so that it is saved as any other."""
    for name in MARKS:
        vars(causal).pop(name, None)
    if hasattr(causal.config, "quantization_config"):
        del causal.config.quantization_config
    causal.config.dtype = torch.float32
