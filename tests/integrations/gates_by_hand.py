"""Gates of objectives that change as training goes on, by their formulas, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from whole_batches import STEPS, VOCABULARY, Tokens, unigram

GateOf = Callable[[int, Tokens], Tensor]


def deft(step: int, tokens: Tokens) -> Tensor:
    return tokens.prob**tokens.collision


def first_nll(step: int, tokens: Tokens) -> Tensor:
    """Of Schedule(switch=0.5): NLL for three steps of six, then DEFT."""
    return torch.ones_like(tokens.prob) if step < STEPS / 2 else deft(step, tokens)


def floored(step: int, tokens: Tokens) -> Tensor:
    """Of Floored(floor=0.9, decay='linear')."""
    return deft(step, tokens).clamp_min(0.9 * (1 - step / STEPS))


def rescaled(decay: float) -> GateOf:
    """Of Rescaled: DEFT over its mean gate of the steps before."""
    total, count = 0.0, 0.0

    def gate_of(step: int, tokens: Tokens) -> Tensor:
        nonlocal total, count
        gate = deft(step, tokens)
        scale = 1 / max(total / count, 0.01) if count else 1.0
        total, count = decay * total + float(gate.sum()), decay * count + len(gate)
        return scale * gate

    return gate_of


class NoiseModel:
    """Of Contaminated(chance=..., answer_chance=None): posterior by Bayes' rule, rates by one step of EM a step.

    Args:
        least: Chance is the smaller of word frequency and the model's running mean prediction, and one in all tokens at
            least, not word frequency.
        opening: Share of the steps in which the gate is at least a tenth of the collision probability.
    """

    def __init__(self, least: bool = False, opening: float = 0.0) -> None:
        self.least, self.opening, self.start = least, opening, 0.2
        self.answers = self.tokens = self.start
        self.told: list[tuple[float, float]] = []
        self.mean = torch.full((VOCABULARY,), 1 / VOCABULARY, dtype=torch.float64)

    def __call__(self, step: int, tokens: Tokens) -> Tensor:
        self.told.append((self.answers, self.tokens))
        chance = unigram()
        if self.least:
            chance = torch.minimum(chance, (0.99 * self.mean + 0.01 / VOCABULARY).log())
            chance = chance.clamp_min(-math.log(VOCABULARY))
            self.mean = 0.9 * self.mean + 0.1 * tokens.pi.mean(0)
        u = chance.exp()[tokens.targets]
        a = (1 - self.tokens) * tokens.prob + self.tokens * u
        odds = tokens.per_row(a.log() - u.log()).exp() * (1 - self.answers) / self.answers
        right = odds / (1 + odds)
        token = (1 - self.tokens) * tokens.prob / a
        weight = right[tokens.row]
        gate = weight * token
        self.answers = self.moved(self.answers, float((1 - right).mean()))
        self.tokens = self.moved(self.tokens, float((weight * (1 - token)).sum() / weight.sum()))
        return torch.maximum(gate, 0.1 * tokens.collision) if step / STEPS < self.opening else gate

    @staticmethod
    def moved(rate: float, mean: float) -> float:
        return min(max(0.9 * rate + 0.1 * mean, 0.01), 0.95)


def first_rate(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Return the noise rate of answers at which EM stays before the first step, from word frequencies."""
    tokens = Tokens(model, rows)
    u = unigram(rows).exp()[tokens.targets]
    ratio = tokens.per_row((0.99 * tokens.prob + 0.01 * u).log() - u.log()).exp()
    low, high = 0.01, 0.95
    for _ in range(60):  # mean posterior minus rate falls through 0 where EM stays
        rate = (low + high) / 2
        noise = rate / (rate + (1 - rate) * ratio)
        low, high = (rate, high) if float(noise.mean()) > rate else (low, rate)
    return low
