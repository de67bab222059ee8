"""An objective in the units of NLL: divided by its mean gate as training goes on."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.objectives.base import Objective, Wrapper
from deft_lightning.objectives.deformed import DEFT
from deft_lightning.objectives.run_state import RunState, TrackedGate


@dataclass(frozen=True, repr=False)
class Rescaled(Wrapper):
    """An objective over its running mean gate, ``base / max(mean g, 0.01)``: loss and gate times one number a step.

    A gate below 1 makes gradients smaller, by a factor that changes as the model learns. With gates of mean 1 they are
    in the units of NLL's, so that its learning rate, clipping and weight decay carry over; which tokens train stays the
    same. AdamW divides a constant factor out by itself: there it is clipping that sees a difference, and little else.
    The mean is over all tokens of an optimizer step, on all ranks, and exponentially weighted over the steps before it:
    the first step has scale 1, the second the mean gate of the first. A mean below 0.01 counts as 0.01, so that a gate
    that is nearly shut is not blown up: the scale is at most 100. ``objective/scale`` logs it. A gate that is shut on
    the tokens that matter it does not open, all are scaled alike.
    Called outright, without a run, it is the base.

    Args:
        base: The objective that is divided.
        decay: What the weight of a step in the mean is multiplied by with each later step, in ``[0, 1)``; 0 takes the
            last step alone.

    Attributes:
        scale: The factor at the step at hand, in ``(0, 100]``; no setting.
    """

    base: Objective = field(default_factory=DEFT)
    decay: float = 0.99
    scale: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        """Refuse a mean that is none, and one of a mean."""
        if not 0.0 <= self.decay < 1.0:
            raise UserError(f"Rescaled: decay {self.decay} is outside [0, 1)")
        if self.base.tracks is not None:
            raise UserError(f"Rescaled: base {self.base!r} is rescaled already, or estimates noise rates")

    @property
    def tracks(self) -> TrackedGate:
        """Return the base, as it is in force."""
        return TrackedGate(self.base, self.decay)

    def at(self, state: RunState) -> Objective:
        """Return it with the scale of this point of the run."""
        return self.with_(base=self.base.at(state), scale=state.scale)

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return the loss of the base, scaled."""
        return self.scale * self.base(stats)


__all__ = ["Rescaled"]
