"""A model over many ranks: sharded with FSDP2, its weights handed out by rank 0."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deft_lightning.annotations import CausalLM, State
from deft_lightning.errors import UserError
from deft_lightning.models.head import base_causal_lm


@dataclass(frozen=True)
class Sharding:
    """How a model is shared out.

    Attributes:
        mesh: Device mesh: one dimension to shard over, or two, of which the first holds copies (hybrid sharding).
        device: Of this rank.
        low_precision: Gather weights and compute in bfloat16, reduce gradients in float32; the shares stay as they are.
        cpu_offload: Keep shares, gradients and optimizer state in host memory; a layer's weights are on the device
            while it computes.
    """

    mesh: Any
    device: torch.device
    low_precision: bool = False
    cpu_offload: bool = False


def layers_of(model: CausalLM) -> nn.ModuleList:
    """Return the stack of layers of a model's body.

    Raises:
        UserError: It cannot be found.
    """
    causal = base_causal_lm(model)
    stacks = [m for m in causal.base_model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not stacks:
        raise UserError(f"{type(causal).__name__}: its layers cannot be found (--model.compile, --trainer.strategy)")
    return stacks[0]


def build_sharded(build: Callable[[], Any], sharding: Sharding) -> CausalLM:
    """Build a model of which every rank holds a share.

    Rank 0 builds it in host memory; the others know its shapes alone. Each layer is a unit of its own, what is left
    (embedding, head, final norm) the root's, so that tied weights stay tied.

    Args:
        build: Builds the model; called under the ``meta`` device as well, where weights hold nothing.
        sharding: How it is shared out.

    Raises:
        UserError: The model has a tensor that is neither a weight nor a buffer, or a tied embedding beside adapters.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    full_model = build() if dist.get_rank() == 0 else None
    with torch.device("meta"):
        model = build()
    head, embedding = base_causal_lm(model).get_output_embeddings(), base_causal_lm(model).get_input_embeddings()
    if hasattr(head, "modules_to_save") and head.weight is embedding.weight:
        raise UserError(
            "--trainer.strategy fsdp2 cannot shard a tied embedding that is trained whole beside adapters"
            " (--model.add_tokens, --model.resize_vocabulary, --model.lora.embeddings); use --trainer.strategy ddp"
        )
    _share_out(model, sharding)
    set_model_state_dict(
        model,
        {} if full_model is None else full_model.state_dict(),
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=full_model is not None),
    )
    _hand_out_buffers(model, full_model)
    move_buffers(model, sharding.device)
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise UserError(
                    f"{type(base_causal_lm(model)).__name__}: {name}.{attribute} is a tensor that cannot be "
                    "sent to other ranks; use --trainer.strategy ddp"
                )
    return model


def _share_out(model: CausalLM, sharding: Sharding) -> None:
    """Share a model on the meta device out over all ranks; its weights hold nothing yet.

    Buffers are where weights are: torch hands a state dict out to one device alone, and those that are saved are in it.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    low, device = sharding.low_precision, sharding.device
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if low else MixedPrecisionPolicy()
    offload = CPUOffloadPolicy(pin_memory=device.type != "cpu") if sharding.cpu_offload else OffloadPolicy()
    for layer in layers_of(model):
        fully_shard(layer, mesh=sharding.mesh, mp_policy=precision, offload_policy=offload)
    fully_shard(model, mesh=sharding.mesh, mp_policy=precision, offload_policy=offload)
    model.to_empty(device="cpu" if sharding.cpu_offload else device)
    base_causal_lm(model).tie_weights()


@torch.no_grad()
def sharded_copy(model: CausalLM, build: Callable[[], Any], sharding: Sharding) -> CausalLM:
    """Return a frozen copy of a model that :func:`build_sharded` has made; every rank copies its own share.

    Args:
        model: The model.
        build: As for :func:`build_sharded`; called under the ``meta`` device alone.
        sharding: As there.
    """
    with torch.device("meta"):
        copied: CausalLM = build()
    copied.requires_grad_(False)
    _share_out(copied, sharding)
    for (name, own), (other_name, other) in zip(copied.named_parameters(), model.named_parameters(), strict=True):
        assert name == other_name
        own.to_local().copy_(other.to_local())
    move_buffers(copied, sharding.device)
    for own, other in zip(copied.buffers(), model.buffers(), strict=True):
        own.copy_(other)
    return copied


def shapes_of(model: nn.Module) -> CausalLM:
    """Return a copy of a model whose weights and buffers hold nothing, adapters of its own included."""
    empty: dict[int, Tensor] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for weight in model.parameters():
        empty[id(weight)] = nn.Parameter(weight.detach().to("meta"), weight.requires_grad)
    return copy.deepcopy(model, empty)


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move buffers and leave weights: a layer whose weights wait in host memory finds its buffers where it computes."""
    moved: dict[Tensor, Tensor] = {}  # modules may share one
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer not in moved:
                moved[buffer] = buffer.to(device)
            setattr(module, name, moved[buffer])


@contextmanager
def buffers_beside_weights(model: nn.Module, sharding: Sharding) -> Iterator[None]:
    """Keep buffers where weights are, so that a state dict can be handed out to all of them."""
    if not sharding.cpu_offload:
        yield
        return
    move_buffers(model, torch.device("cpu"))
    try:
        yield
    finally:
        move_buffers(model, sharding.device)


def _hand_out_buffers(model: CausalLM, full_model: CausalLM | None) -> None:
    """Give every rank the buffers of rank 0: those that are not saved, such as rotary frequencies, too."""
    source = {} if full_model is None else dict(full_model.named_buffers())
    for name, buffer in model.named_buffers():
        if full_model is not None:
            buffer.copy_(source[name])
        dist.broadcast(buffer, src=0)


def is_sharded(model: CausalLM) -> bool:
    """Return whether this rank holds a share of the model only."""
    return any(hasattr(parameter, "placements") for parameter in model.parameters())


def gathered(model: CausalLM) -> dict[str, Tensor]:
    """Return the whole weights in host memory on rank 0, nothing on the others; every rank has to call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: State = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return state
