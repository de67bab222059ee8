"""One optimizer step over many micro-batches and ranks: divided once by what its tokens count, clipped once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deft_lightning.functional import IGNORE_INDEX
from deft_lightning.objectives import Tracked
from deft_lightning.training.batch_checks import check_weight
from deft_lightning.training.distributed import gradients_of, local, ranks, whole
from deft_lightning.training.loss import StepOutput
from deft_lightning.training.nonfinite import NonfiniteGuard, OnNonfinite, SkippedStep
from deft_lightning.training.totals import StepTotals


class StepNormaliser:
    """Owner of normalisation: the gradient of a step is that of the mean over all its supervised tokens.

    Where tokens have weights ``w`` it is the weighted mean, ``sum w l / sum w``.

    Micro-batches are counted as they come; when the optimizer steps, the ranks add up what they have in one all-reduce
    and every gradient is scaled once.

    Args:
        on_nonfinite: What becomes of a step whose loss or gradient is not finite.

    Attributes:
        totals: Of the step in hand.
        memory: What the objective tracks, over the steps so far; empty before the first.
        guard: Keeps steps that are not finite from the weights.
        stop_agreed: Whether any rank had been asked to stop when the last step was made.
        left_out: Whether the last step was skipped.
        grad_norm: Norm of the last gradient before clipping, None before the first step.
        tokens_seen: Supervised tokens trained on so far, on all ranks.
        rate: Learning rate of the last step; the schedule moves on before it is logged.
    """

    def __init__(self, on_nonfinite: OnNonfinite) -> None:
        self.totals, self.guard = StepTotals(), NonfiniteGuard(on_nonfinite)
        self.memory: tuple[float, ...] = ()
        self.stop_agreed = self.left_out = False
        self.grad_norm: Tensor | None = None
        self.rate = 0.0
        self.tokens_seen = 0
        self._scale: Tensor | None = None  # on the gradients of the step in hand, until they are multiplied by it

    @property
    def begins_step(self) -> bool:
        """Return whether the next micro-batch is the first of an optimizer step."""
        return self.totals.tokens is None

    def free_gradients(self, optimizers: Sequence[Optimizer]) -> None:
        """Free those of the last step, unless a step is in hand: Lightning keeps them through the next forward pass."""
        if self.begins_step:
            for optimizer in optimizers:
                optimizer.zero_grad()

    def forget(self) -> None:
        """Forget the micro-batches of a step that was never made."""
        self.totals = StepTotals()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"tokens_seen": self.tokens_seen, "gates": list(self.memory) or [0.0, 0.0]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from a checkpoint; what it does not know begins at 0."""
        self.tokens_seen = int(state.get("tokens_seen", 0))
        memory = tuple(state.get("gates", ()))
        self.memory = memory if any(memory) else ()

    def count(self, labels: Tensor, weight: Tensor | None = None) -> None:
        """Count the supervised tokens of a micro-batch, before it is run.

        Args:
            labels: Shape ``(B, T)``; the first token of a row has nothing before it that could say it.
            weight: Shape ``(B, T)``, what each label counts; None where all count 1.
        """
        if weight is not None:
            check_weight(weight, labels, values=False)
        learnt = labels[:, 1:] != IGNORE_INDEX
        self.totals.count(learnt.sum(), None if weight is None else (learnt * weight[:, 1:]).sum(dtype=torch.float64))

    def add(self, output: StepOutput, ids: Sequence[str], tracked: Tracked | None) -> None:
        """Take note of what a micro-batch gave.

        Args:
            output: Its terms.
            ids: Of its examples, for messages.
            tracked: What the objective wants to be added up.
        """
        if tracked is not None:
            self.totals.measure(tracked.sums(output.stats))
        self.totals.watch(ids, output.loss)

    @contextmanager
    def step(
        self,
        optimizer: Any,
        backward: Callable[[], Any] | None,
        accumulate: int,
        stop: Callable[[], bool],
        tracked: Tracked | None,
        at_once: bool = False,
    ) -> Iterator[Callable[[], Any]]:
        """Give the closure for the optimizer step that is made within, and account for the step.

        The closure settles what the gradients are divided by, once the last micro-batch has given its own. Lightning
        has divided by ``accumulate`` and DDP or FSDP by the number of ranks; both are multiplied back, so a short last
        window or a rank without supervised tokens weighs what it should. :meth:`clip_norm`, which follows, divides and
        clips in one pass.

        Args:
            optimizer: The one that steps.
            backward: Computes the gradients of the last micro-batch.
            accumulate: Micro-batches of a full step.
            stop: Whether this rank has been asked to stop; asked after the backward pass, in which it may be.
            tracked: What the objective wants to be added up.
            at_once: Divide within the closure, for who looks at gradients before they are clipped.
        """
        assert backward is not None

        def closure() -> Any:
            result = backward()
            count = self.totals.reduce(stop())
            # Nothing to learn: the gradients are 0 already.
            self._scale = ranks() * accumulate / torch.where(count > 0, count, 1).float()
            grads = gradients_of(optimizer)
            # The norm of sums over many tokens may be above what float16 holds.
            if at_once or any(grad.dtype is torch.float16 for grad in grads):
                self._multiply(grads, None)
            return result

        self.rate = float(optimizer.param_groups[0]["lr"])
        skipped = False
        try:
            yield closure
        except SkippedStep:
            skipped = True
        if self.totals.finite is None:  # somebody clips in a way of his own
            self.totals.settle()
        self.guard.note(skipped)
        self.left_out = skipped
        if not skipped:
            self.tokens_seen += self.totals.all_tokens
            self._remember(tracked)
        self.stop_agreed = self.totals.stop
        self.totals = StepTotals()

    def _remember(self, tracked: Tracked | None) -> None:
        """Fold what the objective wants of the step into the memory."""
        if tracked is None:
            return
        measured = self.totals.measured
        if all(map(math.isfinite, measured)):  # in float16 the loss scaler has left the step out
            self.memory = tracked.fold(self.memory, measured)

    def clip(self, optimizer: Any, limit: float | None, by_value: bool, module: Any) -> None:
        """Divide the gradient of a step and clip it, in one pass; keep its norm before clipping.

        Args:
            optimizer: Its gradients are clipped.
            limit: Largest norm, or value; None, 0 and below leave gradients as they are, as in Lightning.
            by_value: Whether values are clipped, one by one.
            module: Has the model, whose parameters a message names, and the trainer.

        Raises:
            SkippedStep: The step is not finite, and is to be left out.
            UserError: It is not finite, or too many in a row were not.
        """
        self.totals.settle(self.clip_norm(optimizer, None if by_value else limit))
        trainer = module.trainer
        # In float16 the loss scaler leaves steps out that are not finite, and lowers its scale.
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            self.guard.check(self.totals, module.model, trainer.global_step + 1)
        if by_value:
            module.clip_gradients(optimizer, limit, "value")

    def clip_norm(self, optimizer: Any, limit: float | None) -> Tensor:
        """Divide the gradient and bound its norm, which is computed once for the log and for that; return it."""
        grads = gradients_of(optimizer)
        norm = whole(torch.nn.utils.get_total_norm(grads))
        self.grad_norm = norm = norm if self._scale is None else norm * self._scale
        # As torch's clip_grad_norm_ has it.
        self._multiply(grads, (limit / (norm + 1e-6)).clamp(max=1.0) if limit is not None and limit > 0 else None)
        return norm

    def _multiply(self, grads: Sequence[Tensor], factor: Tensor | None) -> None:
        """Multiply gradients by a factor, and by the scale of the step where that has not been done: one pass."""
        factors = [one for one in (self._scale, factor) if one is not None]
        self._scale = None
        if grads and factors:
            shares = local(grads)  # in host memory under cpu_offload
            torch._foreach_mul_(shares, math.prod(factors[1:], start=factors[0]).to(shares[0].device))

    def logged(self) -> dict[str, Any]:
        """Return what is logged of the steps so far, by tag."""
        values: dict[str, Any] = {"train/tokens": float(self.tokens_seen)}
        if self.guard.on_nonfinite == "skip":
            values["train/skipped_steps"] = float(self.guard.skipped)
        values["train/lr"] = self.rate
        return values if self.grad_norm is None else {**values, "train/grad_norm": self.grad_norm}
