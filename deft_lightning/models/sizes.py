"""What a config asks for, before anything is built: sizes that mean something, and weights that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from deft_lightning.errors import UserError

# Sizes that have to be whole numbers above zero, under the names of the families.
SIZES = frozenset({
    "hidden_size", "d_model", "n_embd", "intermediate_size", "vocab_size", "num_hidden_layers", "n_layer", "n_layers",
    "num_layers", "num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "n_positions",
})  # fmt: skip
LARGEST = 1 << 31
# What a model has a module, or a list entry, for each of: the deepest have some hundreds of layers, 16,384 experts.
MANY = {"layer": 2_000, "layers": 2_000, "experts": 100_000}


def check_sizes(settings: Mapping[str, Any], where: str, option: str) -> None:
    """Refuse sizes of a config that no model has, at any depth.

    Args:
        settings: The config as plain values.
        where: What the config is of, for the error.
        option: Option that names it.
    """
    for path, value in _leaves(settings):
        name = path.rpartition(".")[2]
        values = value if isinstance(value, list) else [value]
        if name in SIZES:
            wrong = next((v for v in values if v is not None and (type(v) is not int or v < 1)), None)
            if wrong is not None:
                raise UserError(f"{where}{path} {wrong!r} is no whole number above zero ({option})")
        bound = MANY.get(name.rpartition("_")[2], LARGEST if name in SIZES else None)
        if bound is None or name.endswith("per_layer"):
            continue
        for number in values:
            if type(number) is int and abs(number) > bound:
                raise UserError(f"{where}{path} {number:,} is more than any model has, {bound:,} at most ({option})")


def _leaves(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        here = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping):
            yield from _leaves(value, here)
        else:
            yield here, value


def check_memory(config: Any, dtype: torch.dtype, where: str, option: str, trust: bool = False) -> None:
    """Refuse a model whose weights do not fit into the memory that is free.

    Its shapes are built on the meta device, where weights hold nothing.

    Args:
        config: transformers' config object.
        dtype: Of the weights.
        where: What is to be built, for the error.
        option: Option that names it.
        trust: Code of the model's own may run.
    """
    from transformers import AutoModelForCausalLM

    free = available_memory()
    if free is None or torch.get_default_device().type == "meta":
        return
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    except Exception:  # some cannot be built without values; what else is wrong is told by the load that follows
        return
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    if needed > free:
        raise UserError(
            f"{where}: its weights need {_size(needed)} of memory in {str(dtype).removeprefix('torch.')}, {_size(free)}"
            f" are available; choose a smaller model ({option}), --model.dtype bfloat16, or a machine with more memory"
        )


def available_memory() -> int | None:
    """Return the bytes this process may still use: what the machine has free, or its control group; None if unknown."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) << 10)
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
        found.append(max(allowed - taken, 0))
    return min(found) if found else None


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
