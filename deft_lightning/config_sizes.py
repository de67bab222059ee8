"""Sizes in the config of a stranger's model that mean something, looked at before anything is made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deft_lightning.annotations import Record
from deft_lightning.errors import UserError

# Sizes that have to be whole numbers above zero, under the names of the families.
SIZES = frozenset({
    "hidden_size", "d_model", "n_embd", "intermediate_size", "vocab_size", "num_hidden_layers", "n_layer", "n_layers",
    "num_layers", "num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "n_positions",
})  # fmt: skip
LARGEST = 1 << 31
# What a model has a module, or a list entry, for each of: the deepest have some hundreds of layers, 16,384 experts.
MANY = {"layer": 2_000, "layers": 2_000, "experts": 100_000, "labels": 1_000_000}


def check_sizes(settings: Record, where: str, option: str) -> None:
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
                raise UserError(f"{where}{path} {wrong!r} is not a whole number above zero ({option})")
        bound = MANY.get(name.rpartition("_")[2], LARGEST if name in SIZES else None)
        if bound is None or name.endswith("per_layer"):
            continue
        for number in values:
            if type(number) is int and abs(number) > bound:
                raise UserError(f"{where}{path} {number:,} is more than any model has, {bound:,} at most ({option})")


def _leaves(settings: Record, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        here = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping):
            yield from _leaves(value, here)
        else:
            yield here, value
