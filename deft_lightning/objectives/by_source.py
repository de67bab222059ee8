"""An objective for every source of the data: rows of one may be trusted, those of another not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.objectives.base import DeformedLog, Objective, RunState
from deft_lightning.objectives.deformed import DEFT


@dataclass(frozen=True, repr=False)
class BySource(Objective):
    """Tokens of some sources of the data have an objective of their own, the others a common one.

    The loss, and so the gate, of a token is that of its source's objective; one that looks at the batch sees the tokens
    of its own sources. `--data.objectives.NAME NLL` makes one.

    Args:
        base: The objective of sources that are not named.
        own: Objectives by the name of their source.
    """

    base: Objective = field(default_factory=DEFT)
    own: Mapping[str, Objective] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse to nest them."""
        if any(part.sources for part in self.parts().values()):
            raise UserError("BySource: its parts cannot tell sources apart themselves")

    def __hash__(self) -> int:
        """Hash by content, as the other objectives do."""
        return hash((self.base, *self.own.items()))

    def parts(self) -> dict[str, Objective]:
        """Return the common objective and those of the sources."""
        return {"base": self.base, **{f"own.{name}": part for name, part in self.own.items()}}

    def at(self, state: RunState) -> Objective:
        """Return it with its parts as they are at this point of the run."""
        return self.with_(base=self.base.at(state), own={name: part.at(state) for name, part in self.own.items()})

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources that have one of their own."""
        return tuple(self.own)

    @property
    def topk(self) -> int:
        """What all of them need.

        Raises:
            UserError: Two need different ones.
        """
        sizes = {part.topk for part in self.parts().values()} - {0}
        if len(sizes) > 1:
            raise UserError(f"{self!r}: its parts need entropies of different numbers of probabilities; give one k")
        return max(sizes, default=0)

    @property
    def needs_batch(self) -> bool:
        """Whether one of them looks at the batch."""
        return any(part.needs_batch for part in self.parts().values())

    @property
    def deformed(self) -> DeformedLog | None:
        """What all of them are, if they are the same."""
        kinds = {part.deformed for part in self.parts().values()}
        return kinds.pop() if len(kinds) == 1 else None

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return the loss of each token under the objective of its source."""
        if not self.own:
            return self.base(stats)
        if stats.source is None:
            raise UserError(f"{self!r} needs TokenStats.source: the data has one source, or is not ours")
        loss = torch.zeros_like(stats.log_prob)
        for place, part in enumerate((self.base, *self.own.values()), start=-1):
            at = (stats.source == place).nonzero().squeeze(1)
            loss = loss.index_put((at,), part(stats.select(at)))
        return loss


__all__ = ["BySource"]
