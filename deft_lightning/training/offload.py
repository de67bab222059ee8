"""Activations that wait for the backward pass in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LEAST = 1 << 16  # bytes; what is smaller costs more to send than it frees


@contextmanager
def activations_in_host_memory() -> Iterator[None]:
    """Keep what autograd saves within the block in host memory, and bring each tensor back when backward asks for it.

    Weights stay where they are: :func:`torch.autograd.graph.save_on_cpu` would copy them too, and under FSDP2 those of
    every layer that is gathered. Under gradient checkpointing the inputs of the layers are nearly all that is saved.
    """

    def pack(saved: Tensor) -> tuple[torch.device, Tensor] | Tensor:
        if not _worth_sending(saved):
            return saved
        kept = torch.empty_like(saved, device="cpu", pin_memory=saved.device.type == "cuda")
        kept.copy_(saved, non_blocking=True)  # of one stream: backward reads it after this
        return saved.device, kept

    def unpack(packed: tuple[torch.device, Tensor] | Tensor) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, kept = packed
        return kept.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _worth_sending(tensor: Tensor) -> bool:
    """Return whether a copy of a tensor frees memory: it is no weight, nor repeats what its memory holds once."""
    size = tensor.numel() * tensor.element_size()
    if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
        return False
    return LEAST <= size <= tensor.untyped_storage().nbytes()
