"""The fused head: chunks of tokens through three matrix products, with everything between them in a row kernel.

One pass over chunks of tokens does three matrix products (logits, dX, dW) whatever the objective: within a chunk the
statistics give the loss and, by autograd over ``(n,)`` vectors, the gate; then ``gate * (pi - onehot)`` replaces the
logits. Objectives that need the whole batch first (``needs_batch``) cost a second product for the logits of all chunks
but the last one, which is still there.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from deft_lightning.functional import LossFn, TokenStats, accumulation_dtype
from deft_lightning.ops.buffers import give_back, row_buffer
from deft_lightning.ops.columns import AllColumns, ColumnSums
from deft_lightning.ops.float16 import range_of
from deft_lightning.ops.gradient import WeightGradient
from deft_lightning.ops.plan import CallShape, Inputs, Plan
from deft_lightning.ops.reference import ReferenceHead, head_product


class Gradients(NamedTuple):
    """Gradients of the summed loss, before backward scales them; None where nobody asked."""

    hidden: Tensor | None
    weight: WeightGradient | None
    bias: Tensor | None
    low: Tensor | None
    up: WeightGradient | None

    def scaled(self, upstream: Tensor, inputs: Inputs) -> tuple[Tensor | None, ...]:
        """Return the gradients times the upstream scalar, each rounded once, to the dtype of its input."""

        def scale(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
            return None if gradient is None or like is None else (gradient.to(upstream.dtype) * upstream).to(like.dtype)

        return (
            scale(self.hidden, inputs.hidden),
            None if self.weight is None else self.weight.finish(upstream),
            scale(self.bias, inputs.bias),
            scale(self.low, inputs.low),
            None if self.up is None else self.up.finish(upstream),
        )


class _Chunks:
    """Products of one call, chunk by chunk, in one buffer, which is given back at the end of the ``with``."""

    def __init__(self, inputs: Inputs, plan: Plan, trained: bool) -> None:
        self.inputs, self.topk, dtype = inputs, plan.transform.topk, inputs.hidden.dtype
        self._prediction_sum = plan.prediction_sum
        n, vocabulary = len(inputs.hidden), len(inputs.weight)
        narrow = trained and inputs.weight.dtype == dtype
        shape = CallShape(n, inputs.hidden.shape[1], vocabulary, dtype, inputs.hidden.is_cpu, narrow)
        size = plan.chunk(shape)
        self.pieces = [slice(i, min(i + size, n)) for i in range(0, n, size)]
        # Inside a custom Function autocast does not reach the products; a weight is cast here, its gradient is not.
        self.weight = inputs.weight.to(dtype)
        self._bias = None if inputs.bias is None else inputs.bias.to(dtype)
        self.up = None if inputs.up is None else inputs.up.to(dtype)
        self.buffer = row_buffer(inputs.hidden, size, vocabulary)
        self._reference = plan.reference
        self._reference_buffer = None if plan.reference is None else row_buffer(self.buffer, size, vocabulary)
        self.kernel = plan.rows(self.buffer)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Give the buffer back; products are not to be looked at any longer."""
        give_back(self.buffer)
        del self.buffer  # an error that is held holds this object

    def product(self, piece: slice, there: bool = False) -> Tensor:
        """Return the product of a chunk, and make that of the reference beside it; ``there``: it was made last."""
        out = self.buffer[: piece.stop - piece.start]
        if there:
            return out
        reference, beside = self._reference, self._reference_buffer
        if reference is not None and beside is not None:
            head_product(reference, piece, beside[: len(out)])
        own = ReferenceHead(self.inputs.hidden, self.weight, self._bias, self.inputs.low, self.up)
        return head_product(own, piece, out)

    def blocks(self, piece: slice) -> list[tuple[slice, slice]]:
        """Return the rows of a chunk that the kernel takes at once: their place in the chunk, and among all tokens."""
        n, step, start = piece.stop - piece.start, self.kernel.block, piece.start
        inside = [slice(i, min(i + step, n)) for i in range(0, n, step)]
        return [(block, slice(start + block.start, start + block.stop)) for block in inside]

    def block_statistics(self, product: Tensor, block: slice, at: slice, seen: bool = False) -> TokenStats:
        """Return statistics of a block of a chunk; its predictions are added up once, where that is asked for."""
        beside = self._reference_buffer
        reference = None if beside is None else beside[block]
        stats = self.kernel.statistics(product[block], self.inputs.targets[at], reference)
        if self._prediction_sum is not None and not seen:
            self._prediction_sum += self.kernel.prediction_sum(product[block])
        return stats

    def statistics(self) -> TokenStats:
        """Return statistics of all tokens, nothing else."""
        parts = []
        for piece in self.pieces:
            product = self.product(piece)
            parts += [self.block_statistics(product, b, at) for b, at in self.blocks(piece)]
        return self.concatenate(parts)

    def concatenate(self, parts: list[TokenStats]) -> TokenStats:
        """Return the statistics of several blocks as one; of none, empty ones."""
        found = concatenate(parts, self.inputs.hidden, self.topk)
        if parts or self._reference is None:
            return found
        return found._replace(reference_kl=found.log_prob.clone())


def concatenate(parts: list[TokenStats], like: Tensor, topk: int) -> TokenStats:
    """Return the statistics of several blocks as one; of none, empty ones."""
    if not parts:
        empty = like.new_zeros((0,), dtype=accumulation_dtype(like.dtype))
        extra = empty.clone() if topk else None
        return TokenStats(empty, empty.clone(), empty.clone(), empty.bool(), extra, empty.long())
    columns = ([field for field in column if field is not None] for column in zip(*parts, strict=True))
    found: Any = (torch.cat(column) if column else None for column in columns)
    return TokenStats(*found)


