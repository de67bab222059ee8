"""Fused linear head: hidden states to statistics, loss and gradients in chunks, never holding ``(N, V)``.

One pass over chunks of tokens does three matrix products (logits, dX, dW) whatever the objective: within a chunk the
statistics give the loss and, by autograd over ``(n,)`` vectors, the gate; then ``gate * (pi - onehot)`` replaces the
logits. Objectives that need the whole batch first (``needs_batch``) cost a second product for the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats, accumulation_dtype, topk_entropy_of

Objective = Callable[[TokenStats], Tensor]
Backend = Literal["auto", "torch"]

# Tokens a chunk: enough rows to keep the matrix products efficient, few enough that a chunk of fp32 logits over 152k
# entries stays near 300 MB on the CPU. CUDA wants at least 1024 rows to amortise the fp32 accumulation of dW.
CHUNK_CPU, CHUNK_CUDA = 512, 1024
# Elements of a block of rows for the element-wise work between the products on the CPU.
BLOCK_CPU = 1 << 21


@dataclass(frozen=True)
class _Head:
    """The fixed part of a call: everything that is not a tensor with a gradient."""

    objective: Objective | None
    softcap: float | None
    logit_scale: float
    chunk: int
    topk: int

    def transform(self, product: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return fresh logits in the accumulation dtype, and their derivative by the product."""
        z = product.to(accumulation_dtype(product.dtype), copy=True)
        if self.logit_scale != 1.0:
            z *= self.logit_scale
        if not self.softcap:
            return z, self.logit_scale
        squashed = torch.tanh(z / self.softcap)
        return self.softcap * squashed, (1 - squashed.square()) * self.logit_scale

    def statistics(self, product: Tensor, labels: Tensor) -> TokenStats:
        """Return the statistics of a chunk, block by block."""
        parts = [_statistics(self.transform(product[b])[0], labels[b], self.topk)[0] for b in _blocks(product)]
        return _concatenate(parts, product, self.topk)


def _pieces(n: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)]


