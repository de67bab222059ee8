"""Ways out of the plateau an objective can hold itself on: open the gate first, or never shut it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.objectives.base import DeformedLog, Objective, Wrapper
from deft_lightning.objectives.deformed import DEFT, NLL
from deft_lightning.objectives.run_state import RunState

ROUNDING = 1e-9  # of a sum of shares; less than any optimizer step


@dataclass(frozen=True, repr=False)
class Schedule(Objective):
    """One objective for the first part of a run, another for the rest: ``(1 - w) * first + w * then``.

    Of the optimizer steps, those before the share ``switch`` have ``w = 0``; then ``w`` grows linearly to 1 over the
    share ``blend``, at once if that is 0. A gate is the same mix of the two gates. A confident wrong prediction shuts
    the gate of DEFT on the very token that would correct it; NLL first leaves it open while there is much to correct.
    Called outright, without a run that tells it how far it is (a probe, a plain function call), it is ``then``.
    A run that goes on with other limits (`--trainer.max_epochs`, `--trainer.max_steps`) has the shares of the new ones.

    Args:
        first: The objective at the start.
        then: The objective at the end.
        switch: Share of the optimizer steps after which ``first`` no longer stands alone, in ``[0, 1]``.
        blend: Share of the steps, after those, in which the losses are mixed; ``switch + blend`` is at most 1.

    Attributes:
        weight: ``w`` of the step at hand; no setting.
    """

    first: Objective = field(default_factory=NLL)
    then: Objective = field(default_factory=DEFT)
    switch: float = 0.3
    blend: float = 0.0
    weight: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        """Refuse shares that are none, and parts that do not go together."""
        if not 0.0 <= self.switch <= 1.0:
            raise UserError(f"Schedule: switch {self.switch} is outside [0, 1]")
        if not 0.0 <= self.blend <= 1.0 or self.switch + self.blend > 1.0 + ROUNDING:
            raise UserError(f"Schedule: blend must be from 0 to 1 - switch = {1 - self.switch:g}, not {self.blend}")
        if self.first.topk and self.then.topk and self.first.topk != self.then.topk:
            raise UserError(
                f"Schedule: first and then need entropies of {self.first.topk} and of {self.then.topk} probabilities;"
                " give them the same k"
            )
        if self.first.tracks is not None and self.then.tracks is not None:
            raise UserError("Schedule: first and then cannot both be rescaled; rescale the schedule instead")

    @property
    def topk(self) -> int:
        """Return what either needs: the statistics stay the same through the run."""
        return max(int(self.first.topk), int(self.then.topk))

    @property
    def needs_batch(self) -> bool:
        """Return whether one of those in force looks at the batch."""
        return bool(any(part.needs_batch for part in self._in_force()))

    @property
    def scheduled(self) -> bool:
        """Return True: the run tells it how far it is."""
        return True

    @property
    def deformed(self) -> DeformedLog | None:
        """Return what the one in force is; a mix of two has no focus index."""
        parts = self._in_force()
        return parts[0].deformed if len(parts) == 1 else None

    def at(self, state: RunState) -> Objective:
        """Return the mix at this point of the run, its parts as they are then."""
        done = state.progress - self.switch
        weight = 1.0 if done >= self.blend - ROUNDING else done / self.blend if done > 0 else 0.0
        return self.with_(first=self.first.at(state), then=self.then.at(state), weight=weight)

    def _in_force(self) -> tuple[Objective, ...]:
        return (self.first,) if self.weight == 0 else (self.then,) if self.weight == 1 else (self.first, self.then)

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return the loss of the one in force, or of both, weighted."""
        losses = [part(stats) for part in self._in_force()]
        return losses[0] if len(losses) == 1 else (1 - self.weight) * losses[0] + self.weight * losses[1]


@dataclass(frozen=True, repr=False)
class Floored(Wrapper):
    """An objective whose gate does not shut, ``base - sg(max(f - g, 0)) log p``: gate ``max(g, f)``.

    ``g`` is the gate of the base. The value is that of the base plus, where its gate is below the floor, the missing
    share of NLL; it is no integral of the gate, and comparable only with itself.
    Called outright, without a run, it is what it ends as: with ``decay="linear"`` the base.

    Args:
        base: The objective whose gate is kept open.
        floor: Smallest gate ``f``, in ``[0, 1]``; 1 makes of a gate of at most 1 that of NLL.
        decay: ``constant``, or ``linear``: ``floor * (1 - progress)``, from all of it at the first optimizer step down
            to nothing at the end.

    Attributes:
        left: Share of the floor at the step at hand; no setting.
    """

    base: Objective = field(default_factory=DEFT)
    floor: float = 0.1
    decay: Literal["constant", "linear"] = "constant"
    left: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        """Refuse a floor that is not a gate of NLL's, and words that mean nothing."""
        if not 0.0 <= self.floor <= 1.0:
            raise UserError(f"Floored: floor {self.floor} is outside [0, 1]")
        if self.decay not in ("constant", "linear"):
            raise UserError(f"Floored: decay must be constant or linear, not {self.decay!r}")
        if self.decay == "linear":
            object.__setattr__(self, "left", 0.0)

    @property
    def scheduled(self) -> bool:
        """Return True: the run tells it how far it is."""
        return self.decay == "linear" or self.base.scheduled

    def at(self, state: RunState) -> Objective:
        """Return it with the floor of this point of the run."""
        left = 1.0 if self.decay == "constant" else 1.0 - state.progress
        return self.with_(base=self.base.at(state), left=left)

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return the loss of the base, and what is missing to the floor of NLL."""
        floor = self.floor * self.left
        if not floor:
            return self.base(stats)
        lift = (floor - self.base.gate(stats)).clamp_min(0)
        return self.base(stats) - lift * stats.log_prob


__all__ = ["Floored", "Schedule"]
