"""The head of a reference model beside the one that is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ReferenceHead(NamedTuple):
    """The head of a reference model and what it sees of the same tokens; nothing of it is trained.

    Scale and soft-capping are those of the head that is trained.

    Attributes:
        hidden: Shape ``(N, D)``.
        weight: Shape ``(V, D)``.
        bias: Shape ``(V,)``.
        low: Low-rank update of the product, shape ``(N, r)``.
        up: Its other factor, shape ``(V, r)``.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    low: Tensor | None = None
    up: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> ReferenceHead:
        """Return it with ``function`` applied to every tensor that is there."""
        found: Any = (None if tensor is None else function(tensor) for tensor in self)
        return ReferenceHead(*found)


def head_product(head: ReferenceHead, piece: slice, out: Tensor) -> Tensor:
    """Write the product of a chunk of tokens into ``out``, and return it."""
    rows, weight = head.hidden[piece], head.weight.t()
    if head.bias is None:
        torch.mm(rows, weight, out=out)
    else:
        torch.addmm(head.bias, rows, weight, out=out)
    if head.low is not None and head.up is not None:
        out.addmm_(head.low[piece], head.up.t())
    return out