class _Slopes(NamedTuple):
    """Derivatives of the loss of each token: by ``log p``, and by the KL to a reference where it counts."""

    slope: Tensor
    pull: Tensor | None

    def select(self, at: slice) -> _Slopes:
        return _Slopes(self.slope[at], None if self.pull is None else self.pull[at])

    def times(self, factor: Tensor) -> _Slopes:
        return _Slopes(self.slope * factor, None if self.pull is None else self.pull * factor)


def _value_and_slopes(objective: LossFn, stats: TokenStats) -> tuple[Tensor, _Slopes]:
    """Return the loss per token and its derivatives, from detached statistics."""
    with torch.enable_grad():
        log_prob = stats.log_prob.detach().requires_grad_()
        if stats.reference_kl is None:
            loss = objective(stats._replace(log_prob=log_prob))
            (slope,) = torch.autograd.grad(loss.sum(), log_prob)
            return loss.detach(), _Slopes(slope, None)
        divergence = stats.reference_kl.detach().requires_grad_()
        loss = objective(stats._replace(log_prob=log_prob, reference_kl=divergence))
        slope, pull = torch.autograd.grad(loss.sum(), (log_prob, divergence), allow_unused=True)
    return loss.detach(), _Slopes(torch.zeros_like(log_prob) if slope is None else slope, pull)


def statistics(inputs: Inputs, plan: Plan) -> TokenStats:
    """Return statistics of all tokens: one product, no gradient buffers."""
    with torch.autocast(inputs.hidden.device.type, enabled=False), _Chunks(inputs, plan, trained=False) as chunks:
        return chunks.statistics()


def loss_and_gradients(inputs: Inputs, plan: Plan, wanted: tuple[bool, ...]) -> tuple[Tensor, TokenStats, Gradients]:
    """Return the loss per token, statistics, and the gradients of the summed loss.

    Args:
        inputs: Tensors of the head.
        plan: Its options, with an objective.
        wanted: Whether to compute the gradient of hidden, weight, bias, low and up.
    """
    assert plan.objective is not None
    dtype = inputs.hidden.dtype
    with torch.autocast(inputs.hidden.device.type, enabled=False), _Chunks(inputs, plan, wanted[1]) as chunks:
        hidden, weight, bias, low, up = (
            tensor if want else None for tensor, want in zip(inputs[:5], wanted, strict=True)
        )
        count, half = len(chunks.pieces), dtype == torch.float16
        kept = torch.float32 if half else dtype
        found = Gradients(
            None if hidden is None else torch.empty_like(hidden, dtype=kept),
            None if weight is None else WeightGradient(weight, dtype, count),
            None if bias is None else torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32)),
            None if low is None else torch.empty_like(low, dtype=kept),
            None if up is None else WeightGradient(up, dtype, count),
        )
        whole: TokenStats | None = None
        pieces = chunks.pieces
        if plan.needs_batch:
            whole, pieces = chunks.statistics(), pieces[::-1]
            known = plan.context._replace(weight=inputs.token_weight)
            whole_loss, whole_slopes = _value_and_slopes(plan.objective, whole.within(known))
        losses: list[Tensor] = []
        parts: list[TokenStats] = []
        inverse: Tensor | None = None
        sums: ColumnSums | None = None
        if plan.sparsity is not None and plan.reference is None and not half and any(wanted):
            sums = ColumnSums(chunks.buffer, accumulation_dtype(dtype), plan.sparsity)
        for place, piece in enumerate(pieces):
            product = chunks.product(piece, there=whole is not None and place == 0)
            for block, at in chunks.blocks(piece):
                if whole is None:
                    stats = chunks.block_statistics(product, block, at)
                    known = plan.context._replace(weight=inputs.token_weight).select(at)
                    loss, slopes = _value_and_slopes(plan.objective, stats.within(known))
                    losses.append(loss)
                    parts.append(stats)
                else:
                    stats = chunks.block_statistics(product, block, at, seen=True)
                    slopes = whole_slopes.select(at)
                if inputs.token_weight is not None:
                    slopes = slopes.times(inputs.token_weight[at])
                if half:  # its kernel takes a chunk at once
                    scale = range_of(slopes.slope, slopes.pull)
                    slopes, inverse = slopes.times(scale), 1 / scale
                chunks.kernel.gradient_(product[block], inputs.targets[at], stats, *slopes, sums)
            few = None if sums is None else sums.choose(product, inputs.targets[piece])
            by_logits = few or AllColumns(product, inverse)
            for gradient, factor in ((found.hidden, chunks.weight), (found.low, chunks.up)):
                if gradient is not None and factor is not None:
                    by_logits.multiply(factor, gradient[piece])
            for summed, rows in ((found.weight, inputs.hidden), (found.up, inputs.low)):
                if summed is not None and rows is not None:
                    by_logits.add_to(summed, rows[piece])
            if found.bias is not None:
                # By blocks: on a CPU a sum in another dtype makes a copy first.
                for block, _ in chunks.blocks(piece):
                    total = product[block].sum(0, dtype=found.bias.dtype)
                    found.bias.add_(total if inverse is None else total * inverse)
        if whole is not None:
            return whole_loss, whole, found
        stats = chunks.concatenate(parts)
        return torch.cat(losses) if losses else stats.log_prob, stats, found
