"""Statistics of dense logits by a row kernel: no copy of the logits, and one new tensor for their gradient.

Rows are read where they are, also those of a shifted view such as ``logits[:, :-1]``, and ignored rows are left out
block by block. Forward makes the statistics; backward makes the softmax of a block once more and writes the gradient
of that block.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.ops.backend import Backend, choose_kernel
from deft_lightning.ops.torch_rows import RowKernel, TorchRows, Transform
from deft_lightning.tokens import TokenStats

# Elements of a block on the CPU, or twice that where it is then the only one: its softmax is kept for backward.
# Blocks of 2^18, 2^19 and 2^20 took 79, 74 and 78 ms at V = 8192, and 9.5, 8.8 and 11.4 ms at V = 1024 (2048 tokens).
BLOCK_CPU = 1 << 19
# Elements of a block on CUDA: two float32 buffers of it are 256 MiB.
BLOCK_CUDA = 1 << 25


class _Rows:
    """Rows of ``(..., V)`` logits, read by their places without a copy of all of them.

    Args:
        logits: Shape ``(..., V)``, without a graph.
        at: Places of the rows that are wanted, shape ``(n,)``; None for all of them in order.
    """

    def __init__(self, logits: Tensor, at: Tensor | None) -> None:
        self.matrix, places = _as_matrix(logits)
        self._at = at if places is None else places if at is None else places[at]
        self._scratch: Tensor | None = None

    def __len__(self) -> int:
        return len(self.matrix if self._at is None else self._at)

    def __getitem__(self, block: slice) -> Tensor:
        """Return rows, to be read before others are asked for."""
        if self._at is None:
            return self.matrix[block]
        at = self._at[block]
        if self._scratch is None or len(self._scratch) < len(at):
            self._scratch = self.matrix.new_empty((len(at), self.matrix.shape[1]))
        return torch.index_select(self.matrix, 0, at, out=self._scratch[: len(at)])


def _as_matrix(logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return logits as ``(rows, V)``, and the places of theirs among the rows where those are more."""
    vocabulary, sizes, strides = logits.shape[-1], logits.shape[:-1], logits.stride()[:-1]
    if logits.is_contiguous():
        return logits.view(-1, vocabulary), None
    moving = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size > 1]
    step = min((stride for _, stride in moving), default=0)
    if logits.stride(-1) != 1 or step < vocabulary or any(stride % step for _, stride in moving):
        return logits.reshape(-1, vocabulary), None
    # They may lie in another order, and others between them: behind each sequence of a view that is shifted.
    count = 1 + sum((size - 1) * stride // step for size, stride in moving)
    matrix = logits.as_strided((count, vocabulary), (step, 1), logits.storage_offset())
    if all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(moving)):
        return matrix, None
    places = torch.zeros((), dtype=torch.int64, device=logits.device)
    for size, stride in zip(sizes, strides, strict=True):
        places = places.unsqueeze(-1) + torch.arange(size, device=logits.device) * (stride // step)
    return matrix, places.flatten()


class _DenseStats(torch.autograd.Function):
    """Differentiable are ``log p`` and the KL to a reference; backward takes their derivatives by the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, at: Tensor | None, reference: Tensor | None, topk: int, kernel: str
    ) -> tuple[Tensor | None, ...]:
        blocks = _Blocks(logits, targets, at, reference, kernel)
        stats = blocks.statistics(topk)
        ctx.mark_non_differentiable(*(field for field in stats[1:-1] if field is not None))
        ctx.save_for_backward(logits, targets, at, reference, *stats[:4])
        ctx.set_materialize_grads(False)
        ctx.kernel, ctx.seen = kernel, blocks.seen()
        return tuple(stats)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        logits, targets, at, reference, *fields = ctx.saved_tensors
        slope, pull = grads[0], None if reference is None else grads[-1]
        if slope is None:
            slope = torch.zeros_like(fields[0])
        seen, ctx.seen = ctx.seen, None  # used up: a second backward sees the logits again
        blocks = _Blocks(logits, targets, at, reference, ctx.kernel)
        return blocks.gradient(TokenStats(*fields), slope, pull, seen), None, None, None, None, None


class _Blocks:
    """The rows of a call, in blocks that a kernel takes at once; of no rows, one empty block.

    Args:
        logits: Shape ``(..., V)``.
        targets: Of the rows that are wanted, shape ``(n,)``.
        at: Their places; None for all rows.
        reference: Logits of the reference, in the shape of ``logits``.
        kernel: ``torch`` or ``triton``.
    """

    def __init__(
        self, logits: Tensor, targets: Tensor, at: Tensor | None, reference: Tensor | None, kernel: str
    ) -> None:
        self._logits, self._targets, self._at, self._triton = logits, targets, at, kernel == "triton"
        self._rows = _Rows(logits, at)
        self._reference = None if reference is None else _Rows(reference, at)
        self._kernels: list[RowKernel] = []
        n = len(targets)
        # Triton needs no buffers: rows that are all wanted are one block.
        vocabulary, budget = max(logits.shape[-1], 1), BLOCK_CPU if logits.device.type == "cpu" else BLOCK_CUDA
        whole = (self._triton and at is None) or n * vocabulary <= 2 * budget
        step = max(1, n if whole else budget // vocabulary)
        self._places = [slice(i, min(i + step, n)) for i in range(0, max(n, 1), step)]

    def _kernel(self, block: slice, topk: int = 0) -> RowKernel:
        like, transform = self._rows.matrix, Transform(topk=topk)
        if self._triton:
            from deft_lightning.ops.triton_rows import TritonRows

            return TritonRows(like[: block.stop - block.start], transform)
        return TorchRows(like, transform, block.stop - block.start, self._reference is not None, keep=True)

    def statistics(self, topk: int) -> TokenStats:
        """Return the statistics of all rows."""
        parts = []
        for block in self._places:
            if self._triton or not self._kernels:
                self._kernels.append(self._kernel(block, topk))
            beside = None if self._reference is None else self._reference[block]
            parts.append(self._kernels[-1].statistics(self._rows[block], self._targets[block], beside))
        return TokenStats.joined(parts)

    def seen(self) -> list[RowKernel] | None:
        """Return kernels that can make the gradient without seeing the logits again; None where that costs memory."""
        if self._triton:
            return self._kernels  # a maximum and a sum per row
        if len(self._places) > 1 or self._logits.device.type != "cpu":
            return None
        for kernel in self._kernels:
            cast("TorchRows", kernel).settle()
        return self._kernels

    def gradient(self, stats: TokenStats, slope: Tensor, pull: Tensor | None, seen: list[RowKernel] | None) -> Tensor:
        """Return ``slope * d(log p)/d(logits) + pull * d(reference_kl)/d(logits)``, 0 in rows that are not wanted."""
        like, at = self._logits, self._at
        found = like.new_empty(like.shape) if at is None else like.new_zeros(like.shape)
        flat = found.view(-1, like.shape[-1])
        scratch = None if at is None else flat.new_empty((self._places[0].stop, flat.shape[1]))
        if self._triton and seen is None:
            self.statistics(0)
            seen = self._kernels
        one = self._kernel(self._places[0]) if seen is None else seen[0]
        for number, block in enumerate(self._places):
            out = flat[block] if scratch is None else scratch[: block.stop - block.start]
            if self._triton and seen is not None:
                one = seen[number]
                out.copy_(self._rows[block])
            elif seen is None:
                cast("TorchRows", one).predict(
                    self._rows[block], None if self._reference is None else self._reference[block]
                )
            part = stats if len(self._places) == 1 else stats.select(block)
            one.gradient_(out, self._targets[block], part, slope[block], None if pull is None else pull[block])
            if at is not None:
                flat.index_copy_(0, at[block], out)
        return found


def dense_stats(
    logits: Tensor, targets: Tensor, at: Tensor | None, topk: int = 0, reference: Tensor | None = None,
    backend: Backend = "auto",
) -> TokenStats:  # fmt: skip
    """Return the statistics of rows of logits; ``log_prob`` and ``reference_kl`` are differentiable, once.

    Args:
        logits: Shape ``(..., V)``, any floating dtype and layout.
        targets: Integers in ``[0, V)`` of the rows that are wanted, shape ``(n,)``.
        at: Places of these rows among all, counted in order, shape ``(n,)``; None where all are wanted.
        topk: How many largest probabilities to take the entropy of; 0 for none.
        reference: Logits of a reference model, in the shape of ``logits``, detached.
        backend: ``torch``, ``triton``, or ``auto``: Triton on CUDA where it is installed.

    Returns:
        Statistics of shape ``(n,)``, float32 (float64 for float64 logits).

    Raises:
        UserError: Shapes that do not fit, or a backend that cannot run on these tensors.
    """
    if (at is None and len(targets) != logits.shape[:-1].numel()) or (
        reference is not None and reference.shape != logits.shape
    ):
        beside = "" if reference is None else f", reference_logits of shape {tuple(reference.shape)}"
        raise UserError(
            f"dense logits: logits of shape {tuple(logits.shape)} do not fit {len(targets)} targets{beside}"
        )
    kernel = choose_kernel(backend, logits.device.type, logits.dtype)
    if reference is not None or not len(targets):
        kernel = "torch"  # the kernels in Triton know one head, and take at least one row
    fields = _DenseStats.apply(logits, targets, at, reference, topk, kernel)
    return TokenStats(*cast("tuple[Any, ...]", fields))
