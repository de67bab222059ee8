"""Whether the weights of a model fit into the memory that is free, before anything is built."""

from __future__ import annotations

from pathlib import Path

import torch

from deft_lightning.annotations import ModelConfig
from deft_lightning.errors import UserError
from deft_lightning.models.quantized import Quantization
from deft_lightning.models.quantized_shape import quantize_shapes


def check_memory(
    config: ModelConfig,
    dtype: torch.dtype,
    where: str,
    option: str,
    trust: bool = False,
    quantization: Quantization | None = None,
) -> None:
    """Refuse a model whose weights do not fit into the memory that is free.

    Its shapes are built on the meta device, where weights hold nothing.

    Args:
        config: transformers' config object.
        dtype: Of the weights.
        where: What is to be built, for the error.
        option: Option that names it.
        trust: Code of the model's own may run.
        quantization: Of the linear layers but the head, None where they are not quantised.
    """
    from transformers import AutoModelForCausalLM

    free = available_memory()
    if free is None or torch.get_default_device().type == "meta":
        return
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
            if quantization is not None:
                quantize_shapes(model, quantization, dtype)
    except Exception:  # some cannot be built without values; what else is wrong is told by the load that follows
        return
    # Some keep a mask of positions times positions beside their weights.
    needed = sum(t.numel() * t.element_size() for part in (model.parameters(), model.buffers()) for t in part)
    if needed > free:
        stored = quantization or str(dtype).removeprefix("torch.")
        raise UserError(
            f"{where}: its weights need {size_of(needed)} of memory in {stored},"
            f" {size_of(free)} are available; choose a smaller model ({option}), --model.dtype bfloat16, or a machine"
            " with more memory"
        )


def available_memory() -> int | None:
    """Return the bytes this process may still use: what the machine has free, or its control group; None if unknown."""
    free = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) << 10)
    except (OSError, ValueError, IndexError):
        pass
    groups = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            allowed, taken = (int((groups / name).read_text(encoding="ascii")) for name in (limit, used))
        except (OSError, ValueError):  # there is no such group, or "max"
            continue
        free.append(max(allowed - taken, 0))
    return min(free) if free else None


def size_of(count: int) -> str:
    """Return a number of bytes in words."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"
