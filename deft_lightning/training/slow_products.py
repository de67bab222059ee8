"""Matrix products that a processor computes slowly in bfloat16, since it has no instructions for them."""

from __future__ import annotations

import time

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

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
    """Warn where a large model on a CPU computes in bfloat16, and the processor is slow in that.

    Args:
        model: Where it trains.
        precision: Lightning's name; `bf16-mixed` computes in bfloat16 whatever the weights are in.
    """
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
