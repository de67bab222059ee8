"""Locked tokens: which they are, how many are logged, and when a run is told about them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from test_monitors import Columns, watch

from deft_lightning.callbacks import GateMonitor
from deft_lightning.callbacks.locked import LockWatch
from deft_lightning.functional import token_stats
from deft_lightning.objectives import DEFT, NLL, Floored, Likelihood, Objective, Rescaled, RunState
from deft_lightning.objectives.locked import locked

# --- which tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pi", "label", "objective", "wanted"),
    [
        ([0.97, 0.02, 0.01], 1, DEFT(), True),  # C = 0.94, gate 0.025
        ([0.97, 0.02, 0.01], 1, NLL(), False),  # the gate is open
        ([0.97, 0.02, 0.01], 0, Likelihood(), False),  # right
        ([0.70, 0.29, 0.01], 1, DEFT(), False),  # C = 0.57, gate 0.49
        ([0.70, 0.299, 0.001], 2, DEFT(), True),  # C = 0.58, gate 0.018
        ([0.50, 0.499, 0.001], 2, Likelihood(), False),  # C = 0.499: as good as two choices
        ([0.52, 0.479, 0.001], 2, Likelihood(), False),  # C = 0.4998
        ([0.53, 0.469, 0.001], 2, Likelihood(), True),  # C = 0.5009
        ([0.80, 0.11, 0.09], 1, Likelihood(), False),  # gate 0.11
        ([0.80, 0.11, 0.09], 2, Likelihood(), True),  # gate 0.09
        ([0.80, 0.11, 0.09], 2, Rescaled(Likelihood()).at(RunState(mean_gate=0.5)), False),  # gate 0.18
    ],
)
def test_locked_is_sure_and_wrong_and_shut(pi: list[float], label: int, objective: Objective, wanted: bool) -> None:
    stats = token_stats(torch.tensor([pi], dtype=torch.float64).log(), torch.tensor([label]))
    assert locked(stats, objective.gate(stats)).tolist() == [wanted]


def test_a_floor_of_a_tenth_locks_nothing_whatever_the_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(5000, 30, generator=generator)
    stats = token_stats(logits, torch.randint(0, 30, (5000,), generator=generator))
    assert locked(stats, DEFT().gate(stats)).sum() > 2000
    gate = Floored(floor=0.1).gate(stats)
    assert (gate < 0.1).any(), "some are just below"
    assert not locked(stats, gate).any()


def test_shares_of_locked_tokens_of_all_and_of_the_clean_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    run, tokens = watch(GateMonitor(), DEFT(), monkeypatch), Columns()
    shut = (tokens.c >= 0.5) & (tokens.correct == 0) & (tokens.gate < 0.1)
    clean = ~tokens.noisy
    assert 5 < shut[clean].sum() < shut.sum() - 5 < clean.sum()
    assert run.scalars["gate/locked"] == pytest.approx(shut.mean(), rel=1e-12)
    assert run.scalars["gate/locked_clean"] == pytest.approx(shut[clean].mean(), rel=1e-12)
    assert watch(GateMonitor(), NLL(), monkeypatch).scalars["gate/locked"] == 0


# --- when it is said ------------------------------------------------------------------------------------------------


def warned_at(shares: Sequence[float], probs: Sequence[float]) -> list[int]:
    """After which logged step something is said."""
    lock, found = LockWatch(), []
    for step, (share, prob) in enumerate(zip(shares, probs, strict=True), start=1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lock.see(share, prob, "DEFT()")
        found += [step] * len(caught)
    return found


def noisy(values: Any, size: float, seed: int) -> list[float]:
    return list(np.asarray(values) + size * np.random.default_rng(seed).standard_normal(len(values)))


FLAT = np.full(60, 0.4)


@pytest.mark.parametrize("seed", range(5))
def test_a_plateau_is_told_once(seed: int) -> None:
    steps = warned_at(noisy(FLAT, 0.02, seed), noisy(FLAT, 0.005, seed + 100))
    assert len(steps) == 1 and 10 <= steps[0] <= 20


def test_a_plateau_that_comes_later_is_told_when_the_window_is_full_of_it() -> None:
    shares = [*np.linspace(0.0, 0.5, 20), *[0.5] * 20]
    probs = [*np.linspace(0.1, 0.5, 20), *[0.5] * 20]
    (step,) = warned_at(shares, probs)
    assert 22 <= step <= 30


@pytest.mark.parametrize(
    ("shares", "probs"),
    [
        (np.linspace(0.6, 0.2, 60), FLAT),  # tokens come free
        (FLAT, np.linspace(0.1, 0.6, 60)),  # the model learns
        (np.full(60, 0.05), FLAT),  # few labels, as in any data
        (np.where(np.arange(60) % 10 == 9, 0.05, 0.4), FLAT),  # never sustained
        (np.zeros(60), FLAT),
        (FLAT[:9], FLAT[:9]),  # too early to tell
    ],
)
def test_nothing_is_told_where_something_moves_or_little_is_locked(shares: Any, probs: Any) -> None:
    assert warned_at(list(shares), list(probs)) == []


def test_what_is_told_is_one_line_that_names_both_readings_how_to_tell_and_a_way_out() -> None:
    lock = LockWatch()
    with pytest.warns(UserWarning) as caught:
        for _ in range(30):
            lock.see(0.4, 0.3, "DEFT()")
    (message,) = [str(warning.message) for warning in caught]
    assert "\n" not in message and "40%" in message and "DEFT()" in message
    for part in ("wrong", "plateau", "val/nll", "val/token_accuracy", "--model.objective Schedule"):
        assert part in message
