"""The loss in place of the logits, computed inside the model's own forward.

For one call the head of the model is replaced by the fused head, and the model's output by the loss. What stands
around the head keeps working: FSDP gathers its weight, hooks run, the body may be compiled or checkpointed, a mixture
of experts computes its auxiliary loss. Outside that call the model is untouched, and gives real logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deft_lightning.annotations import CausalLM
from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX, TokenContext, TokenStats, weighted_loss
from deft_lightning.models.head import DENSE, HeadSeam
from deft_lightning.ops import ReferenceHead, linear_loss, linear_token_stats


class FusedOutput(NamedTuple):
    """What a model gives in place of logits.

    Attributes:
        loss: Sum of the objective over the N supervised tokens, each times its weight.
        stats: Their detached statistics, shape ``(N,)``, in the order of the batch, with the weights.
        aux_loss: The router's loss of a mixture of experts, or None.
    """

    loss: Tensor
    stats: TokenStats
    aux_loss: Tensor | None


def fused_forward(
    model: CausalLM,
    seam: HeadSeam,
    inputs: dict[str, Any],
    targets: Tensor,
    objective: Callable[[TokenStats], Tensor],
    context: TokenContext | None = None,
    prediction_sum: Tensor | None = None,
    reference: Callable[[Tensor], ReferenceHead] | None = None,
    index: Tensor | None = None,
) -> FusedOutput:
    """Run a model with the fused head in place of its own.

    Args:
        model: The model to call, around ``seam.causal`` or that itself.
        seam: Its head.
        inputs: Keywords of the model's forward.
        targets: Shape ``(B, T)``: what position t is to predict, -100 where nothing.
        objective: Statistics to loss per token.
        context: What is known of the targets beside, their weights among it; each field of shape ``(B, T)``.
        prediction_sum: Shape ``(V,)``; in training the predictions of the supervised tokens are added to it.
        reference: From positions among the ``B * T`` to the head of a reference model and what it sees of them; called
            while the weights of the model are gathered.
        index: Shape ``(N,)``, the positions among the ``B * T`` that are to predict something, where they are known.

    Raises:
        UserError: The model does not run its head once, on the hidden states of every position.
    """
    if index is None:  # before the body is queued: how many tokens there are is all that CUDA waits for
        index = (targets != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    wanted = targets.flatten()[index]
    known = (context or TokenContext()).map(lambda field: field.flatten()[index])
    head_outputs: list[tuple[Tensor, TokenStats]] = []
    name = type(seam.causal).__name__

    def head(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hidden.shape[:-1] != targets.shape:
            raise UserError(f"{name}: its head sees {tuple(hidden.shape)}, not every position{DENSE}")
        compared = None if reference is None else reference(index)
        rows = hidden.flatten(0, -2)[index]
        head_outputs.append(_loss(seam, rows, wanted, objective, known, prediction_sum, compared))
        return hidden.new_empty((*hidden.shape[:-1], 0))  # the model may scale or cap it

    run = seam.causal.forward

    def forward(*args: Any, **kwargs: Any) -> dict[str, Any]:
        with _forward_of(seam.linear, head):
            output = run(*args, **kwargs)
        if len(head_outputs) != 1:
            raise UserError(f"{name}: it runs its head {len(head_outputs)} times{DENSE}")
        # Through the output of the model, where FSDP hangs the hooks of its backward.
        return {"loss": head_outputs[0][0], "stats": head_outputs[0][1], "aux_loss": getattr(output, "aux_loss", None)}

    with _forward_of(seam.causal, forward):
        return FusedOutput(**model(**inputs))


def hidden_states(model: CausalLM, seam: HeadSeam, inputs: dict[str, Any]) -> Tensor:
    """Run a model without its head, and return what that would have seen, shape ``(B, T, D)``.

    Args:
        model: The model to call, around ``seam.causal`` or that itself.
        seam: Its head.
        inputs: Keywords of the model's forward.

    Raises:
        UserError: The model does not run its head once.
    """
    seen: list[Tensor] = []

    def head(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(hidden)
        return hidden.new_empty((*hidden.shape[:-1], 0))

    with _forward_of(seam.linear, head):
        model(**inputs)
    if len(seen) != 1:
        raise UserError(f"{type(seam.causal).__name__}: it runs its head {len(seen)} times{DENSE}")
    return seen[0]


def _loss(
    seam: HeadSeam,
    rows: Tensor,
    targets: Tensor,
    objective: Callable[[TokenStats], Tensor],
    context: TokenContext,
    prediction_sum: Tensor | None,
    reference: ReferenceHead | None,
) -> tuple[Tensor, TokenStats]:
    weight, bias = seam.weights()
    options = {
        "bias": bias, "adapter": seam.adapter(rows), "ignore_index": None, "reference": reference, **seam.options()
    }  # fmt: skip
    if torch.is_grad_enabled():
        return linear_loss(
            rows,
            weight,
            targets,
            objective,
            context=context,
            prediction_sum=prediction_sum,
            sparsity=seam.sparsity,
            **options,
        )
    stats = linear_token_stats(rows, weight, targets, topk=int(getattr(objective, "topk", 0)), **options)
    stats = stats.within(context)
    return weighted_loss(objective, stats).sum(), stats


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another forward; its hooks run as ever."""
    before = module.__dict__.get("forward")
    module.forward = forward  # an attribute of the instance wins over the method of the class
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
