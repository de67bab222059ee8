"""One optimizer step of the module: normalised by its supervised tokens, refused if it is not finite, clipped once."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX
from deft_lightning.objectives import Objective, RunState
from deft_lightning.training.step import (
    PATIENCE,
    RunningMean,
    SkippedStep,
    StepTotals,
    describe_nonfinite,
    local,
    parameters_of,
    ranks,
    reseed,
    whole,
)


class Stepping(LightningModule):
    """Owns the normalisation of a step; loss and model are those of the module that derives from it.

    Attributes:
        objective: The one chosen.
        model: The Hugging Face model.
        on_nonfinite: What becomes of a step whose loss or gradient is not finite.
        stop_asked: Whether this rank has been told to stop.
        stop_agreed: Whether any rank had been, when the last step was made.
        skipped: Steps left out so far.
    """

    objective: Objective
    model: Any
    on_nonfinite: Literal["raise", "skip"]

    def __init__(self) -> None:
        super().__init__()
        self._seen_before = 0
        self._seen: Tensor | None = None
        self._totals = StepTotals()
        self._training, self._steps, self._gates = RunState(), 0, RunningMean()
        self.stop_asked = self.stop_agreed = False
        self.skipped = self._skipped_in_a_row = 0
        self._grad_norm: Tensor | None = None
        self._rate = 0.0

    @property
    @abstractmethod
    def current_objective(self) -> Objective:
        """The objective in force."""

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count the supervised tokens of the optimizer step; its first micro-batch settles `current_objective`."""
        if self._totals.tokens is None:
            progress = min(self.trainer.global_step / self._steps, 1.0) if self.objective.scheduled else 1.0
            self._training = RunState(progress, self._gates.mean)
        self._totals.count((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        reseed(self.current_epoch, batch_idx, self.global_rank)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Divide the summed gradients by the supervised tokens of the whole step, then step.

        Lightning has divided by ``accumulate_grad_batches`` and DDP or FSDP by the number of ranks; both are
        multiplied back, so a short last window or a rank without supervised tokens weighs what it should.
        """
        assert optimizer_closure is not None

        def closure() -> Any:
            result = optimizer_closure()
            tokens = self._totals.reduce(self.stop_asked)
            scale = ranks() * self.trainer.accumulate_grad_batches / tokens.clamp_min(1).float()
            grads = local(p.grad for p in parameters_of(optimizer) if p.grad is not None)
            if grads:  # before clipping, loss-scale removal and the logged norm
                torch._foreach_mul_(grads, scale)
            return result

        self._rate = float(optimizer.param_groups[0]["lr"])  # of this step; the schedule moves on before it is logged
        try:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
        except SkippedStep:
            self.skipped += 1
            self._skipped_in_a_row += 1
        else:
            self._skipped_in_a_row = 0
            assert self._totals.summed is not None
            tokens = self._totals.summed[0].long()
            self._seen = tokens if self._seen is None else self._seen + tokens
            self._remember_gates()
        assert self._totals.summed is not None
        self.stop_agreed = bool(self._totals.summed[2] > 0)
        self._totals = StepTotals()

    def _remember_gates(self) -> None:
        """Add the mean gate of the step, if the objective wants it, to the running one."""
        tracked = self.current_objective.tracks
        if tracked is None:
            return
        assert self._totals.summed is not None
        tokens, *_, gates = self._totals.summed.tolist()
        if math.isfinite(gates):  # in float16 the loss scaler has left the step out
            self._gates.add(gates, tokens, tracked.decay)

    def _refuse_nonfinite(self, norm: Tensor) -> None:
        """Stop or skip a step whose loss or gradient is not finite, before it reaches the weights."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return  # float16: the loss scaler leaves such steps out, and lowers its scale
        assert self._totals.summed is not None
        # Waits for the device, once an optimizer step: nothing may reach the optimizer unseen.
        if bool(torch.isfinite(norm) & (self._totals.summed[1] == 0)):
            return
        problem = describe_nonfinite(self._totals, self.model, self.trainer.global_step + 1)
        if self.on_nonfinite == "raise":
            raise UserError(
                f"{problem}; nothing was changed by it: lower --model.optimizer.lr, look at the examples, or leave"
                " such steps out with --model.on_nonfinite skip"
            )
        if self._skipped_in_a_row + 1 >= PATIENCE:
            raise UserError(f"{problem}; {PATIENCE} steps in a row were skipped: lower --model.optimizer.lr")
        rank_zero_warn(f"{problem}; skipped")
        raise SkippedStep

    @property
    def tokens_seen(self) -> int:
        """Supervised tokens trained on so far, on all ranks."""
        return self._seen_before + (0 if self._seen is None else int(self._seen))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and keep the norm before clipping: computed once for both."""
        parameters = [p for p in parameters_of(optimizer) if p.grad is not None]
        clip = 0.0 if gradient_clip_val is None else gradient_clip_val  # 0 and below are off, as in Lightning
        if clip > 0 and gradient_clip_algorithm in (None, "norm"):
            self._grad_norm = whole(torch.nn.utils.clip_grad_norm_(parameters, clip))
            self._refuse_nonfinite(self._grad_norm)
            return
        self._grad_norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        self._refuse_nonfinite(self._grad_norm)
        if clip > 0:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
