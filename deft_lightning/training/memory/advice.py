"""One line before the first step: what a run will take of memory, and what would take less where it does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from deft_lightning._lightning import trainer_of
from deft_lightning.data.loading.shape import BatchShape
from deft_lightning.models import LoRA, is_sharded
from deft_lightning.models.sizes import available_memory, size_of
from deft_lightning.ops.backend import choose_kernel
from deft_lightning.training.memory.estimate import MemoryEstimate, Setup, estimate
from deft_lightning.training.protocols import precision_of, shards

CHECKPOINTING = "--model.gradient_checkpointing true"
ADAPTERS = "--model.lora.r 16 --model.dtype bfloat16"
SMALL = 64 << 20  # bytes of weights; below them a CPU has room for any step, and the estimate would take longer


def tell_memory(module: Any, room: int | None = None) -> None:
    """Say what a step of a fit will take, and compare it with what its device has; nothing is changed.

    It is one of the start lines, and left out with them (``--trainer.enable_model_summary false``). A data module that
    does not say how large its batches get has none, nor has a model of less than :data:`SMALL` on a CPU.

    Args:
        module: An :class:`~deft_lightning.SFTModule` whose model is built, with a trainer.
        room: Bytes that the device has for it; None asks the device.
    """
    trainer = trainer_of(module)
    if trainer is None or trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
        return
    batch = getattr(module.prompts, "largest_batch", None)
    if batch is None or not any(isinstance(callback, ModelSummary) for callback in trainer.callbacks):
        return
    weights = sum(weight.numel() * weight.element_size() for weight in module.model.parameters())
    if room is None and weights < SMALL and trainer.strategy.root_device.type == "cpu":
        return
    # Nothing is drawn that the run would draw; what cannot be run without data does not stop it.
    with torch.random.fork_rng(devices=[]):
        try:
            need = estimate_of(module, batch)
            room = device_memory(module) if room is None else room
            if room is None or need.peak <= room:
                rank_zero_info(start_line(need, batch, room))
            else:
                rank_zero_warn(advice(need, batch, room, list(alternatives(module, batch))))
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            rank_zero_info(f"memory: no estimate for this run ({type(error).__name__}: {reason})")


def estimate_of(module: Any, batch: BatchShape, **changes: Any) -> MemoryEstimate:
    """Return the estimate of a module's fit.

    Args:
        module: With a trainer, its model built.
        batch: The largest micro-batch.
        changes: Fields of :class:`~deft_lightning.training.model_source.ModelSource` that are to be others.
    """
    model = module.model
    if changes or is_sharded(model):
        with torch.device("meta"):
            source, data = replace(module.source, **changes), module.prompts
            model = source.build(data.tokenizer, data.longest, getattr(data, "added_tokens", ()))
    return estimate(model, batch, setup_of(module))


def setup_of(module: Any) -> Setup:
    """Return how a module is trained by its trainer."""
    trainer, sharded = module.trainer, shards(module.trainer.strategy)
    device = "cuda" if trainer.strategy.root_device.type == "cuda" else "cpu"
    if sharded and (trainer.strategy.cpu_offload or trainer.strategy.offload_activations):
        raise ValueError(
            "tensors in host memory are not counted apart (--trainer.strategy.cpu_offload, offload_activations)"
        )
    reference = bool(module.objective.needs.reference)
    kernel = choose_kernel(module.head_backend, device, torch.float32)
    return Setup(
        module.optimizer_callable, precision_of(trainer), fused=module.head == "fused",
        kernel="torch" if reference else kernel,
        accumulate=trainer.accumulate_grad_batches, reference=reference or module.forgetting, device=device,
        ranks=trainer.world_size, sharded=sharded, replicate=trainer.strategy.replicate if sharded else 1,
    )  # fmt: skip


def device_memory(module: Any) -> int | None:
    """Return the bytes that the device of a module's trainer has for it; None where the system does not tell.

    On CUDA those that are free, on a CPU those that the process may still take; and the weights that are there already.
    """
    device, reference = module.trainer.strategy.root_device, module.batch_loss.reference
    models = [module.model, *([reference.model] if reference is not None and reference.frozen else [])]
    tensors = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
    own = [tensor for tensor in tensors if tensor.device == device]
    held = sum(tensor.numel() * tensor.element_size() for tensor in own if not hasattr(tensor, "placements"))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return None if free is None else free + held


def alternatives(module: Any, batch: BatchShape) -> Iterator[tuple[str, MemoryEstimate]]:
    """Yield options that would take less than the run as it is, and what it takes with them."""
    source = module.source
    checkpointing = {} if source.gradient_checkpointing else {"gradient_checkpointing": True}
    adapters = {"lora": LoRA(), "dtype": "bfloat16"} if source.lora is None and not source.given else {}
    if checkpointing:
        yield CHECKPOINTING, estimate_of(module, batch, **checkpointing)
    if batch.rows > 1:
        one = batch._replace(rows=1, supervised=max(1, batch.supervised // batch.rows))
        yield f"--data.batch_size 1 --trainer.accumulate_grad_batches {batch.rows}", estimate_of(module, one)
    if adapters:
        yield ADAPTERS, estimate_of(module, batch, **adapters)
    if adapters and checkpointing:
        yield f"{ADAPTERS} {CHECKPOINTING}", estimate_of(module, batch, **adapters, **checkpointing)
    fits = source.pretrained is not None and not source.given and source.quantization is None
    if fits and not (source.lora is not None and (source.lora.changes_base or source.lora.use_dora)):
        options = {**adapters, **checkpointing, "quantization": "nf4"}
        words = [ADAPTERS if adapters else "", "--model.quantization nf4", CHECKPOINTING if checkpointing else ""]
        yield " ".join(filter(None, words)), estimate_of(module, batch, **options)


def start_line(need: MemoryEstimate, batch: BatchShape, room: int | None) -> str:
    """Return the line of a run that fits: the peak and its parts."""
    parts = {
        "weights": need.weights, "reference": need.reference, "gradients": need.gradients,
        "optimizer": need.optimizer, "activations": need.activations, "buffers": need.buffers,
    }  # fmt: skip
    listed = ", ".join(f"{name} {size_of(size)}" for name, size in parts.items() if size)
    listed += "" if need.buffers else "; not all at a time"
    has = "" if room is None else f"; the device has {size_of(room)}"
    return f"memory: a step of {batch.rows} x {batch.length} tokens takes about {size_of(need.peak)} ({listed}){has}"


def advice(
    need: MemoryEstimate, batch: BatchShape, room: int, others: list[tuple[str, MemoryEstimate]]
) -> str:  # fmt: skip
    """Return the line of a run that does not fit: what it takes, and what it would take with other options.

    Args:
        need: What it takes.
        batch: With which batch.
        room: What the device has, in bytes.
        others: Options, and what it takes with them; what takes no less is left out, what fits stands first.
    """
    less = sorted((one for one in others if one[1].peak < need.peak), key=lambda one: one[1].peak > room)
    told = [
        f"{option} needs {size_of(other.peak)}{'' if other.peak <= room else ', too much as well'}"
        for option, other in less
    ]
    if not any(other.peak <= room for _, other in less):
        told.append("--trainer.strategy fsdp2 splits it over several devices")
    return (
        f"memory: a step of {batch.rows} x {batch.length} tokens needs about {size_of(need.peak)}, the device has"
        f" {size_of(room)}: {'; '.join(told)}"
    )
