"""Noise rates: what they are, how far EM may move them, and what a run adds up and keeps for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deft_lightning.functional import TokenStats
from deft_lightning.objectives.run_state import Begun, RunState, Sampled

LOWEST, HIGHEST = 0.01, 0.95  # rates that EM may reach: at 0 and at 1 it would stay for ever
TELLING = (
    0.9  # an estimate above: fewer than one answer in ten looks right to the model, which so tells nothing of them
)
ESTIMATED = "noise/estimated"  # tag of the rate of answers
STEPS, SETTLED = 1000, 1e-5  # EM on a sample ends where the rate does not move any more
LATEST = 0.1  # what a step of those that are looked at counts at least in a watched rate; the first ones count alike


class NoiseRates(NamedTuple):
    """Shares of labels that are noise, in ``[0, 1]``.

    Attributes:
        answers: Share of whole answers.
        tokens: Share of tokens in answers that are none.
    """

    answers: float
    tokens: float


class NoiseModel(Protocol):
    """An objective with noise rates, as far as a run adds up for it."""

    def noise_sums(self, stats: TokenStats) -> Tensor:
        """Return posterior sums, shape ``(4,)``."""

    def rate_on(self, stats: TokenStats) -> Sampled:
        """Return the rate of answers by EM on a sample of them."""


class TrackedRates(NamedTuple):
    """What a run adds up for an objective with noise rates: one step of EM for each optimizer step.

    Attributes:
        objective: As it is in force.
        decay: What the old rate keeps of itself in a step, in ``[0, 1)``.
        start: Rates of the first step, where no sample says better.
        sampled: Whether a sample of answers is read before the first step.
    """

    objective: NoiseModel
    decay: float
    start: NoiseRates
    sampled: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        """Return how many numbers are in the sums and in the memory."""
        return 4, 2

    def sums(self, stats: TokenStats) -> Tensor:
        """Return posterior sums of the tokens of a micro-batch, shape ``(4,)``, float64: noise and all, by level."""
        return self.objective.noise_sums(stats)

    def begin(self, stats: TokenStats) -> Begun:
        """Return the rates of a run whose training answers are like these: that of tokens as it is."""
        if not self.sampled:
            return Begun(tuple(self.start), {})
        found = self.objective.rate_on(stats)
        rates = self.start if found.rate is None else self.start._replace(answers=found.rate)
        return Begun(tuple(rates), {ESTIMATED: found})

    def fold(self, memory: Sequence[float], sums: Sequence[float]) -> tuple[float, ...]:
        """Return the rates after a step whose sums over all ranks are known."""
        return tuple(
            bounded(self.decay * rate + (1 - self.decay) * noise / total) if total > 0 else rate
            for rate, noise, total in zip(self._rates(memory), sums[::2], sums[1::2], strict=True)
        )

    def told(self, memory: Sequence[float], progress: float) -> RunState:
        """Return the state of the run with these rates."""
        return RunState(progress, rates=self._rates(memory))

    def _rates(self, memory: Sequence[float]) -> tuple[float, ...]:
        """Return the rates of a memory; one of another objective says nothing."""
        return tuple(memory if len(memory) == len(self.start) else self.start)

    def logged(self, state: RunState) -> dict[str, float]:
        """Return the rates."""
        return dict(zip((ESTIMATED, f"{ESTIMATED}_tokens"), state.rates, strict=True))


def rate_by_em(evidence: Tensor, weight: Tensor, start: float) -> float:
    """Return the noise rate of answers at which EM stays; its likelihood has one maximum.

    Args:
        evidence: How much better the model explains each answer than chance does, in nats, shape ``(n,)``.
        weight: What each counts, shape ``(n,)``, with a sum above 0.
        start: Rate to begin with.
    """
    rate = start
    for _ in range(STEPS):
        before, rate = rate, bounded(float((torch.sigmoid(logit(rate) - evidence) * weight).sum() / weight.sum()))
        if abs(rate - before) < SETTLED:
            break
    return rate


def logit(rate: float) -> float:
    """Return the log-odds of a rate, minus infinity for 0."""
    return -math.inf if rate <= 0 else math.log(rate) - math.log1p(-rate)


def bounded(rate: float) -> float:
    """Return a rate within what EM may reach."""
    return min(max(rate, LOWEST), HIGHEST)
