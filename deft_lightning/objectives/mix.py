"""Two objectives at once, in a fixed proportion."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.objectives.base import DeformedLog, Objective
from deft_lightning.objectives.deformed import DEFT, NLL


@dataclass(frozen=True, repr=False)
class Mix(Objective):
    """Weighted sum of two objectives, ``(1 - w) first + w second``: the gate is the same mix of the two gates.

    More than two are a mix of mixes. The weights add up to 1, so that the learning rate of gates of at most 1 carries
    over; :class:`Schedule` mixes two over the course of a run.

    Args:
        first: The one of weight ``1 - w``.
        second: The one of weight ``w``.
        weight: ``w`` in ``[0, 1]``; at either end the other objective is not computed.
    """

    first: Objective = field(default_factory=NLL)
    second: Objective = field(default_factory=DEFT)
    weight: float = 0.5

    def __post_init__(self) -> None:
        """Refuse weights that are none, and parts that do not go together."""
        if not 0.0 <= self.weight <= 1.0:
            raise UserError(f"Mix: weight {self.weight} is outside [0, 1]")
        if self.first.topk and self.second.topk and self.first.topk != self.second.topk:
            raise UserError(
                f"Mix: first and second need entropies of {self.first.topk} and of {self.second.topk} probabilities;"
                " give them the same k"
            )
        if self.first.tracks is not None and self.second.tracks is not None:
            raise UserError("Mix: first and second cannot both follow a running mean of the run; rescale the mix")

    @property
    def topk(self) -> int:
        """Return what either needs."""
        return max(int(self.first.topk), int(self.second.topk))

    @property
    def needs_batch(self) -> bool:
        """Return whether one that counts looks at the batch."""
        return any(bool(part.needs_batch) for _, part in self._counting())

    @property
    def deformed(self) -> DeformedLog | None:
        """Return the focus of the only one that counts; a mix of two has no focus index."""
        counting = self._counting()
        return counting[0][1].deformed if len(counting) == 1 else None

    def _counting(self) -> list[tuple[float, Objective]]:
        """Return the objectives of a weight above 0, and their weights."""
        both = [(1 - self.weight, self.first), (self.weight, self.second)]
        return [(weight, part) for weight, part in both if weight > 0]

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return the weighted sum of the losses of each token."""
        losses = [weight * part(stats) for weight, part in self._counting()]
        return losses[0] if len(losses) == 1 else losses[0] + losses[1]


__all__ = ["Mix"]
