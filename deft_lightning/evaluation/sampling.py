"""Sampling as an arg-max: noise that is a function of (seed, id, sample, position, token) and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deft_lightning.hashing import key

# SplitMix64 (Steele, Lea, Flood 2014): increment and multipliers, as the signed numbers that torch counts in.
GAMMA, FIRST, SECOND = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def splitmix(state: Tensor) -> Tensor:
    """Return the output of SplitMix64 for states, int64 of any shape; products wrap around as the generator wants."""
    x = state.clone()
    for shift, factor in ((30, FIRST), (27, SECOND), (31, 1)):
        zeros_in = (x >> shift).bitwise_and_((1 << (64 - shift)) - 1)  # torch shifts the sign in
        x.bitwise_xor_(zeros_in).mul_(factor)
    return x


def gumbel(keys: Tensor, position: int | Tensor, size: int) -> Tensor:
    r"""Draw ``-log(-log u)`` for every token of a vocabulary, from the stream of each row at a position.

    Row i at position t has the SplitMix64 stream that starts from output t of the stream of ``keys[i]``; token v takes
    its v-th number. Only integers are computed before the logarithms: every device draws the same ``u``.

    Args:
        keys: Key of each row, int64, shape ``(B,)``.
        position: Tokens generated before this one; of all rows, or of each, int64, shape ``(B,)``.
        size: V, tokens of the vocabulary.

    Returns:
        float64, shape ``(B, V)``; at most about 37.
    """
    place = torch.as_tensor(position, dtype=torch.int64, device=keys.device)
    start = splitmix(keys + (place + 1) * GAMMA).unsqueeze(1)
    bits = splitmix(start + torch.arange(1, size + 1, device=keys.device) * GAMMA)
    u = (bits >> 11).bitwise_and_((1 << 53) - 1).double().add_(0.5).mul_(2.0**-53)
    return u.log_().neg_().log_().neg_()


def stream_key(seed: int, id: str, sample: int) -> int:
    """Return the key of the stream of a sample of an example, as a signed number of 64 bits."""
    return key(seed, "sample", id, sample) % 2**64 - 2**63


class KeyedGumbel:
    """Logits processor that adds Gumbel noise: the arg-max of the sum is a draw from the softmax (Gumbel-max).

    The draw of a row does not depend on the other rows, their number or their order. What does is the rounding of the
    logits themselves: kernels add in another order for another shape, so a near tie may still fall the other way.

    Args:
        ids: Example id of each row.
        samples: Which sample of its prompt each row is.
        seed: Of all draws.
        prompt: Tokens of the padded prompts.
        device: Where the logits are.
    """

    def __init__(self, ids: Sequence[str], samples: Sequence[int], seed: int, prompt: int, device: Any) -> None:
        drawn = [stream_key(seed, id, n) for id, n in zip(ids, samples, strict=True)]
        self.keys, self.prompt = torch.tensor(drawn, dtype=torch.int64, device=device), prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores plus noise, float64, shape ``(B, V)``."""
        return gumbel(self.keys, input_ids.shape[1] - self.prompt, scores.shape[1]).add_(scores)
