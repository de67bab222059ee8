"""What a run tells its objective, keeps for it from step to step, and knows of tokens beside the prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats

SMALLEST_GATE = 0.01  # a mean gate below counts as this much: an objective is scaled up by at most 100


class RunState(NamedTuple):
    """What a run tells its objective before an optimizer step. The defaults are what holds where there is no run.

    Attributes:
        progress: Share of the optimizer steps that are done, in ``[0, 1]``: a function of the step alone. Told only to
            objectives that are :attr:`Objective.scheduled`, 1 otherwise.
        mean_gate: Running mean gate of what :attr:`Objective.tracks` names, over the tokens of the optimizer steps
            before this one; 1 before the first.
        rates: Noise rates that the run has estimated so far, by EM; empty where nothing estimates any.
    """

    progress: float = 1.0
    mean_gate: float = 1.0
    rates: tuple[float, ...] = ()

    @property
    def scale(self) -> float:
        """Return one over the mean gate, at most ``1 / SMALLEST_GATE``."""
        return 1 / max(self.mean_gate, SMALLEST_GATE)


class Sampled(NamedTuple):
    """What a sample before the first step says of a noise rate.

    Attributes:
        answers: How many there were.
        rate: In ``[0, 1]``; None where the model finds too few of them better than chance to tell.
    """

    answers: int
    rate: float | None

    def line(self, tag: str) -> str:
        """Return what is told of it, by the tag under which the rate is logged."""
        where = f"{tag} before the first step, on {self.answers:,} answers"
        if self.rate is not None:
            return f"{where}: {self.rate:.2f}"
        return f"{where}: no estimate, since the model explains too few of them better than chance; it starts at 0.01"


class Begun(NamedTuple):
    """What a run begins with.

    Attributes:
        memory: As :meth:`Tracked.fold` returns it.
        found: What a sample said, by the tags of the rates that it was asked for.
    """

    memory: tuple[float, ...]
    found: dict[str, Sampled]


class Tracked(Protocol):
    """What a run adds up over the tokens of every optimizer step, and what it makes of it for the next.

    Sums are taken over micro-batches and ranks, so that neither changes them; the memory is part of the run's state.
    """

    @property
    def sizes(self) -> tuple[int, int]:
        """Return how many numbers the sums are, and the memory after a first step."""

    @property
    def sampled(self) -> bool:
        """Return False: it begins with nothing."""

    def begin(self, stats: TokenStats) -> Begun:
        """Return what to begin with, from the tokens of a sample before the first step."""

    def sums(self, stats: TokenStats) -> Tensor:
        """Return what is added up of the tokens of a micro-batch: shape ``(k,)``, float64."""

    def fold(self, memory: Sequence[float], sums: Sequence[float]) -> tuple[float, ...]:
        """Return the memory after a step with these sums; it is empty before the first."""

    def told(self, memory: Sequence[float], progress: float) -> RunState:
        """Return what the objective is told of a memory."""

    def logged(self, state: RunState) -> dict[str, float]:
        """Return what is logged of it, by tag."""


class Gated(Protocol):
    """An objective, as far as its gate goes."""

    def gate(self, stats: TokenStats) -> Tensor:
        """Return the gate of each token."""


class TrackedGate(NamedTuple):
    """The running mean gate of an objective, over tokens: each counts as much as it does in the loss.

    The memory is a ratio of two sums that forget alike: right from the first step on, where a decaying mean that starts
    at 0 would have to be corrected, and a step with few tokens counts little.

    Attributes:
        objective: Whose gate.
        decay: What a step's weight in the mean is multiplied by with each later step, in ``[0, 1)``.
    """

    objective: Gated
    decay: float

    @property
    def sampled(self) -> bool:
        """Return False: it begins with nothing."""
        return False

    @property
    def sizes(self) -> tuple[int, int]:
        """Return how many numbers are in the sums and in the memory."""
        return 2, 2

    def begin(self, stats: TokenStats) -> Begun:
        """Return the memory before the first step."""
        return Begun((0.0, 0.0), {})

    def sums(self, stats: TokenStats) -> Tensor:
        """Return the sum of the gates, each times its weight, and of the weights."""
        gate = self.objective.gate(stats).double()
        weight = torch.ones_like(gate) if stats.weight is None else stats.weight.double()
        return torch.stack([(gate * weight).sum(), weight.sum()])

    def fold(self, memory: Sequence[float], sums: Sequence[float]) -> tuple[float, ...]:
        """Return the sums over all steps, earlier ones ``decay`` times what they were."""
        total, tokens = memory if len(memory) == 2 else (0.0, 0.0)
        return self.decay * total + sums[0], self.decay * tokens + sums[1]

    def told(self, memory: Sequence[float], progress: float) -> RunState:
        """Return the state of the run with that mean gate; 1 before the first token."""
        total, tokens = memory if len(memory) == 2 else (0.0, 0.0)
        return RunState(progress, total / tokens if tokens else 1.0)

    def logged(self, state: RunState) -> dict[str, float]:
        """Return the scale."""
        return {"objective/scale": state.scale}


class Needs(NamedTuple):
    """What an objective looks at beside the model's prediction: fields of :class:`TokenStats` that have to be there.

    Attributes:
        chance: Which chance of a label :attr:`TokenStats.chance` is to be; None for none.
        answer_chance: Which one :attr:`TokenStats.answer_chance` is to be.
        example: Whether it looks at :attr:`TokenStats.example`.
        reference: Whether it looks at :attr:`TokenStats.reference_kl`.
    """

    chance: str | None = None
    answer_chance: str | None = None
    example: bool = False
    reference: bool = False


def merged_needs(owner: object, one: Needs, other: Needs) -> Needs:
    """Return what both of two parts of an objective want.

    Raises:
        UserError: They want different chances.
    """
    for name in ("chance", "answer_chance"):
        kinds = {kind for kind in (getattr(one, name), getattr(other, name)) if kind is not None}
        if len(kinds) > 1:
            raise UserError(f"{owner!r}: its parts need different chances, {' and '.join(sorted(kinds))}; give one")
    return Needs(
        one.chance or other.chance, one.answer_chance or other.answer_chance, one.example or other.example,
        one.reference or other.reference,
    )  # fmt: skip
