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

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats, accumulation_dtype, token_stats

Objective = Callable[[TokenStats], Tensor]
Backend = Literal["auto", "torch"]

# Tokens a chunk: enough rows to keep the matrix products efficient, few enough that a chunk of fp32 logits over 152k
# entries stays near 300 MB on the CPU. CUDA wants at least 1024 rows to amortise the fp32 accumulation of dW.
CHUNK_CPU, CHUNK_CUDA = 512, 1024


@dataclass(frozen=True)
class _Head:
    """The fixed part of a call: everything that is not a tensor with a gradient."""

    objective: Objective | None
    softcap: float | None
    logit_scale: float
    chunk: int
    topk: int

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = torch.nn.functional.linear(hidden, weight, bias)
        z = z.to(accumulation_dtype(z.dtype))
        if self.logit_scale != 1.0:
            z = z * self.logit_scale
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z

    def chain(self, logits: Tensor) -> Tensor | float:
        """Derivative of the transformed logits by the product ``hidden @ weight.T``."""
        if self.softcap:
            return (1 - (logits / self.softcap).square()) * self.logit_scale
        return self.logit_scale


def _pieces(n: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)]


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
        if not any(ctx.needs_input_grad[:3]):
            parts = [token_stats(head.logits(hidden[p], weight, bias), targets[p], topk=head.topk) for p in pieces]
            stats = _concatenate(parts, hidden, head.topk)
            return _result(ctx, head.objective(stats), token_weight, stats)
        two_pass = bool(getattr(head.objective, "needs_batch", False)) and len(pieces) > 1
        whole_grad: Tensor | None = None
        losses: list[Tensor] = []
        stats_parts: list[TokenStats] = []
        if two_pass:
            for piece in pieces:
                stats_parts.append(
                    token_stats(head.logits(hidden[piece], weight, bias), targets[piece], topk=head.topk)
                )
            loss, whole_grad = _value_and_gate(head.objective, _concatenate(stats_parts, hidden, head.topk))
            losses.append(loss)

        wide = accumulation_dtype(weight.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias and bias is not None else None
        for piece in pieces:
            rows, labels = hidden[piece], targets[piece]
            logits = head.logits(rows, weight, bias)
            stats = token_stats(logits, labels, topk=head.topk)
            if whole_grad is None:
                loss, dlogp = _value_and_gate(head.objective, stats)
                losses.append(loss)
                stats_parts.append(stats)
            else:
                dlogp = whole_grad[piece]
            if token_weight is not None:
                dlogp = dlogp * token_weight[piece]
            chain = head.chain(logits)
            # The target entry is dl/dlogp * (1 - p) through expm1, written last: no p - 1 cancellation.
            error = torch.softmax(logits, dim=-1).mul_(-dlogp.unsqueeze(-1))
            error[torch.arange(labels.numel(), device=labels.device), labels] = -torch.expm1(stats.log_prob) * dlogp
            error = (error * chain).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(error, weight, out=grad_hidden[piece])
            if grad_weight is not None:
                grad_weight += error.t() @ rows
            if grad_bias is not None:
                grad_bias += error.sum(0, dtype=wide)
        stats = _concatenate(stats_parts, hidden, head.topk)
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
        parts = [
            token_stats(head.logits(hidden[piece], weight, bias), targets[piece], topk=head.topk)
            for piece in _pieces(hidden.shape[0], head.chunk)
        ]
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
