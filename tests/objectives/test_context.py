"""The chance of a label: what is known of it beside the prediction, and what the noise model makes of that."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deft_lightning.functional import TokenStats
from deft_lightning.objectives import Contaminated
from deft_lightning.objectives.context import ContextSource, unigram_log_prob

VOCABULARY, KNOWN = 5000, 50


def labels(rate: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of 40 labels, of 50 tokens, and which of them were replaced by a token drawn from all of them."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.randint(KNOWN, (64, 40), generator=generator)
    wrong = torch.rand(right.shape, generator=generator) < rate
    return torch.where(wrong, torch.randint(VOCABULARY, right.shape, generator=generator), right), wrong


def source(objective: Contaminated, told: Tensor) -> ContextSource:
    """The context of a run over these labels, whose model says hardly anything but the 50 tokens."""
    counts = torch.bincount(told.flatten(), minlength=VOCABULARY)
    context = ContextSource(objective, unigram_log_prob(counts, VOCABULARY), VOCABULARY)
    if context.marginal is not None:
        mean = torch.full((VOCABULARY,), 1e-9, dtype=torch.float64)
        mean[:KNOWN] = (1 - mean[KNOWN:].sum()) / KNOWN
        context.marginal.load(mean)
    return context


def chance_of(objective: Contaminated, told: Tensor) -> Tensor:
    # The first label of a row is nobody's prediction.
    chance = source(objective, told)({"labels": torch.cat([told[:, :1], told], dim=1)}, complete=False).chance
    assert chance is not None
    return chance


def test_no_token_is_less_likely_by_chance_than_one_drawn_from_all() -> None:
    told, _ = labels(0.2)
    least, unigram, marginal = (
        chance_of(Contaminated(chance=kind, answer_chance=None), told) for kind in ("least", "unigram", "marginal")
    )
    smaller = torch.minimum(unigram, marginal)
    drawn = -math.log(VOCABULARY)
    assert bool((smaller < drawn - 1).any()) and bool((smaller > drawn + 1).any())  # both kinds are there
    assert torch.equal(least, torch.where(smaller > drawn, smaller, torch.tensor(drawn)))


@pytest.mark.parametrize(("chance", "sees"), [("least", True), ("unigram", True), ("marginal", False)])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_the_rate_of_replaced_tokens_is_found_where_chance_can_have_drawn_them(
    chance: str, sees: bool, rate: float
) -> None:
    told, wrong = labels(rate)
    objective = Contaminated(level="token", chance=chance, answer_chance=None, start=0.01)  # type: ignore[arg-type]
    # A model that knows half of the right labels well and the others less. A replaced one it says 70 times as seldom
    # as a draw from all tokens would, but more often than its own mean prediction does.
    generator = torch.Generator().manual_seed(1)
    known = torch.where(torch.rand(told.shape, generator=generator) < 0.5, 0.9, 0.1)
    log_prob = torch.where(told < KNOWN, known, 3e-6).log().flatten()
    same = torch.full_like(log_prob, 0.5)
    stats = TokenStats(log_prob, same, same, log_prob > -0.5)._replace(chance=chance_of(objective, told).flatten())
    for _ in range(100):
        objective = objective.updated(stats)
    found, gate = objective.rates.tokens, objective.gate(stats).unflatten(0, told.shape)
    if not rate:
        assert found <= 0.02 and gate.min() > 0.9
        return
    assert (abs(found - rate) < 0.03) is sees
    elsewhere = wrong & (told >= KNOWN)  # a draw can hit one of the 50
    assert bool((gate[elsewhere] < 0.1).all()) is sees
    assert gate[~wrong].min() > 0.5
