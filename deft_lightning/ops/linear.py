"""Hidden states to statistics, loss and gradients under any objective, without ever holding ``(N, V)`` logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX, LossFn, TokenContext, TokenStats, accumulation_dtype
from deft_lightning.ops.backend import Backend, choose_kernel
from deft_lightning.ops.chunked import loss_and_gradients, statistics
from deft_lightning.ops.columns import ColumnSparsity
from deft_lightning.ops.plan import Inputs, Plan
from deft_lightning.ops.reference import ReferenceHead
from deft_lightning.ops.torch_rows import Transform


class _FusedHead(torch.autograd.Function):
    """Gradients are computed in forward, where the logits of a chunk exist; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        assert plan.objective is not None
        inputs, wanted = Inputs(*tensors), ctx.needs_input_grad[1:6]
        if any(wanted):
            loss, stats, ctx.found = loss_and_gradients(inputs, plan, wanted)
            ctx.save_for_backward(*inputs)
            ctx.plan = plan
        else:
            stats = statistics(inputs, plan)
            loss = plan.objective(stats.within(plan.context._replace(weight=inputs.token_weight)))
        ctx.mark_non_differentiable(*(field for field in stats if field is not None))
        return ((loss if inputs.token_weight is None else loss * inputs.token_weight).sum(), *stats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_order()
        # The first backward uses the gradients up, which saves a copy of dW; one through a retained graph, which
        # hardly anyone runs, computes them again.
        found, ctx.found, inputs = ctx.found, None, Inputs(*ctx.saved_tensors)
        if found is None:
            again = replace(ctx.plan, prediction_sum=None)
            _, _, found = loss_and_gradients(inputs, again, ctx.needs_input_grad[1:6])
        return (None, *found.scaled(grads[0], inputs), None, None)


class _StatsHead(torch.autograd.Function):
    """Statistics with a differentiable log p: backward computes the logits again, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        inputs = Inputs._make((*tensors, None))
        stats = statistics(inputs, plan)
        ctx.mark_non_differentiable(*(field for field in stats[1:] if field is not None))
        ctx.save_for_backward(*inputs[:-1])
        ctx.plan = plan
        return tuple(stats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_order()
        plan = replace(ctx.plan, objective=_log_prob, transform=replace(ctx.plan.transform, topk=0))
        inputs = Inputs._make((*ctx.saved_tensors, grads[0].contiguous()))
        _, _, found = loss_and_gradients(inputs, plan, ctx.needs_input_grad[1:6])
        return (None, *found.scaled(grads[0].new_ones(()), inputs), None)


def _refuse_second_order() -> None:
    # torch's own once_differentiable says nothing where the loss itself is differentiated: a penalty on the gradient
    # would be left out without a word.
    if torch.is_grad_enabled():
        raise RuntimeError("the fused head cannot be differentiated twice (create_graph)")


def _log_prob(stats: TokenStats) -> Tensor:
    return stats.log_prob


class _Call(NamedTuple):
    """A checked call: its tensors with ignored tokens dropped, and where the others were."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    low: Tensor | None
    up: Tensor | None
    targets: Tensor
    kept: Tensor | None
    kernel: str
    reference: ReferenceHead | None = None

    def scatter(self, stats: TokenStats, count: int) -> TokenStats:
        """Put the statistics of the kept tokens back in their places, 0 elsewhere."""
        kept = self.kept
        return stats if kept is None else stats.map(lambda field: field.new_zeros(count).index_copy_(0, kept, field))


def _prepare(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, adapter: tuple[Tensor, Tensor] | None,
    ignore_index: int | None, backend: str, reference: ReferenceHead | None = None,
) -> _Call:  # fmt: skip
    low, up = adapter if adapter is not None else (None, None)
    fits = hidden.dim() == 2 and targets.shape == hidden.shape[:1] and weight.shape[1:] == hidden.shape[1:]
    fits = fits and weight.dim() == 2 and (bias is None or bias.shape == weight.shape[:1])
    if low is not None and up is not None:
        fits = fits and low.dim() == 2 and low.shape[:1] == hidden.shape[:1]
        fits = fits and up.shape == (weight.shape[0], *low.shape[1:])
    if not fits:
        shapes = [tuple(t.shape) for t in (hidden, weight, targets, bias, low, up) if t is not None]
        raise UserError(
            "linear head: expected hidden (N, D), weight (V, D), targets (N,), bias (V,),"
            " adapter (N, r) and (V, r); got " + ", ".join(map(str, shapes))
        )
    kind = hidden.device.type
    kernel = choose_kernel(backend, kind, hidden.dtype)
    if reference is not None:
        if len(reference.hidden) != len(hidden) or len(reference.weight) != len(weight):
            raise UserError(
                f"linear head: the reference has {len(reference.hidden)} tokens and a vocabulary of"
                f" {len(reference.weight)}, the head {len(hidden)} and {len(weight)}"
            )
        kernel = "torch"  # the kernels in Triton know one head
    kept = None
    if ignore_index is not None:
        kept = (targets != ignore_index).nonzero().squeeze(1)  # how many there are is the only thing CUDA waits for
        kept = None if len(kept) == len(targets) else kept
    if kept is not None:
        hidden, targets = hidden[kept], targets[kept]
        low = None if low is None else low[kept]
        if reference is not None:
            reference = reference._replace(
                hidden=reference.hidden[kept], low=None if reference.low is None else reference.low[kept]
            )
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    if kind == "cpu" and hidden.dtype == torch.float16 and kernel == "torch":
        hidden = hidden.float()  # a CPU multiplies it no faster, and float32 has the range for small probabilities
    low = None if low is None else low.to(hidden.dtype)
    dtype = hidden.dtype
    reference = None if reference is None else reference.map(lambda tensor: tensor.detach().to(dtype))
    return _Call(hidden, weight, bias, low, up, targets, kept, kernel, reference)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: LossFn,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    context: TokenContext | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = IGNORE_INDEX,
    backend: Backend = "auto",
    adapter: tuple[Tensor, Tensor] | None = None,
    prediction_sum: Tensor | None = None,
    reference: ReferenceHead | None = None,
    sparsity: ColumnSparsity | None = None,
) -> tuple[Tensor, TokenStats]:
    """Summed loss of ``softmax(cap(scale * (hidden @ weight.T + bias)))`` under any objective, without ``(N, V)``.

    Ignored tokens are dropped before the first product, so the cost scales with the supervised share. A backward
    through the result cannot be differentiated again.

    Args:
        hidden: Shape ``(N, D)``, already aligned with the targets (no shift happens here).
        weight: Shape ``(V, D)``.
        targets: Shape ``(N,)``, integers in ``[0, V)`` or ``ignore_index``.
        objective: Any callable from :class:`TokenStats` to per-token losses; its ``topk`` and ``needs_batch`` are read.
        bias: Shape ``(V,)``.
        token_weight: Shape ``(N,)``, factor on each token's loss and gradient, finite and at least 0; detached. It is
            the ``weight`` of the statistics that the objective and the caller get.
        context: What else is known of the tokens, each field of shape ``(N,)``: the objective and the caller get it
            with the statistics. Its ``weight`` is ``token_weight`` where that is not given.
        softcap: Final soft-capping ``c * tanh(z / c)`` (Gemma 2).
        logit_scale: Factor on the logits (Cohere; Granite divides, so pass the inverse).
        ignore_index: Target value of tokens that do not count; None when all count, which spares CUDA a wait.
        backend: ``torch``, ``triton`` (CUDA), or ``auto``: Triton where it runs.
        adapter: Low-rank update of the product, ``(low, up)`` of shapes ``(N, r)`` and ``(V, r)``: adds ``low @ up.T``
            (LoRA: ``low = scale * dropout(hidden) @ A.T``, ``up = B``). Differentiable in both.
        prediction_sum: Shape ``(V,)``, float32 or float64: the sum of the predictions ``softmax(...)`` over the
            supervised tokens is added to it in place.
        reference: Head of a reference model and its hidden states of the same N tokens, detached: with it the objective
            gets ``reference_kl``, whose gradient ``pi - pi0`` is taken chunk by chunk as well. Rows are then done in
            torch, whatever the backend.
        sparsity: Leaves columns of the gradient of the logits out of the two products behind it, up to a share of the
            gradient's norm (:mod:`deft_lightning.ops.columns`), and keeps what came of it; None: nothing is left out.
            Loss and statistics are the same. Nothing is left out beside a reference, or in float16.

    Returns:
        The sum over supervised tokens, a float32 scalar (float64 for float64 input) differentiable in ``hidden``,
        ``weight``, ``bias`` and ``adapter``, and the detached statistics of all N tokens, 0 where ignored.

    Raises:
        UserError: Shapes that do not fit, or a backend that cannot run here.
    """
    call = _prepare(hidden, weight, targets, bias, adapter, ignore_index, backend, reference)
    transform = Transform(logit_scale, softcap, int(getattr(objective, "topk", 0)))
    known = context or TokenContext()
    known = known if token_weight is None else known._replace(weight=token_weight)
    known = known.map(Tensor.detach) if call.kept is None else known.map(lambda field: field.detach()[call.kept])
    weight_of = None if known.weight is None else known.weight.to(accumulation_dtype(hidden.dtype))
    plan = Plan(
        objective, transform, call.kernel, known._replace(weight=None), prediction_sum, call.reference, sparsity
    )
    total, *fields = cast("tuple[Any, ...]", _FusedHead.apply(plan, *call[:6], weight_of))
    return total, call.scatter(TokenStats(*fields).within(known), len(targets))


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = IGNORE_INDEX,
    topk: int = 0,
    backend: Backend = "auto",
    adapter: tuple[Tensor, Tensor] | None = None,
    reference: ReferenceHead | None = None,
) -> TokenStats:
    """Return statistics of every token from hidden states, without ``(N, V)``; ``log_prob`` is differentiable.

    Args:
        hidden: Shape ``(N, D)``.
        weight: Shape ``(V, D)``.
        targets: Shape ``(N,)``, integers in ``[0, V)`` or ``ignore_index``.
        bias: Shape ``(V,)``.
        softcap: Final soft-capping.
        logit_scale: Factor on the logits.
        ignore_index: Target value of tokens that do not count; None when all count.
        topk: Also the entropy of that many largest probabilities.
        backend: ``torch``, ``triton`` (CUDA), or ``auto``.
        adapter: Low-rank update of the product, as in :func:`linear_loss`.
        reference: As in :func:`linear_loss`, without gradient only.

    Returns:
        Statistics of all N tokens, 0 where ignored; float32 (float64 for float64 input).

    Raises:
        UserError: Shapes that do not fit, a backend that cannot run here, or a reference where a gradient is wanted.
    """
    call = _prepare(hidden, weight, targets, bias, adapter, ignore_index, backend, reference)
    if (
        call.reference is not None
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in call[:5])
    ):
        raise UserError("linear_token_stats: reference_kl has no gradient here; use linear_loss, or torch.no_grad()")
    plan = Plan(None, Transform(logit_scale, softcap, topk), call.kernel, reference=call.reference)
    fields = cast("tuple[Any, ...]", _StatsHead.apply(plan, *call[:6]))
    return call.scatter(TokenStats(*fields), len(targets))
