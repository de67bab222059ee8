"""What the fused head holds: chunks of logits, and gradients that it computes in the forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deft_lightning.functional import accumulation_dtype
from deft_lightning.ops.buffers import KEPT_CPU
from deft_lightning.ops.gradient import BLOCK_CPU as GRADIENT_BLOCK_CPU
from deft_lightning.ops.gradient import BLOCK_CUDA as GRADIENT_BLOCK_CUDA
from deft_lightning.ops.plan import CallShape, Plan
from deft_lightning.ops.torch_rows import BLOCK_CPU, Transform


@dataclass(frozen=True)
class HeadShape:
    """A call of the fused head.

    Attributes:
        tokens: N, supervised tokens.
        width: D, of a hidden state.
        vocabulary: V.
        weight: Dtype of the weight.
        hidden: Dtype of the hidden states as the body gives them.
        compute: Dtype of the products: that of autocast, else of the hidden states.
        trained: Whether the weight gets a gradient.
        reference: Whether the head of a reference stands beside it.
        device: ``cpu`` or ``cuda``.
        kernel: ``torch`` or ``triton``.
    """

    tokens: int
    width: int
    vocabulary: int
    weight: torch.dtype
    hidden: torch.dtype
    compute: torch.dtype
    trained: bool
    reference: bool = False
    device: str = "cpu"
    kernel: str = "torch"


@dataclass(frozen=True)
class HeadBytes:
    """Bytes of the head beside the activations of the body.

    Attributes:
        forward: At most in the forward pass.
        kept: From there to the backward pass.
        gradient: Of them, what becomes the gradient of the weight.
        buffer: Of them, the logits of a chunk, which stay for the next call (:mod:`deft_lightning.ops.buffers`).
    """

    forward: int
    kept: int
    gradient: int
    buffer: int


def head_bytes(head: HeadShape) -> HeadBytes:
    """Return what the fused head holds.

    Per call, with C tokens a chunk (:meth:`deft_lightning.ops.plan.Plan.chunk`): the supervised hidden states and
    their gradient, each ``N D``; the logits of a chunk, ``C V``; of a block of rows their softmax, and their wide copy
    where the products are in 16 bits; the weight in the dtype of the products where that is another one, ``V D``; and
    the gradient of the weight, ``V D``, in float32 unless one chunk in the weight's own dtype is all there is.

    Args:
        head: The call.
    """
    n, d, v, compute = head.tokens, head.width, head.vocabulary, head.compute
    wide, heads = accumulation_dtype(compute), 2 if head.reference else 1
    chunk = max(1, min(n, _chunk(head)))
    block = min(chunk, max(1, BLOCK_CPU // v)) if head.device == "cpu" else chunk
    rows = n * d * head.hidden.itemsize
    cast = n * d * compute.itemsize if compute != head.hidden else 0
    weight = v * d * compute.itemsize if compute != head.weight else 0
    wide_buffers = 0 if head.kernel == "triton" else block * v * wide.itemsize * (1 if wide == compute else 2)
    buffers = heads * (chunk * v * compute.itemsize + wide_buffers + weight)
    beside = rows + cast if head.reference else 0
    gradient = scratch = 0
    if head.trained:
        one = n <= chunk and head.weight == compute != torch.float16
        summed = head.weight if one else torch.promote_types(wide, head.weight)
        gradient = v * d * summed.itemsize
        largest = GRADIENT_BLOCK_CPU if head.device == "cpu" else GRADIENT_BLOCK_CUDA
        if summed != compute and head.device == "cpu":  # products of a block before they are added; CUDA adds them
            scratch = min(v, max(1, largest // d)) * d * compute.itemsize
    logits = chunk * v * compute.itemsize
    buffer = logits if head.device == "cpu" and logits <= KEPT_CPU else 0
    kept = n * d * compute.itemsize * 2 + buffer
    forward = rows + cast + n * d * compute.itemsize + buffers + beside + gradient + scratch
    return HeadBytes(forward=forward, kept=kept + gradient, gradient=gradient, buffer=buffer)


def _chunk(head: HeadShape) -> int:
    """Return the number of tokens of a chunk."""
    beside = torch.empty(0, dtype=head.compute) if head.reference else None
    plan = Plan(None, Transform(), head.kernel, reference=beside)  # type: ignore[arg-type]
    narrow = head.trained and head.weight == head.compute
    return plan.chunk(CallShape(head.tokens, head.width, head.vocabulary, head.compute, head.device == "cpu", narrow))
