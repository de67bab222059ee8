"""What is checked on the first batch, before anything is trained: causality, and the fused head against the logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deft_lightning.annotations import CausalLM
from deft_lightning.errors import UserError
from deft_lightning.functional import TokenContext, TokenStats, token_stats
from deft_lightning.models.fused import fused_forward
from deft_lightning.models.head import DENSE, HeadSeam, base_causal_lm
from deft_lightning.ops import ReferenceHead, linear_loss

# Largest logit the comparison is made at: a transform that bends large logits shows, whatever the weights are.
LARGE = 40.0
# And of the gradient: at 40, a rounding to bfloat16 is off by up to an eighth, and p by as much of itself.
MODERATE = 4.0


@contextmanager
def evaluating(model: CausalLM) -> Iterator[None]:
    """Put a model into eval mode, and every module back into the mode it was in."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


@torch.no_grad()
def check_causal(model: CausalLM, input_ids: Tensor) -> None:
    """Refuse a model whose prediction changes with the tokens it is to predict.

    Args:
        model: The model as trained.
        input_ids: Shape ``(B, T)``; the first tokens of the first row are used.

    Raises:
        UserError: Changing the last token changes the logits of an earlier one.
    """
    few = input_ids[:1, :16]
    if few.shape[1] < 2:
        return
    other = few.clone()
    other[0, -1] = (few[0, -1] + 1) % model.get_input_embeddings().weight.shape[0]
    with evaluating(model):
        both = model(input_ids=torch.cat([few, other]), use_cache=False).logits[:, :-1].float()
    if float((both[0] - both[1]).abs().max()) > 1e-4 * float(both.abs().max()):
        raise UserError(
            f"{type(base_causal_lm(model)).__name__} sees the tokens it must predict: it is not a causal model"
            " (--model.pretrained, --model.architecture.model_type)"
        )


@torch.no_grad()
def check_packing(model: CausalLM, input_ids: Tensor) -> None:
    """Refuse a model in which packed examples see each other.

    Args:
        model: The model as trained.
        input_ids: Shape ``(B, T)``; the first tokens of the first row are used.

    Raises:
        UserError: The logits of a second example in a row change with the first one.
    """
    few = input_ids[:1, :16]
    if few.shape[1] < 4:
        return
    cut = few.shape[1] // 2
    positions = torch.cat([torch.arange(cut), torch.arange(few.shape[1] - cut)]).unsqueeze(0).to(few.device)
    with evaluating(model):
        try:
            packed = model(input_ids=few, position_ids=positions, use_cache=False).logits[:, cut:].float()
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{type(base_causal_lm(model)).__name__} takes no positions: {error}; use --data.packing false"
            ) from None
        alone = model(input_ids=few[:, cut:], use_cache=False).logits.float()
    low = model.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(few.device.type)
    if float((packed - alone).abs().max()) > (5e-2 if low else 1e-3) * float(alone.abs().max()):
        raise UserError(
            f"{type(base_causal_lm(model)).__name__}: packed examples see each other; use --data.packing false"
        )


