"""Exact quantiles over the tokens of a step, however many micro-batches and ranks they are spread over."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# A float32 that is not negative is ordered as its 31 bits are. They are found 11, 10 and 10 at a time: of the tokens
# that share the bits known so far, how many have each value of the next ones says where the wanted one is.
DIGITS = ((20, 11), (10, 10), (0, 10))


class Quantiles:
    """Quantiles of quantities that are not negative, exact to the float32 in which they are kept.

    The quantile of a share ``q`` of n values is the ``ceil(q n)``-th smallest of them: a value that occurs, the
    ``inverted_cdf`` of numpy. What the ranks exchange is as large for one token as for a million: one small all-reduce
    a digit, for all quantities at once.

    Args:
        shares: In ``(0, 1]``.
    """

    def __init__(self, shares: Sequence[float] = (0.1, 0.5, 0.9)) -> None:
        self.shares = tuple(shares)
        self._parts: list[Tensor] = []

    def update(self, *values: Tensor) -> None:
        """Add the values of N tokens, one tensor ``(N,)`` a quantity.

        What is below 0, by rounding, counts as 0; what is not a number as infinite.
        """
        stacked = torch.stack([part.detach().float() for part in values]).nan_to_num(torch.inf, posinf=torch.inf)
        self._parts.append(stacked.clamp_min(0.0) + 0.0)  # adding 0 makes a negative zero a positive one

    def reset(self) -> None:
        """Forget all values."""
        self._parts = []

    def compute(self) -> list[list[float]]:
        """Return the quantiles of each quantity in the order of ``shares``; empty lists without values.

        Every rank has to call it, with at least one update, and gets the same.
        """
        bits = torch.cat(self._parts, dim=1).view(torch.int32)
        quantities, n = bits.shape
        total = _over_ranks(torch.tensor([n], device=bits.device))
        if not total:
            return [[] for _ in range(quantities)]
        wanted = [math.ceil(round(share * int(total), 9)) for share in self.shares]
        # Of each quantity and share: the bits known, and which of the tokens that have them is wanted, from 1.
        known = bits.new_zeros((quantities, len(wanted)))
        rank = torch.tensor(wanted, device=bits.device).clamp_min(1).expand(quantities, -1)
        for shift, width in DIGITS:
            alike = (bits >> (shift + width)).unsqueeze(1) == known.unsqueeze(2)
            digit = ((bits >> shift) & ((1 << width) - 1)).long().unsqueeze(1).expand(alike.shape)
            counts = _over_ranks(rank.new_zeros((*rank.shape, 1 << width)).scatter_add_(2, digit, alike.long()))
            upto = counts.cumsum(2)
            next_digit = (upto < rank.unsqueeze(2)).sum(2, keepdim=True)
            rank = rank - (upto - counts).gather(2, next_digit).squeeze(2)
            known = (known << width) | next_digit.squeeze(2).int()
        return [list(map(float, row)) for row in known.view(torch.float32).tolist()]


def _over_ranks(counts: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts)
    return counts
