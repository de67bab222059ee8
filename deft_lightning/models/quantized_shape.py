"""The memory of a quantised layer without its numbers: for models on the meta device, and for fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deft_lightning.annotations import CausalLM
from deft_lightning.models.quantized import BLOCK, NESTED, Quantization, compute_in, quantized_layers

TABLES = (16 + 256 + 1) * 4  # bytes beside each 4-bit weight: its code, that of its scales, their offset


class QuantizedShape(nn.Linear):
    """A linear layer that takes the memory of a quantised one, and computes nothing of use.

    Its weight is as bitsandbytes stores it, one buffer stands for scales and tables. In the forward pass, and again in
    the backward pass, a weight in the dtype of the product is made. An 8-bit layer keeps its input, and not where
    gradient checkpointing would drop it; a 4-bit layer keeps nothing.

    Args:
        like: The layer that it stands for; device and bias are those of it.
        quantization: `nf4` or `int8`.
        compute_dtype: Of the products of a 4-bit layer; None is that of its input.
    """

    def __init__(self, like: Any, quantization: Quantization, compute_dtype: torch.dtype | None) -> None:
        with torch.device("meta"):
            super().__init__(like.in_features, like.out_features, bias=like.bias is not None)
        rows, count, device = self.out_features, self.in_features * self.out_features, like.weight.device
        four = quantization == "nf4"
        stored = torch.empty((-(-count // 2), 1), dtype=torch.uint8, device=device) if four else None
        weight = torch.empty_like(like.weight, dtype=torch.int8) if stored is None else stored
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = like.bias
        blocks = -(-count // BLOCK)
        scales = blocks + -(-blocks // NESTED) * 4 + TABLES if four else rows * 4
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8, device=device), persistent=False)
        self.quantization, self.compute_dtype = quantization, compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros of the right shape."""
        dtype = self.compute_dtype if self.compute_dtype is not None and self.quantization == "nf4" else x.dtype
        product: Tensor = _Product.apply(x.to(dtype), self.out_features, self.quantization == "int8")
        return (product if self.bias is None else product + self.bias.to(dtype)).to(x.dtype)


class _Product(torch.autograd.Function):
    """A product with a weight that is made for it, and made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, keeps_input: bool) -> Tensor:
        ctx.rows, ctx.width, ctx.dtype = rows, x.shape[-1], x.dtype
        ctx.input = x if keeps_input else None  # as bitsandbytes does: an attribute, which no checkpointing drops
        return torch.nn.functional.linear(x, x.new_empty(rows, x.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].to(ctx.dtype)
        return grad @ grad.new_empty(ctx.rows, ctx.width), None, None


def quantize_shapes(model: CausalLM, quantization: Quantization, compute_dtype: torch.dtype | None) -> None:
    """Give a model on the meta device the memory of a quantised one: every linear layer but the head."""
    head, skipped = model.get_output_embeddings(), tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not head and not any(part in name.split(".") for part in skipped):
            model.set_submodule(name, QuantizedShape(layer, quantization, compute_dtype))


def shapes_of_layers(model: nn.Module, quantization: Quantization) -> None:
    """Replace the quantised layers of a copy, whose weights are fake tensors, by what takes their memory."""
    for name, layer in list(quantized_layers(model)):
        model.set_submodule(name, QuantizedShape(layer, quantization, getattr(layer, "compute_dtype", None)))


def settle_products(model: CausalLM, dtype: torch.dtype) -> None:
    """Let the products with a 4-bit base be made in a dtype, of a model on the meta device too."""
    compute_in(model, dtype)
    for layer in model.modules():
        if isinstance(layer, QuantizedShape):
            layer.compute_dtype = dtype