@torch.no_grad()
def check_head(model: CausalLM, seam: HeadSeam, input_ids: Tensor, objective: Callable[[TokenStats], Tensor]) -> None:
    """Compare the fused head with the model's own logits on a few tokens: statistics, loss and gradient.

    Any transform of the logits that :func:`~deft_lightning.models.find_head` does not know of shows here, before it
    trains anything: the hidden states are scaled for the comparison until the largest logit is about 40.

    Args:
        model: The model as trained.
        seam: What :func:`~deft_lightning.models.find_head` found.
        input_ids: Shape ``(B, T)``; the first tokens of the first row are used.
        objective: What will be trained.

    Raises:
        UserError: They differ by more than rounding.
    """
    few = input_ids[:1, :17]
    if few.shape[1] < 2:
        return
    inputs = {"input_ids": few[:, :-1], "use_cache": False}
    name = type(base_causal_lm(model)).__name__
    factor, hidden, gradient_error = 1.0, torch.empty(0), 0.0

    def amplify(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal hidden
        hidden = args[0] * factor
        return (hidden, *args[1:])

    def compare(module: Any, args: tuple[Any, ...], output: Any) -> None:
        nonlocal gradient_error
        moderate = hidden.flatten(0, -2) * (MODERATE / LARGE)
        gradient_error = _gradient_error(seam, moderate, few[0, 1:], objective)

    with evaluating(model):
        hooks = [seam.linear.register_forward_pre_hook(amplify)]
        try:
            factor = LARGE / max(_largest(model(**inputs).logits), 1e-6)
            hooks.append(seam.linear.register_forward_hook(compare))  # here FSDP has gathered the weight
            try:
                own = model(**inputs).logits
                hooks.pop().remove()
                targets = few[:, 1:]
                context, reference = _context(seam, targets), _reference_of(seam, hidden, objective)
                fused = fused_forward(model, seam, inputs, targets, objective, context, reference=reference)
            except Exception as error:  # whatever the model does with its head or to its logits
                if isinstance(error, UserError) and DENSE in str(error):
                    raise
                reason = " ".join(str(error).split())
                raise UserError(f"{name}: the fused head does not run in its forward: {reason}{DENSE}") from error
        finally:
            for hook in hooks:
                hook.remove()
    low = bool({torch.bfloat16, torch.float16} & {own.dtype, hidden.dtype, seam.projection.weight.dtype})
    low = low or torch.is_autocast_enabled(input_ids.device.type)
    low = low or torch.get_float32_matmul_precision() != "highest"  # TF32 has the digits of float16
    # A few roundings of either; a log-probability and an entropy are off by twice what a logit is.
    allowed = (2e-2 if low else 1e-3) * 2 * max(1.0, _largest(own))
    wanted = token_stats(own[0].double(), few[0, 1:])  # in float64 no kernel of the head has a part in it
    pairs = [(fused.stats.log_prob, wanted.log_prob), (fused.stats.entropy, wanted.entropy)]
    worst = max(float((a - b).abs().max()) for a, b in pairs)
    if not worst <= allowed:
        raise UserError(
            f"{name}: the fused head does not reproduce the model's logits (log-probabilities differ by {worst:.2g})"
            f"{DENSE}"
        )
    if not gradient_error <= (5e-2 if low else 1e-3):
        raise UserError(
            f"{name}: the gradient of the fused head is off by {gradient_error:.1%} (backend {seam.backend}); use"
            " --model.head_backend torch, or --model.head dense"
        )


def _context(seam: HeadSeam, targets: Tensor) -> TokenContext:
    """Return a context that any objective can be checked with: chance is uniform, every token an answer of its own."""
    numbers = torch.arange(targets.numel(), device=targets.device).view_as(targets)
    chance = torch.full(targets.shape, -math.log(seam.projection.weight.shape[0]), device=targets.device)
    return TokenContext(chance=chance, answer_chance=chance, example=numbers, source=numbers % 2 - 1)


def _reference_of(
    seam: HeadSeam, hidden: Tensor, objective: Callable[[TokenStats], Tensor]
) -> Callable[[Tensor], ReferenceHead] | None:
    """Return a reference that any objective can be checked with: the head itself, at half the hidden states."""
    if not getattr(getattr(objective, "needs", None), "reference", False):
        return None
    rows = _constant(hidden.flatten(0, -2)) / 2

    def head(index: Tensor) -> ReferenceHead:
        weight, bias = seam.weights()
        return ReferenceHead(rows[index], _constant(weight), None if bias is None else _constant(bias))

    return head


def _constant(tensor: Tensor) -> Tensor:
    """Return what autograd may take: a copy of a tensor of inference mode, others detached."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _transformed(seam: HeadSeam, product: Tensor) -> Tensor:
    """Return the logits of a product, in float64."""
    z = product.double() * seam.logit_scale
    return seam.softcap * torch.tanh(z / seam.softcap) if seam.softcap else z


def _largest(logits: Tensor) -> float:
    """Return the largest finite magnitude; a model may bar tokens with -inf."""
    return float(logits.masked_fill(~logits.isfinite(), 0).abs().max())


def _gradient_error(
    seam: HeadSeam, hidden: Tensor, targets: Tensor, objective: Callable[[TokenStats], Tensor]
) -> float:
    """Return the distance of the fused gradient by the hidden states from the dense one, as a share of its norm."""
    weight, bias = seam.weights()
    update = seam.adapter(hidden)
    with torch.inference_mode(False), torch.enable_grad():
        adapter = None if update is None else (_constant(update[0]), _constant(update[1]))
        leaf, targets, weight = hidden.clone().requires_grad_(), targets.clone(), _constant(weight)
        bias = None if bias is None else _constant(bias)
        context = _context(seam, targets)
        head = _reference_of(seam, hidden, objective)
        reference = None if head is None else head(torch.arange(len(targets), device=targets.device))
        loss, _ = linear_loss(
            leaf, weight, targets, objective, context=context, bias=bias, adapter=adapter, ignore_index=None,
            reference=reference, **seam.options(),
        )  # fmt: skip
        (fused,) = torch.autograd.grad(loss, leaf)
        z = torch.nn.functional.linear(leaf, weight, bias)
        if adapter is not None:
            z = z + torch.nn.functional.linear(*adapter).to(z.dtype)
        beside = None if reference is None else torch.nn.functional.linear(*reference[:3])
        # In float64 from here on, where no kernel of the head has a part in it.
        z, beside = _transformed(seam, z), None if beside is None else _transformed(seam, beside)
        stats = token_stats(z, targets, topk=int(getattr(objective, "topk", 0)), reference_logits=beside)
        (dense,) = torch.autograd.grad(objective(stats.within(context)).sum(), leaf)
    return float((fused - dense).float().norm() / dense.float().norm().clamp_min(1e-20))
