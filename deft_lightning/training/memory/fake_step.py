"""What a step holds, counted while it runs without data: torch's fake tensors have shapes and dtypes and no memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from deft_lightning.annotations import CausalLM
from deft_lightning.data.loading.shape import BatchShape
from deft_lightning.models import find_head
from deft_lightning.models.fused import hidden_states
from deft_lightning.models.quantized import quantization_of, quantized_layers
from deft_lightning.models.quantized_shape import shapes_of_layers
from deft_lightning.models.shard import layers_of
from deft_lightning.ops.dense import BLOCK_CPU, dense_stats
from deft_lightning.training.memory.head import HeadBytes, HeadShape, head_bytes
from deft_lightning.training.memory.live import LiveBytes

WITHOUT_MASK = "sdpa_without_mask"  # the name that transformers gets for what counts attention
LAYERS = 2  # that are run: the second shows what each of the others adds


@dataclass(frozen=True)
class StepCount:
    """Bytes of a step of all layers, beyond weights, gradients of earlier micro-batches and optimizer state.

    Attributes:
        activations: Kept from forward to backward when the body has run; what autocast has cast is among them.
        forward: At most until the head has run.
        backward: At most while the layers are run backward: the activations that are left, gradients so far, buffers.
        end: At most while the embedding's gradient is made, when those of all layers are there.
        buffer: Of each, what stays for the next step: logits of a chunk.
    """

    activations: int
    forward: int
    backward: int
    end: int
    buffer: int


def fake_copy(model: CausalLM, mode: FakeTensorMode, layers: int, dtype: torch.dtype | None = None) -> CausalLM:
    """Return a model of the shapes and settings of another, with its first layers alone, that takes no memory.

    Args:
        model: Its weights may be anywhere, on the meta device as well.
        mode: In which the copy can be run.
        layers: How many layers it gets.
        dtype: Of floating-point weights; None for those of the model.
    """
    stack, quantization = layers_of(model), quantization_of(model)
    dropped = {id(weight) for layer in stack[layers:] for weight in layer.parameters()}
    memo: dict[int, Any] = {}
    with mode:
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) in dropped:
                continue
            kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            empty = torch.empty(tensor.shape, dtype=kind)
            own = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if own else empty
    for _, layer in quantized_layers(model):  # scales beside the weights, which are not looked at
        memo |= {id(one): one for one in (getattr(layer, "state", None), getattr(layer, "quant_state", None)) if one}
    memo[id(stack)] = nn.ModuleList(copy.deepcopy(layer, memo) for layer in stack[:layers])
    small = copy.deepcopy(model, memo)
    if quantization is not None:
        with mode:
            shapes_of_layers(small, quantization)
    return small


def count_step(
    model: CausalLM, batch: BatchShape, *, fused: bool, dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None, accumulated: bool = False, reference: bool = False, device: str = "cpu",
    kernel: str = "torch",
) -> StepCount:  # fmt: skip
    """Return what a step holds: two layers are run on fake tensors, and the others are taken to be like the second.

    They are run as on a CPU, whatever the device. SDPA keeps there what its flash kernel keeps on CUDA: queries, keys,
    values, output, and a number for each row and head. What `flash_attention_2` keeps is the same; `eager` keeps the
    scores of all pairs of positions. The fused head is counted by :func:`head_bytes`.

    Args:
        model: Any causal language model of transformers, with adapters or without.
        batch: The largest micro-batch.
        fused: Whether the head is the fused one.
        dtype: Of the weights in training; None for that of the model.
        autocast: Dtype of autocast, None without.
        accumulated: Whether gradients of earlier micro-batches are there already.
        reference: Whether predictions are compared with those of a reference.
        device: ``cpu`` or ``cuda``.
        kernel: Row kernel of the fused head, ``torch`` or ``triton``.
    """
    whole, live = len(layers_of(model)), LiveBytes()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    small = fake_copy(model, mode, min(LAYERS, whole), dtype)
    if (attention := _attention(small, batch)) is not None:
        small.set_attn_implementation(attention)
    layers, marks = layers_of(small), list[int]()  # bytes held where each layer begins
    before_embedding: list[int] = []  # the peak of the backward pass until the first layer's input has its gradient

    def mark(_: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():  # of the reference
            return
        hidden = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if not marks and hidden.requires_grad:
            hidden.register_hook(lambda _: before_embedding.append(live.restart()))
        marks.append(live.now)

    for layer in layers:
        layer.register_forward_pre_hook(mark, with_kwargs=True)
    with mode:
        ids = torch.zeros((batch.rows, batch.length), dtype=torch.int64)
        trained = [weight for weight in small.parameters() if weight.requires_grad]
        head_weight = small.get_output_embeddings().weight if fused else None
        for weight in trained:
            if accumulated or weight is head_weight:  # to the head's own a tied embedding adds
                weight.grad = torch.empty_like(weight)
        with live:
            with torch.autocast("cpu", autocast) if autocast is not None else nullcontext():
                output, head, kept = _forward(small, live, ids, batch, fused, reference, autocast, device, kernel)
            forward = max(live.restart(), kept + head.forward)
            if output.requires_grad:
                output.backward(torch.empty_like(output))
            rest = live.restart()
    added = marks[1] - marks[0] if len(layers) > 1 else 0
    own = 0 if accumulated else _bytes(weight for weight in layers[-1].parameters() if weight.requires_grad)
    more = whole - len(layers)
    stays = head.gradient + head.buffer
    backward = max(before_embedding[0] if before_embedding else rest, kept + head.kept - stays)
    return StepCount(
        activations=kept + more * added,
        forward=forward + more * added,
        backward=backward + stays + more * max(added, own),
        end=rest + stays + more * own,
        buffer=head.buffer,
    )


def _attention(model: CausalLM, batch: BatchShape) -> str | None:
    """Return the attention to count with, where it is not the model's own.

    transformers would make a mask for fake tensors where it makes none for real ones: it looks whether rows are packed.
    Kernels of flash attention know no fake tensors, and keep what SDPA keeps without a mask.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import flash_attention_mask

    own = str(getattr(model.config, "_attn_implementation", ""))
    if own == "eager" or (own == "sdpa" and batch.packed):
        return None
    AttentionInterface.register(WITHOUT_MASK, sdpa_attention_forward)
    AttentionMaskInterface.register(WITHOUT_MASK, flash_attention_mask)
    return WITHOUT_MASK


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _forward(
    model: CausalLM, live: LiveBytes, ids: Tensor, batch: BatchShape, fused: bool, reference: bool,
    autocast: torch.dtype | None, device: str, kernel: str,
) -> tuple[Tensor, HeadBytes, int]:  # fmt: skip
    """Run body and head; return what is differentiated, the bytes of the fused head, and those held after the body."""
    inputs, count = {"input_ids": ids, "use_cache": False}, batch.supervised
    if not fused:
        logits = model(**inputs).logits
        kept = live.now
        # Their gradient is of all logits, however few are read: more than three blocks take time and no more memory.
        few = min(count, 3 * max(1, BLOCK_CPU // logits.shape[-1]))
        targets, at = torch.zeros(few, dtype=torch.int64), torch.arange(few)
        return -dense_stats(logits[:, :-1], targets, at).log_prob.sum(), HeadBytes(0, 0, 0, 0), kept
    seam = find_head(model, "torch")
    beside = None
    if reference:
        with torch.no_grad():
            beside = hidden_states(model, seam, inputs)  # kept until the head has run
    hidden = hidden_states(model, seam, inputs)
    weight, _ = seam.weights()
    trained = weight.requires_grad
    shape = HeadShape(
        count, weight.shape[1], weight.shape[0], weight.dtype, hidden.dtype, autocast or hidden.dtype, trained,
        beside is not None, device, kernel,
    )  # fmt: skip
    head = head_bytes(shape)
    return hidden, head, live.now
