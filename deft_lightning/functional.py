r"""Token statistics and the deformed logarithm: the mathematics everything else stands on.

Notation: a supervised token has logits ``z`` over ``V`` entries, ``pi = softmax(z)``, target ``y`` and ``p = pi_y``.
For every per-token loss ``l(log p; statistics)`` whose statistics are detached,

    dl/dz = gate * (pi - onehot(y)),    gate = -dl/d(log p)

so a function that returns a differentiable ``log p`` beside detached statistics serves every objective. Beside the
prediction ``pi0`` of a reference, ``KL(pi0 || pi)`` is a second differentiable statistic, with the derivative
``pi - pi0`` by the logits.
This module needs torch alone. In float64 it is the oracle for the fused head in :mod:`deft_lightning.ops`, whose row
kernel the other dtypes share.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor

from deft_lightning.tokens import (
    IGNORE_INDEX,
    LossFn,
    TokenContext,
    TokenStats,
    accumulation_dtype,
    topk_entropy_of,
)

__all__ = [
    "IGNORE_INDEX",
    "LossFn",
    "TokenContext",
    "TokenStats",
    "accumulation_dtype",
    "deformed_log",
    "supervised_stats",
    "token_loss",
    "token_stats",
    "topk_entropy_of",
    "weighted_loss",
]


def deformed_log(log_prob: Tensor, alpha: Tensor | float) -> Tensor:
    r"""Return the deformed negative log-likelihood, ``(1 - p^alpha) / alpha``, or its limit ``-log p`` at 0.

    Computed as ``-expm1(alpha log p) / alpha``. Where ``|alpha log p|`` is below a quarter of the machine epsilon both
    forms agree to the last bit and the limit is used: that keeps subnormal ``alpha`` exact, and adds no epsilon.
    Its gate is ``p^alpha``. Source: arXiv 2602.11424, the deformed-log family.

    Args:
        log_prob: ``log p`` in nats, any shape.
        alpha: Focus index, broadcast to ``log_prob``; detached by the caller. 0 is NLL, 1 is ``1 - p``.

    Returns:
        The loss per token, in the shape and dtype of ``log_prob``.

    Example:
        >>> deformed_log(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, 1.0]))
        tensor([0.6931, 0.5000])
    """
    alpha = torch.as_tensor(alpha, dtype=log_prob.dtype, device=log_prob.device)
    return cast("Tensor", _DeformedLog.apply(log_prob, alpha.detach()))


class _DeformedLog(torch.autograd.Function):
    """The derivative of expm1 is taken as ``result + 1``, which rounds a small ``p^alpha`` to 0; this one does not."""

    @staticmethod
    def forward(ctx: Any, log_prob: Tensor, alpha: Tensor) -> Tensor:
        exponent = alpha * log_prob
        limit = exponent.abs() < torch.finfo(log_prob.dtype).eps / 4
        ctx.save_for_backward(exponent)
        # Where the limit is taken the quotient may be anything, 0 / 0 too.
        return torch.where(limit, log_prob, torch.expm1(exponent).div_(alpha)).neg_()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (exponent,) = ctx.saved_tensors
        return exponent.exp().mul_(grads[0]).neg_(), None


class _LogSoftmaxStats(torch.autograd.Function):
    """One softmax pass; backward writes ``grad * (onehot - pi)`` with the target entry free of cancellation.

    Beside the logits of a reference it also gives their KL, and adds ``grad_kl * (pi - pi0)``.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, topk: int, reference: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        z = logits.to(accumulation_dtype(logits.dtype))
        top, arg = z.max(dim=-1, keepdim=True)
        shifted = z - top
        # The largest entry is exactly 1: leaving it out of the sum and using log1p keeps log p, H and C accurate
        # where the prediction is nearly certain, which is where most trained tokens are.
        rest = shifted.exp().scatter_(-1, arg, 0.0)
        tail = rest.sum(-1)
        log_sum = torch.log1p(tail)
        log_prob = shifted.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_sum
        collision = (1 + rest.square().sum(-1)) / (1 + tail).square()
        weighted = torch.where(rest > 0, rest * shifted, torch.zeros_like(rest))
        entropy = log_sum - weighted.sum(-1) / (1 + tail)
        arg = arg.squeeze(-1)
        topk_entropy = topk_entropy_of(shifted, topk) if topk else None
        ctx.save_for_backward(logits, targets, top, log_sum, log_prob, reference)
        fields = TokenStats(log_prob, collision, entropy, arg == targets, topk_entropy, arg)
        if reference is not None:
            divergence = _divergence(reference.to(z.dtype), shifted, log_sum)
            fields = fields._replace(reference_kl=divergence)
        ctx.mark_non_differentiable(*(field for field in fields[1:-1] if field is not None))
        return tuple(fields)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, top, log_sum, log_prob, reference = ctx.saved_tensors
        upstream = grads[0].unsqueeze(-1)
        pi = (logits.to(log_prob.dtype) - top - log_sum.unsqueeze(-1)).exp_()
        pull = None
        if reference is not None:
            pull = (pi - reference.to(pi.dtype).softmax(-1)).mul_(grads[-1].unsqueeze(-1))
        grad = pi.mul_(-upstream)
        grad.scatter_(-1, targets.unsqueeze(-1), -torch.expm1(log_prob).unsqueeze(-1) * upstream)
        return (grad if pull is None else grad.add_(pull)).to(logits.dtype), None, None, None


