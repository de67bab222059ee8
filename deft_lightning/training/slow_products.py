"""Matrix products that a device computes slowly: a CPU without instructions for bfloat16, a GPU in full float32."""

from __future__ import annotations

import time

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from deft_lightning.annotations import CausalLM

LARGE = 64 << 20  # bytes of the weights that are computed with in bfloat16, from which on it matters
SLOW = 3.0  # times as long as in float32
SIDE, ROUNDS = 256, 3  # of the products that are timed: some milliseconds


def times_as_long(dtype: torch.dtype) -> float:
    """Return how many times as long as in float32 a matrix product on this processor takes in a dtype."""

    def seconds(kind: torch.dtype) -> float:
        matrix = torch.ones(SIDE, SIDE, dtype=kind)
        spent = []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            torch.mm(matrix, matrix)
            spent.append(time.perf_counter() - begun)
        return min(spent)  # the first one is warm-up

    return seconds(dtype) / seconds(torch.float32)


def warn_of_slow_products(model: CausalLM, precision: str = "32-true") -> None:
    """Warn where a large model computes in what its device is slow in: bfloat16 on some CPUs, float32 on a GPU.

    Args:
        model: Where it trains.
        precision: Lightning's name; `bf16-mixed` computes in bfloat16 whatever the weights are in.
    """
    full = sum(weight.numel() * weight.element_size() for weight in model.parameters() if _full_float32(weight))
    if full >= LARGE and precision.startswith("32"):
        rank_zero_warn(
            "a GPU multiplies in full float32 here, several times slower than in lower precision:"
            " set --trainer.precision bf16-mixed, or call torch.set_float32_matmul_precision('high') for TF32"
        )
    mixed = precision == "bf16-mixed"
    low = [w for w in model.parameters() if w.device.type == "cpu" and (mixed or w.dtype == torch.bfloat16)]
    if sum(weight.numel() * weight.element_size() for weight in low) < LARGE:
        return
    factor = times_as_long(torch.bfloat16)
    if factor > SLOW:
        way = "--trainer.precision 32-true" if mixed else "--model.dtype float32"
        cost = "" if mixed else ", with twice the memory for the weights"
        rank_zero_warn(
            f"this processor takes {factor:.0f} times as long in bfloat16 as in float32: {way} trains faster here{cost}"
        )


def _full_float32(weight: Tensor) -> bool:
    """Return whether a GPU multiplies with a weight in float32, and not in TF32."""
    on_gpu = weight.device.type == "cuda" and weight.dtype == torch.float32
    return on_gpu and torch.get_float32_matmul_precision() == "highest"
