"""The peak of memory of a training step, part by part, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deft_lightning.annotations import CausalLM
from deft_lightning.data.loading.shape import BatchShape
from deft_lightning.models import layers_of
from deft_lightning.models.quantized import scales
from deft_lightning.training.memory.fake_step import count_step
from deft_lightning.training.memory.optimizer import OptimizerBytes, optimizer_bytes
from deft_lightning.training.optimizers import groups_of

# Lightning's precision: dtype of the weights, None for that in which they were loaded, and of autocast.
PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "32-true": (None, None), "bf16-mixed": (None, torch.bfloat16), "16-mixed": (None, torch.float16),
    "bf16-true": (torch.bfloat16, None), "16-true": (torch.float16, None), "64-true": (torch.float64, None),
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """How a model is trained, as far as memory depends on it.

    Attributes:
        optimizer: Called with parameter groups.
        precision: Lightning's name.
        fused: Whether the head is the fused one.
        kernel: Its row kernel, ``torch`` or ``triton``.
        accumulate: Micro-batches per optimizer step.
        reference: Whether predictions are compared with those of a reference (KLAnchor).
        device: ``cpu`` or ``cuda``.
        ranks: Number of processes.
        sharded: Whether they share weights, gradients and optimizer state out (fsdp2).
        replicate: Groups of processes that share out for themselves (hybrid sharding).
    """

    optimizer: Callable[..., Optimizer]
    precision: str = "32-true"
    fused: bool = True
    kernel: str = "torch"
    accumulate: int = 1
    reference: bool = False
    device: str = "cpu"
    ranks: int = 1
    sharded: bool = False
    replicate: int = 1

    @property
    def shares(self) -> int:
        """Return the number of parts that weights, gradients and optimizer state are cut into."""
        return self.ranks // self.replicate if self.sharded else 1


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device.

    Attributes:
        weights: All weights and buffers, as they are stored; of sharded ones this rank's share, and what it gathers.
        trained: Of them, those that get a gradient: adapters alone, or all.
        gradients: Of the trained weights, and copies that data parallelism sends.
        optimizer: State of the optimizer.
        activations: Kept from forward to backward.
        reference: A frozen copy of the weights.
        peak: The most at a time, temporary buffers included.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    reference: int
    peak: int

    @property
    def buffers(self) -> int:
        """Return what the peak is above the parts that can stand beside each other: chunks of the head, temporaries."""
        parts = self.weights + self.gradients + self.optimizer + self.activations + self.reference
        return max(self.peak - parts, 0)


def estimate(model: CausalLM, batch: BatchShape, setup: Setup) -> MemoryEstimate:
    """Return what a training step takes on one device, from the second step on, when there is optimizer state.

    The peak is that of three moments: the head has run, beside the gradients of earlier micro-batches; the backward
    pass, in which activations go and gradients come; the step of the optimizer. Beside it stands what is always there.
    What an allocator keeps for itself or cannot use is not counted, nor what CUDA holds beside tensors.

    Under fsdp2 a device holds its share, and gathers two layers at a time and what is no layer (embedding, head).
    Under ddp gradients are there twice: torch sends them in buffers of their own.

    Args:
        model: The model, anywhere, on the meta device as well.
        batch: Largest micro-batch of a device.
        setup: How it is trained.

    Raises:
        ValueError: Nothing is known of the precision.
    """
    if setup.precision not in PRECISIONS:
        raise ValueError(f"--trainer.precision {setup.precision}")
    dtype, autocast = PRECISIONS[setup.precision]
    shares = setup.shares
    weights = _bytes((*model.parameters(), *model.buffers()), dtype) + _bytes(scales(model), None)
    trained = _bytes((weight for weight in model.parameters() if weight.requires_grad), dtype)
    compute = dtype
    if setup.sharded and autocast is not None:  # weights are gathered in it, in place of autocast
        compute, autocast = autocast, None
    count = count_step(
        model, batch, fused=setup.fused, dtype=compute, autocast=autocast, reference=setup.reference,
        accumulated=setup.accumulate > 1 or setup.sharded, device=setup.device, kernel=setup.kernel,
    )  # fmt: skip
    optimizer = OptimizerBytes(0, 0)
    if trained:
        optimizer = optimizer_bytes(setup.optimizer, groups_of(model, setup.optimizer), setup.device, dtype)
    share, gradients = trained // shares, trained // shares
    copied = trained if setup.ranks > 1 and not setup.sharded else 0
    reference = weights // shares if setup.reference and not hasattr(model, "get_base_model") else 0
    held = weights // shares + (_gathered(model, compute) if setup.sharded else 0)
    state = optimizer.state // shares
    kept = gradients if setup.accumulate > 1 or setup.sharded else 0
    moments = (
        state + kept + count.forward,
        state + kept + max(count.backward, count.end),
        state + gradients + optimizer.step // shares + count.buffer,
    )
    return MemoryEstimate(
        weights=held, trained=share, gradients=gradients + copied, optimizer=state, activations=count.activations,
        reference=reference, peak=held + reference + copied + max(moments),
    )  # fmt: skip


def _bytes(tensors: Iterable[Tensor], dtype: torch.dtype | None) -> int:
    total = 0
    for tensor in tensors:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        total += tensor.numel() * kind.itemsize
    return total


def _gathered(model: CausalLM, compute: torch.dtype | None) -> int:
    """Return the bytes of the weights that a rank gathers of others: two layers, and all that is no layer."""
    layers: Any = layers_of(model)
    inside = {id(weight) for layer in layers for weight in layer.parameters()}
    largest = sorted(_bytes(layer.parameters(), compute) for layer in layers)[-2:]
    return sum(largest) + _bytes((weight for weight in model.parameters() if id(weight) not in inside), compute)