def _blocks(product: Tensor) -> list[slice]:
    """Rows of a chunk whose element-wise work stays in a CPU's cache; the whole chunk elsewhere."""
    n, vocabulary = product.shape
    return _pieces(n, max(1, BLOCK_CPU // vocabulary) if product.device.type == "cpu" else max(n, 1))


def _statistics(z: Tensor, labels: Tensor, topk: int) -> tuple[TokenStats, Tensor]:
    """Statistics of logits, and their softmax; the logits are shifted in place by their maximum."""
    top, arg = z.max(dim=-1, keepdim=True)
    z -= top
    topk_entropy = topk_entropy_of(z, topk) if topk else None
    pi = torch.softmax(z, dim=-1)
    peak = pi.gather(-1, arg)
    # Without its largest entry the sum keeps its relative accuracy when the prediction is nearly certain; when it is
    # flat, 1 - tail does not, and the entry itself does.
    pi.scatter_(-1, arg, 0.0)
    tail = pi.sum(-1)
    log_sum = torch.where(tail < 0.5, -torch.log1p(-tail), -peak.squeeze(-1).log())
    rest = torch.linalg.vector_norm(pi, dim=-1).square()
    # An entry without mass (a bias of -inf) has 0 * -inf in its product: the finite minimum keeps that a zero.
    entropy = log_sum - (pi * z.clamp_min_(torch.finfo(z.dtype).min)).sum(-1)  # vecdot would autocast
    log_prob = z.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - log_sum
    pi.scatter_(-1, arg, peak)
    stats = TokenStats(log_prob, peak.squeeze(-1).square() + rest, entropy, arg.squeeze(-1) == labels, topk_entropy)
    return stats, pi


def _concatenate(parts: list[TokenStats], like: Tensor, topk: int) -> TokenStats:
    if not parts:
        empty = like.new_zeros((0,), dtype=accumulation_dtype(like.dtype))
        return TokenStats(empty, empty.clone(), empty.clone(), empty.bool(), empty.clone() if topk else None)
    columns = zip(*(part[:4] for part in parts), strict=True)
    log_prob, collision, entropy, correct = (torch.cat(column) for column in columns)
    extra = [part.topk_entropy for part in parts if part.topk_entropy is not None]
    return TokenStats(log_prob, collision, entropy, correct, torch.cat(extra) if extra else None)


def _value_and_gate(objective: Objective, stats: TokenStats) -> tuple[Tensor, Tensor]:
    """Loss per token and its derivative by log p, from detached statistics."""
    with torch.enable_grad():
        log_prob = stats.log_prob.detach().requires_grad_()
        loss = objective(stats._replace(log_prob=log_prob))
        (grad,) = torch.autograd.grad(loss.sum(), log_prob)
    return loss.detach(), grad


class _FusedHead(torch.autograd.Function):
    """Gradients are computed in forward, where the logits of a chunk exist; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, token_weight: Tensor | None,
        head: _Head,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert head.objective is not None
        pieces = _pieces(hidden.shape[0], head.chunk)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        whole_stats: TokenStats | None = None
        losses: list[Tensor] = []
        parts: list[TokenStats] = []
        gradients = any(ctx.needs_input_grad[:3])
        whole_batch = bool(getattr(head.objective, "needs_batch", False))
        if not gradients or whole_batch:
            parts = [head.statistics(linear(hidden[p], weight, bias), targets[p]) for p in pieces]
            whole_stats = _concatenate(parts, hidden, head.topk)
            if not gradients:
                return _result(ctx, head.objective(whole_stats), token_weight, whole_stats)
            loss, whole_gate = _value_and_gate(head.objective, whole_stats)
            losses.append(loss)

        wide = accumulation_dtype(weight.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias and bias is not None else None
        for piece in pieces:
            rows = hidden[piece]
            product = linear(rows, weight, bias)
            for block in _blocks(product):
                at = slice(piece.start + block.start, piece.start + block.stop)
                z, chain = head.transform(product[block])
                stats, error = _statistics(z, targets[at], head.topk)
                if whole_stats is None:
                    loss, dlogp = _value_and_gate(head.objective, stats)
                    losses.append(loss)
                    parts.append(stats)
                else:
                    dlogp = whole_gate[at]
                if token_weight is not None:
                    dlogp = dlogp * token_weight[at]
                # The target entry is dl/dlogp * (1 - p) through expm1, written last: no p - 1 cancellation.
                error.mul_(-dlogp.unsqueeze(-1))
                error.scatter_(-1, targets[at].unsqueeze(-1), (-torch.expm1(stats.log_prob) * dlogp).unsqueeze(-1))
                product[block] = error if isinstance(chain, float) and chain == 1.0 else error * chain
            if grad_hidden is not None:
                torch.mm(product, weight, out=grad_hidden[piece])
            if grad_weight is not None:
                grad_weight += product.t() @ rows
            if grad_bias is not None:
                grad_bias += product.sum(0, dtype=wide)
        stats = _concatenate(parts, hidden, head.topk)
        # dW and the bias gradient stay wide until backward has scaled them: one rounding, at the end.
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return _result(ctx, torch.cat(losses) if losses else stats.log_prob, token_weight, stats)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        upstream = grads[0]
        scaled = (
            None if grad is None else (grad.to(upstream.dtype) * upstream).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None)


def _result(ctx: Any, loss: Tensor, token_weight: Tensor | None, stats: TokenStats) -> tuple[Tensor, ...]:
    fields = tuple(field for field in stats if field is not None)
    ctx.mark_non_differentiable(*fields)
    return ((loss if token_weight is None else loss * token_weight).sum(), *fields)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str) -> None:
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1] or weight.shape[1:] != hidden.shape[1:]:
        raise UserError(
            f"linear head: expected hidden (N, D), weight (V, D), targets (N,); got {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)}, {tuple(targets.shape)}"
        )
    if backend not in ("auto", "torch"):
        raise UserError(f"linear head: unknown backend {backend!r}; known: auto, torch")


def _mirror_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast as autocast would for ``F.linear``: inside a custom Function autocast does not reach the products."""
    kind = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors]


def _scatter(stats: TokenStats, keep: Tensor) -> TokenStats:
    return stats.map(lambda field: field.new_zeros(keep.shape).masked_scatter(keep, field))


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: Objective,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> tuple[Tensor, TokenStats]:
    """Summed loss of ``softmax(cap(scale * (hidden @ weight.T + bias)))`` under any objective, without ``(N, V)``.

    Ignored tokens are dropped before the first product, so the cost scales with the supervised share.

    Args:
        hidden: Shape ``(N, D)``, already aligned with the targets (no shift happens here).
        weight: Shape ``(V, D)``.
        targets: Shape ``(N,)``, integers in ``[0, V)`` or ``ignore_index``.
        objective: Any callable from :class:`TokenStats` to per-token losses; its ``topk`` and ``needs_batch`` are read.
        bias: Shape ``(V,)``.
        token_weight: Shape ``(N,)``, factor on each token's loss and gradient; detached.
        softcap: Final soft-capping ``c * tanh(z / c)`` (Gemma 2).
        logit_scale: Factor on the logits (Cohere; Granite divides, so pass the inverse).
        ignore_index: Target value of tokens that do not count.
        backend: ``auto`` or ``torch``.

    Returns:
        The sum over supervised tokens, a float32 scalar (float64 for float64 input) differentiable in ``hidden``,
        ``weight`` and ``bias``, and the detached statistics of all N tokens, 0 where ignored.

    Raises:
        UserError: Shapes that do not fit, or an unknown backend.
    """
    _check(hidden, weight, targets, backend)
    keep = targets != ignore_index
    head = _Head(
        objective, softcap, logit_scale, CHUNK_CUDA if hidden.is_cuda else CHUNK_CPU, int(getattr(objective, "topk", 0))
    )
    rows, weight_, bias_ = _mirror_autocast(hidden[keep], weight, bias)
    kept_weight = None if token_weight is None else token_weight.detach()[keep].to(accumulation_dtype(hidden.dtype))
    total, *fields = cast(
        "tuple[Tensor, ...]", _FusedHead.apply(rows, weight_, bias_, targets[keep], kept_weight, head)
    )
    return total, _scatter(TokenStats(*fields), keep)


class _StatsHead(torch.autograd.Function):
    """Statistics with a differentiable log p: backward recomputes the logits chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head
    ) -> tuple[Tensor, ...]:
        pieces = _pieces(hidden.shape[0], head.chunk)
        parts = [head.statistics(linear(hidden[piece], weight, bias), targets[piece]) for piece in pieces]
        stats = _concatenate(parts, hidden, head.topk)
        fields = tuple(field for field in stats if field is not None)
        ctx.mark_non_differentiable(*fields[1:])
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.head = head
        return fields

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        with torch.enable_grad():
            rows, matrix = hidden.detach().requires_grad_(), weight.detach().requires_grad_(ctx.needs_input_grad[1])
            offset = None if bias is None else bias.detach().requires_grad_(ctx.needs_input_grad[2])
            loss, _ = linear_loss(
                rows, matrix, targets, lambda stats: stats.log_prob, bias=offset, token_weight=grads[0],
                softcap=ctx.head.softcap, logit_scale=ctx.head.logit_scale,
            )  # fmt: skip
        wanted = [t for t in (rows, matrix, offset) if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(loss, wanted))
        found_or_none = (next(found) if t is not None and t.requires_grad else None for t in (rows, matrix, offset))
        return (*found_or_none, None, None)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    topk: int = 0,
    backend: Backend = "auto",
) -> TokenStats:
    """Statistics of every token from hidden states, without ``(N, V)``; ``log_prob`` is differentiable.

    Args:
        hidden: Shape ``(N, D)``.
        weight: Shape ``(V, D)``.
        targets: Shape ``(N,)``, integers in ``[0, V)`` or ``ignore_index``.
        bias: Shape ``(V,)``.
        softcap: Final soft-capping.
        logit_scale: Factor on the logits.
        ignore_index: Target value of tokens that do not count.
        topk: Also the entropy of that many largest probabilities.
        backend: ``auto`` or ``torch``.

    Returns:
        Statistics of all N tokens, 0 where ignored; float32 (float64 for float64 input).
    """
    _check(hidden, weight, targets, backend)
    keep = targets != ignore_index
    head = _Head(None, softcap, logit_scale, CHUNK_CUDA if hidden.is_cuda else CHUNK_CPU, topk)
    rows, weight_, bias_ = _mirror_autocast(hidden[keep], weight, bias)
    fields = cast("tuple[Tensor, ...]", _StatsHead.apply(rows, weight_, bias_, targets[keep], head))
    return _scatter(TokenStats(*fields), keep)
