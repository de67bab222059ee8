"""A step whose loss or gradient is not finite: refused or left out before it reaches the weights, and described."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from deft_lightning.annotations import CausalLM
from deft_lightning.errors import UserError
from deft_lightning.training.distributed import gather, local
from deft_lightning.training.totals import StepTotals

NAMED = 5  # how many examples, and how many parameters, a message names
PATIENCE = 20  # steps in a row that may be skipped

OnNonfinite = Literal["raise", "skip"]


class SkippedStep(Exception):
    """Raised inside an optimizer step to leave weights and optimizer state as they are."""


class NonfiniteGuard:
    """Decides what becomes of a step whose loss or gradient is not finite.

    Args:
        on_nonfinite: `raise` ends the run, `skip` leaves the step out.

    Attributes:
        skipped: Steps left out so far.
    """

    def __init__(self, on_nonfinite: OnNonfinite) -> None:
        if on_nonfinite not in ("raise", "skip"):
            raise UserError(f"--model.on_nonfinite must be raise or skip, not {on_nonfinite!r}")
        self.on_nonfinite = on_nonfinite
        self.skipped = self._in_a_row = 0

    def check(self, totals: StepTotals, model: CausalLM, step: int) -> None:
        """Let a finite step pass; every rank has to call it, once their totals are settled.

        Args:
            totals: What the step consists of.
            model: Names the parameters.
            step: Its number, for the message.

        Raises:
            SkippedStep: It is to be left out.
            UserError: It is not finite, or too many in a row were not; names examples and parameters.
        """
        if totals.finite:
            return
        problem = describe_nonfinite(totals, model, step)
        if self.on_nonfinite == "raise":
            raise UserError(
                f"{problem}; no weight was changed: lower --model.optimizer.lr, look at the examples, or leave"
                " such steps out with --model.on_nonfinite skip"
            )
        if self._in_a_row + 1 >= PATIENCE:
            raise UserError(f"{problem}; {PATIENCE} steps in a row were skipped: lower --model.optimizer.lr")
        rank_zero_warn(f"{problem}; skipped")
        raise SkippedStep

    def note(self, skipped: bool) -> None:
        """Count a step that was made or skipped."""
        self.skipped += int(skipped)
        self._in_a_row = self._in_a_row + 1 if skipped else 0


def describe_nonfinite(totals: StepTotals, model: CausalLM, step: int) -> str:
    """Say in one line which examples and parameters a step that is not finite is about; every rank has to call it."""
    parameters = [name for name, p in model.named_parameters() if p.grad is not None and _bad(p.grad)]
    # Of the ranks whose loss was not finite, or of all if it was only the gradient.
    everywhere = gather((totals.bad is not None and bool(totals.bad), totals.bad_examples()))
    guilty = [ids for bad, ids in everywhere if bad] or [ids for _, ids in everywhere]
    examples = [id for ids in guilty for id in ids]
    what = "loss" if any(bad for bad, _ in everywhere) else "gradient"
    return (
        f"step {step}: the {what} is not finite; examples: {_some(examples)};"
        f" parameters with such a gradient: {_some(parameters) if parameters else 'none here'}"
    )


def _bad(gradient: Tensor) -> bool:
    (share,) = local([gradient])
    return not bool(torch.isfinite(share).all())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