def _divergence(reference: Tensor, shifted: Tensor, log_sum: Tensor) -> Tensor:
    """Return ``KL(pi0 || pi)`` of the logits of a reference to logits whose maximum is 0 and the log of their sum."""
    top, arg = reference.max(dim=-1, keepdim=True)
    apart = reference - top
    tail = apart.exp().scatter_(-1, arg, 0.0).sum(-1)
    lowest = torch.finfo(apart.dtype).min  # an entry that neither gives mass is a 0, not minus infinity times 0
    between = apart.clamp_min(lowest) - shifted.clamp_min(lowest)
    # Differences first: where the two agree, so do their roundings.
    return ((apart.softmax(-1) * between).sum(-1) + (log_sum - torch.log1p(tail))).clamp_min(0)


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    topk: int = 0,
    reference_logits: Tensor | None = None,
) -> TokenStats:
    """Return statistics of every token from dense logits: the oracle for the fused head.

    Args:
        logits: Shape ``(..., V)``, any floating dtype. ``logits[i]`` predicts ``targets[i]``: nothing is shifted here.
        targets: Shape ``(...)``, integers in ``[0, V)`` or ``ignore_index``.
        ignore_index: Target value of positions that do not count; every statistic is 0 there.
        topk: Also return the entropy of that many largest probabilities (0: leave it out).
        reference_logits: Shape ``(..., V)``: those of a reference model at the same positions; detached. With them the
            statistics have ``reference_kl``.

    Returns:
        Statistics in the shape of ``targets``, float32 (float64 for float64 logits).

    Example:
        >>> stats = token_stats(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]))
        >>> stats.log_prob.exp(), stats.correct
        (tensor([0.5000, 0.1192]), tensor([ True, False]))
    """
    keep = targets != ignore_index
    reference = None if reference_logits is None else reference_logits.detach()
    given = targets.masked_fill(~keep, 0)
    if _by_rows(logits):
        stats = _row_stats(logits, given.flatten(), None, topk, reference).map(lambda field: field.view(targets.shape))
    else:
        stats = _textbook_stats(logits, given, topk, reference)
    return stats.map(lambda field: torch.where(keep, field, field.new_zeros(())))


def _textbook_stats(logits: Tensor, targets: Tensor, topk: int, reference: Tensor | None) -> TokenStats:
    return TokenStats(*cast("tuple[Any, ...]", _LogSoftmaxStats.apply(logits, targets, topk, reference)))


def _by_rows(logits: Tensor) -> bool:
    """Return whether the row kernel of the fused head computes statistics of these logits.

    Float64 does without it: the fused head and these rows are tested against the textbook formula. A compiler makes
    loops of its own from that formula, and a distributed tensor takes no buffers.
    """
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    return not (
        logits.dtype == torch.float64
        or torch.compiler.is_compiling()
        or (distributed is not None and isinstance(logits, distributed.DTensor))
    )


def _row_stats(logits: Tensor, targets: Tensor, at: Tensor | None, topk: int, reference: Tensor | None) -> TokenStats:
    from deft_lightning.ops.dense import dense_stats  # on the first call: ops stands on the types that this module has

    return dense_stats(logits, targets, at, topk, reference)


