"""The gradient of a weight, summed over chunks of tokens without losing what bfloat16 would round away."""

from __future__ import annotations

import torch
from torch import Tensor

from deft_lightning.tokens import accumulation_dtype

# Elements of a block of rows of dW. On the CPU the product of a block is added to the sum while it is still in cache:
# 2,000 to 8,000 rows of 896 were within 5 % of each other on one thread, 16,000 took half as long again.
BLOCK_CPU, BLOCK_CUDA = 1 << 21, 1 << 26


class WeightGradient:
    """Sum over chunks of ``product.T @ rows``, shape ``(V, D)``, in the dtype of the parameter.

    Several chunks are summed in float32: over 256 chunks a bfloat16 sum is off by 3 %, a float32 sum by the rounding of
    its parts and of the result. On CUDA the parts are not rounded; on the CPU torch gives the product of a chunk in
    bfloat16 alone. One bfloat16 chunk needs no sum and is written in the dtype of the parameter at once.

    Args:
        like: Parameter the gradient is for.
        compute: Dtype of the products.
        chunks: How many chunks will be added.
    """

    def __init__(self, like: Tensor, compute: torch.dtype, chunks: int) -> None:
        self._like, self._started = like, False
        one = chunks <= 1 and like.dtype == compute != torch.float16  # its range is too small for a sum over tokens
        self._dtype = like.dtype if one else torch.promote_types(accumulation_dtype(compute), like.dtype)
        rows, columns = like.shape
        step = max(1, (BLOCK_CPU if like.device.type == "cpu" else BLOCK_CUDA) // max(columns, 1))
        self._slices = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
        self._whole = like.new_empty(like.shape) if self._dtype == like.dtype else None
        # Blocks of their own, so that rounding to the parameter's dtype can free them one by one.
        self._blocks: list[Tensor | None] = [
            like.new_empty((s.stop - s.start, columns), dtype=self._dtype) if self._whole is None else self._whole[s]
            for s in self._slices
        ]

    def add(self, product: Tensor, rows: Tensor, inverse: Tensor | None = None) -> None:
        """Add ``product.T @ rows * inverse``; shapes ``(n, V)`` and ``(n, D)``, one dtype, and a scalar."""
        beta, scratch = float(self._started), None
        if self._whole is not None and self._dtype == product.dtype and inverse is None:
            torch.addmm(self._whole, product.t(), rows, beta=beta, out=self._whole)
            self._started = True
            return
        for piece, block in zip(self._slices, self._blocks, strict=True):
            assert block is not None
            part = product[:, piece].t()
            if inverse is not None:
                found = _wide_product(part, rows).mul_(inverse)
                block.add_(found) if self._started else block.copy_(found)
            elif product.is_cuda and self._dtype == torch.float32:
                # cuBLAS adds bfloat16 products to a float32 sum; on the CPU torch has no such product.
                torch.addmm(block, part, rows, beta=beta, out_dtype=torch.float32, out=block)
            else:
                scratch = product.new_empty(block.shape) if scratch is None else scratch
                found = torch.mm(part, rows, out=scratch[: len(block)])
                block.add_(found) if self._started else block.copy_(found)
        self._started = True

    def add_rows(self, index: Tensor, rows: Tensor, share: Tensor, rest: Tensor) -> None:
        """Add a sum that is known by some of its rows; the others are shares of one vector.

        Args:
            index: Which rows are known, ascending, shape ``(k,)``.
            rows: Shape ``(k, D)``.
            share: Of each row in the vector, 0 where the row is known; shape ``(V,)``.
            rest: The vector, shape ``(D,)``.
        """
        starts = torch.tensor([piece.start for piece in self._slices], device=index.device)
        edges = [*torch.searchsorted(index, starts).tolist(), len(index)]
        for i, (piece, block) in enumerate(zip(self._slices, self._blocks, strict=True)):
            assert block is not None
            within = slice(edges[i], edges[i + 1])
            share_of, part = share[piece].to(block.dtype), rows[within].to(block.dtype)
            torch.addr(block, share_of, rest.to(block.dtype), beta=float(self._started), out=block)
            # Indexed addition goes row by row on the CPU; these rows are all different.
            at = index[within] - piece.start
            block.index_copy_(0, at, block.index_select(0, at).add_(part) if self._started else part)
        self._started = True

    def finish(self, factor: Tensor) -> Tensor:
        """Return the sum times a scalar tensor of a wide dtype, in the dtype of the parameter; the sum is used up."""
        if not self._started:
            return torch.zeros_like(self._like)
        # A sum is usually differentiated with 1: the pass over dW is left out then. CUDA would wait for the look.
        one = factor.device.type == "cpu" and bool(factor == 1)
        if self._whole is not None and (one or self._dtype == factor.dtype):
            return self._whole if one else self._whole.mul_(factor)
        result = self._like.new_empty(self._like.shape) if self._whole is None else self._whole
        for i, piece in enumerate(self._slices):
            block = self._blocks[i]
            assert block is not None
            # The factor is not rounded to the parameter's dtype on the way.
            result[piece] = block.mul_(factor) if block.dtype == factor.dtype else block.to(factor.dtype).mul_(factor)
            self._blocks[i] = block = None
        return result


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of float16 matrices in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())
