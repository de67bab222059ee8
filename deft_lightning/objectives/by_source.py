"""An objective for every source of the data: rows of one may be trusted, those of another not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.objectives.base import DeformedLog, Objective
from deft_lightning.objectives.deformed import DEFT
from deft_lightning.objectives.run_state import Begun, RunState, Tracked


class TrackedSources(NamedTuple):
    """What a run adds up for objectives of sources: for each what it wants, over the tokens of its sources alone.

    Attributes:
        owner: The objective as it is in force.
    """

    owner: BySource

    @property
    def parts(self) -> dict[str, Tracked]:
        """Return those that want something, by name."""
        return {name: tracked for name, part in self.owner.parts().items() if (tracked := part.tracks) is not None}

    @property
    def sizes(self) -> tuple[int, int]:
        """Return how many numbers are in the sums and in the memory of all of them."""
        sums, memory = zip(*(tracked.sizes for tracked in self.parts.values()), strict=True)
        return sum(sums), sum(memory)

    def sums(self, stats: TokenStats) -> Tensor:
        """Return what each adds up of the tokens of its sources, one after another."""
        picked = dict(self.owner.split(stats))
        return torch.cat([tracked.sums(stats.select(picked[name])) for name, tracked in self.parts.items()])

    @property
    def sampled(self) -> bool:
        """Return whether one of them wants a sample before the first step."""
        return any(tracked.sampled for tracked in self.parts.values())

    def begin(self, stats: TokenStats) -> Begun:
        """Return what each begins with, one after another."""
        picked = dict(self.owner.split(stats))
        begun = {name: part.begin(stats.select(picked[name])) for name, part in self.parts.items()}
        found = {_tag(name, tag): sample for name, one in begun.items() for tag, sample in one.found.items()}
        return Begun(tuple(value for one in begun.values() for value in one.memory), found)

    def fold(self, memory: Sequence[float], sums: Sequence[float]) -> tuple[float, ...]:
        """Return the memories after a step with these sums, one after another."""
        folded: list[float] = []
        used = 0
        for (_, tracked), own in zip(self.parts.items(), self._own(memory), strict=True):
            width = tracked.sizes[0]
            folded += tracked.fold(own, sums[used : used + width])
            used += width
        return tuple(folded)

    def told(self, memory: Sequence[float], progress: float) -> RunState:
        """Return the state of the run: the mean gate of the one that is rescaled, and the rates of all."""
        states = [
            tracked.told(own, progress)
            for tracked, own in zip(self.parts.values(), self._own(memory), strict=True)
        ]  # fmt: skip
        gates = [state.mean_gate for state in states if not state.rates]
        return RunState(progress, gates[0] if gates else 1.0, tuple(rate for state in states for rate in state.rates))

    def logged(self, state: RunState) -> dict[str, float]:
        """Return what each logs; the tags of a source have its name in the middle."""
        values: dict[str, float] = {}
        states = dict(self.owner.states(state))
        for name, tracked in self.parts.items():
            values |= {_tag(name, tag): value for tag, value in tracked.logged(states[name]).items()}
        return values

    def _own(self, memory: Sequence[float]) -> list[Sequence[float]]:
        """Return the memory of each; empty ones before the first step."""
        sizes = [tracked.sizes[1] for tracked in self.parts.values()]
        if len(memory) != sum(sizes):
            return [()] * len(sizes)
        ends = [sum(sizes[: at + 1]) for at in range(len(sizes))]
        return [memory[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _tag(part: str, tag: str) -> str:
    """Return a tag with the name of the source in its middle; that of the common objective is as it is."""
    place, _, what = tag.partition("/")
    return tag if part == "base" else f"{place}/{part.removeprefix('own.')}/{what}"


@dataclass(frozen=True, repr=False)
class BySource(Objective):
    """Tokens of some sources of the data have an objective of their own, the others a common one.

    The loss, and so the gate, of a token is that of its source's objective; one that looks at the batch, or whose noise
    rates are estimated, sees the tokens of its own sources alone. `--data.objectives.NAME NLL` makes one.

    Args:
        base: The objective of sources that are not named.
        own: Objectives by the name of their source, as figures by source have it: the `gsm8k` of `gate/gsm8k/mean`.
    """

    base: Objective = field(default_factory=DEFT)
    own: Mapping[str, Objective] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse parts that do not go together."""
        if not isinstance(self.own, Mapping):
            raise UserError(f"BySource: own must map names of sources to objectives, not {self.own!r}")
        for name, part in self.own.items():
            if not isinstance(part, Objective):
                raise UserError(f"BySource: own {name!r} is {part!r}, no objective")
        if any(isinstance(part, BySource) for part in self.parts().values()):
            raise UserError("BySource: base and own cannot be BySource themselves")
        sizes = {part.topk for part in self.parts().values()} - {0}
        if len(sizes) > 1:
            raise UserError(
                f"BySource: base and own need entropies of {' and of '.join(map(str, sorted(sizes)))} probabilities;"
                " give them the same k"
            )
        tracked = [part.tracks for part in self.parts().values()]
        if sum(one is not None and not one.told((), 1.0).rates for one in tracked) > 1:
            raise UserError("BySource: at most one of base and own can be rescaled: a run keeps one mean gate")
        try:
            _ = self.needs
        except UserError:
            raise UserError("BySource: base and own need different chances of a label; give them the same") from None

    def __hash__(self) -> int:
        """Hash by content, as the other objectives do."""
        return hash((self.base, *self.own.items()))

    def parts(self) -> dict[str, Objective]:
        """Return the common objective and those of the sources."""
        return {"base": self.base, **{f"own.{name}": part for name, part in self.own.items()}}

    def states(self, state: RunState) -> Iterator[tuple[str, RunState]]:
        """Yield what each part is told of the state of a run, by name: of the rates those that are its own."""
        used = 0
        for name, part in self.parts().items():
            wanted = 0 if part.tracks is None else len(part.tracks.told((), 0.0).rates)
            yield name, state._replace(rates=state.rates[used : used + wanted])
            used += wanted

    def split(self, stats: TokenStats) -> Iterator[tuple[str, Tensor]]:
        """Yield the places of the tokens that each part has, by name.

        Raises:
            UserError: Nothing is known of their sources.
        """
        if self.own and stats.source is None:
            raise UserError(
                f"{self!r} needs TokenStats.source, the source of each token: the data has a single source, "
                "or names none"
            )
        of = torch.full_like(stats.correct, -1, dtype=torch.long) if stats.source is None else stats.source
        for place, name in enumerate(self.parts(), start=-1):
            yield name, (of == place).nonzero().squeeze(1)

    def at(self, state: RunState) -> Objective:
        """Return it with its parts as they are at this point of the run."""
        there = {name: self.parts()[name].at(own) for name, own in self.states(state)}
        return self.with_(base=there["base"], own={name: there[f"own.{name}"] for name in self.own})

    @property
    def tracks(self) -> Tracked | None:
        """Return what its parts want, each of the tokens of its sources."""
        tracked = TrackedSources(self)
        return tracked if tracked.parts else None

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the sources that have one of their own."""
        return tuple(self.own)

    @property
    def topk(self) -> int:
        """Return what all of them need."""
        return max(part.topk for part in self.parts().values())

    @property
    def needs_batch(self) -> bool:
        """Return whether one of them looks at the batch."""
        return any(part.needs_batch for part in self.parts().values())

    @property
    def deformed(self) -> DeformedLog | None:
        """Return what all of them are, if they are the same and none sees its own tokens alone."""
        kinds = {part.deformed for part in self.parts().values()}
        return kinds.pop() if len(kinds) == 1 and not (self.own and self.needs_batch) else None

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return the loss of each token under the objective of its source."""
        if not self.own:
            return self.base(stats)
        loss, parts = torch.zeros_like(stats.log_prob), self.parts()
        for name, at in self.split(stats):
            loss = loss.index_put((at,), parts[name](stats.select(at)))
        return loss


__all__ = ["BySource"]