def supervised_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    topk: int = 0,
    reference_logits: Tensor | None = None,
) -> TokenStats:
    """Return statistics of the supervised tokens alone, in their order; the logits of the others are not looked at.

    Equal to ``token_stats(logits[keep], targets[keep])`` with ``keep = targets != ignore_index``, without the copy.

    Args:
        logits: As in :func:`token_stats`.
        targets: As there.
        ignore_index: As there.
        topk: As there.
        reference_logits: As there.

    Returns:
        Statistics of shape ``(n,)``, float32 (float64 for float64 logits).

    Example:
        >>> supervised_stats(torch.zeros(2, 3, 4), torch.tensor([[0, -100, 1], [-100, 2, 3]])).entropy.exp()
        tensor([4., 4., 4., 4.])
    """
    return _supervised(logits, targets, ignore_index, topk, reference_logits)[0]


def _supervised(
    logits: Tensor, targets: Tensor, ignore_index: int, topk: int, reference: Tensor | None
) -> tuple[TokenStats, Tensor | None]:
    """Return the statistics of supervised tokens, and which they are; None for all of them."""
    keep, reference = targets != ignore_index, None if reference is None else reference.detach()
    if not _by_rows(logits):
        beside = None if reference is None else reference[keep]
        return _textbook_stats(logits[keep], targets[keep], topk, beside), keep
    if bool(keep.all()):
        return _row_stats(logits, targets.flatten(), None, topk, reference), None
    at = keep.flatten().nonzero().squeeze(1)
    return _row_stats(logits, targets.flatten()[at], at, topk, reference), keep


def weighted_loss(objective: LossFn, stats: TokenStats) -> Tensor:
    """Return the loss of each token, times its weight where tokens have one."""
    loss = objective(stats)
    return loss if stats.weight is None else loss * stats.weight


def token_loss(
    logits: Tensor,
    targets: Tensor,
    objective: LossFn,
    ignore_index: int = IGNORE_INDEX,
    *,
    token_weight: Tensor | None = None,
    context: TokenContext | None = None,
    reference_logits: Tensor | None = None,
) -> Tensor:
    """Return the loss of every token under ``objective``, never reduced.

    The objective sees the supervised tokens alone, so one that looks at the batch (``Cayley(floor=0.5)``) is not
    disturbed by padding.

    Args:
        logits: Shape ``(..., V)``, any floating dtype, aligned with ``targets``.
        targets: Shape ``(...)``.
        objective: Any callable from :class:`TokenStats` to per-token losses.
        ignore_index: Target value of positions that do not count.
        token_weight: Shape ``(...)``, factor on each token's loss, finite and at least 0; detached. The mean to train
            with is then ``loss.sum() / token_weight[targets != ignore_index].sum()``.
        context: What else is known of the tokens, each field of shape ``(...)``: what the objective looks at beside
            the model's prediction. Its ``weight`` is ``token_weight`` where that is not given.
        reference_logits: Shape ``(..., V)``, of a reference model at the same positions, for objectives that compare
            with one; detached.

    Returns:
        Shape ``(...)``, float32 (float64 for float64 logits), 0 where ignored; differentiable in ``logits``.

    Example:
        >>> import torch
        >>> from deft_lightning.objectives import NLL
        >>> logits = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
        >>> token_loss(logits, torch.tensor([0, 0, -100]), NLL())
        tensor([0.6931, 0.1269, 0.0000])
        >>> token_loss(logits, torch.tensor([0, 0, -100]), NLL(), token_weight=torch.tensor([0.5, 2.0, 1.0]))
        tensor([0.3466, 0.2539, 0.0000])
    """
    stats, at = _supervised(logits, targets, ignore_index, int(getattr(objective, "topk", 0)), reference_logits)
    known = context or TokenContext()
    known = known if token_weight is None else known._replace(weight=token_weight)
    if at is None:
        return weighted_loss(objective, stats.within(known.map(Tensor.flatten))).view(targets.shape)
    loss = weighted_loss(objective, stats.within(known.select(at)))
    return loss.new_zeros(targets.shape).masked_scatter(at, loss)
