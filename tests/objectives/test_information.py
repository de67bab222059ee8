"""InfoSFT against 60-digit arithmetic, at both ends of p, and Mix: a weighted sum whose gate is the sum of gates."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest
import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats, token_loss, token_stats
from deft_lightning.objectives import DEFT, DFT, EAFT, NLL, Cayley, InfoSFT, Mix, Rescaled, RunState, Schedule
from deft_lightning.objectives.parse import parse_objective
from deft_lightning.ops import linear_loss

LOG_PROBS = [0.0, -1e-12, -1e-3, -0.07, -0.08, -0.3, -1.0, -7.5, -90.0, -110.0, -2000.0]


def stats_of(
    log_probs: list[float], weight: list[float] | None = None, dtype: torch.dtype = torch.float32
) -> TokenStats:
    log_prob = torch.tensor(log_probs, dtype=dtype)
    flat = torch.full_like(log_prob, 0.5)
    return TokenStats(
        log_prob, flat, flat, log_prob > -0.5, weight=None if weight is None else torch.tensor(weight, dtype=dtype)
    )


def golden_log_gates(log_probs: Tensor, threshold: str) -> list[Decimal | None]:
    """``ln g`` to 60 digits, None where the gate is shut; of the numbers that the tensor holds."""
    getcontext().prec = 60
    t = Decimal(threshold)
    height = (t / (1 - t)).ln()
    found: list[Decimal | None] = []
    for value in log_probs.tolist():
        log_p = Decimal(value)
        rest = 1 - log_p.exp()
        above = height - (log_p - rest.ln()) if rest else Decimal(-1)
        found.append(log_p + above.ln() if above > 0 else None)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("threshold", ["0.93", "0.5", "0.999"])
def test_the_gate_is_that_of_sixty_digit_arithmetic(threshold: str, dtype: torch.dtype) -> None:
    stats = stats_of(LOG_PROBS, dtype=dtype)
    logs = golden_log_gates(stats.log_prob, threshold)
    plain = [float(log.exp()) if log is not None else 0.0 for log in logs]
    mean = sum((log.exp() for log in logs if log is not None), Decimal(0)) / len(logs)
    wanted = [float(log.exp() / mean) if log is not None else 0.0 for log in logs]
    close = {"rtol": 2e-13 if dtype == torch.float64 else 4e-6, "atol": 1e-37}
    for normalize_by, gates in (("none", plain), ("mean", wanted)):
        objective = InfoSFT(threshold=float(threshold), normalize_by=normalize_by)  # type: ignore[arg-type]
        gate = objective.gate(stats)
        torch.testing.assert_close(gate.double(), torch.tensor(gates, dtype=torch.float64), **close)
        torch.testing.assert_close(objective(stats), -gate * stats.log_prob, rtol=1e-6, atol=0)
    assert InfoSFT(threshold=float(threshold)).gate(stats).mean().item() == pytest.approx(1, rel=1e-5)


def test_ratios_hold_where_float32_has_no_such_probability() -> None:
    stats = stats_of([-2000.0, -2001.0, -2000.0])
    logs = [log for log in golden_log_gates(stats.log_prob, "0.93") if log is not None]
    mean = sum((log.exp() for log in logs), Decimal(0)) / 3
    torch.testing.assert_close(
        InfoSFT().gate(stats), torch.tensor([float(log.exp() / mean) for log in logs]), rtol=2e-4, atol=0
    )


def test_weights_enter_the_mean() -> None:
    stats = stats_of([-0.5, -1.0, -3.0], [2.0, 0.0, 0.5], torch.float64)
    gate, plain = InfoSFT().gate(stats), InfoSFT(normalize_by="none").gate(stats)
    torch.testing.assert_close(gate, plain * 2.5 / (2 * plain[0] + 0.5 * plain[2]), rtol=1e-13, atol=0)
    twice = stats_of([-0.5, -0.5, -1.0], dtype=torch.float64)
    once = stats_of([-0.5, -1.0], [2.0, 1.0], torch.float64)
    torch.testing.assert_close(InfoSFT().gate(twice)[1:], InfoSFT().gate(once), rtol=1e-13, atol=0)


@pytest.mark.parametrize("weight", [None, [0.0, 0.0]])
@pytest.mark.parametrize("log_probs", [[0.0, -0.01], [-0.2, -0.01]])
def test_a_batch_whose_gates_are_shut_or_weigh_nothing_is_finite(
    log_probs: list[float], weight: list[float] | None
) -> None:
    stats = stats_of(log_probs, weight)
    assert torch.isfinite(InfoSFT()(stats)).all() and torch.isfinite(InfoSFT().gate(stats)).all()
    if log_probs[0] == 0:
        assert not InfoSFT().gate(stats).any()
    assert InfoSFT()(stats_of([])).shape == (0,)


def test_the_fused_head_takes_the_mean_over_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 6, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(11, 6, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(11, (700,), generator=generator)
    factor = torch.rand(700, dtype=torch.float64, generator=generator)
    loss, _ = linear_loss(hidden, weight, targets, InfoSFT(), token_weight=factor)
    dense = token_loss(hidden @ weight.t(), targets, InfoSFT(), token_weight=factor).sum()
    torch.testing.assert_close(loss, dense)
    for found, wanted in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(dense, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, math.nan, math.inf])
def test_a_threshold_without_a_logit_is_refused(bad: float) -> None:
    with pytest.raises(UserError, match=r"^InfoSFT: threshold"):
        InfoSFT(threshold=bad)
    with pytest.raises(UserError, match=r"^InfoSFT: normalize_by"):
        InfoSFT(normalize_by="sum")  # type: ignore[arg-type]


# --- Mix -------------------------------------------------------------------------------------------------------------


def random_stats(topk: int = 0) -> TokenStats:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(40, 9, dtype=torch.float64, generator=generator)
    return token_stats(logits, torch.randint(9, (40,), generator=generator), topk=topk)


def test_a_mix_adds_losses_and_gates() -> None:
    stats, mix = random_stats(), Mix(first=NLL(), second=Cayley(floor=0.5), weight=0.25)
    torch.testing.assert_close(mix(stats), 0.75 * NLL()(stats) + 0.25 * Cayley(floor=0.5)(stats))
    torch.testing.assert_close(mix.gate(stats), 0.75 + 0.25 * Cayley(floor=0.5).gate(stats))
    assert mix.needs_batch and not Mix().needs_batch and Mix(second=EAFT(k=3)).topk == 3 and mix.deformed is None


@pytest.mark.parametrize(("weight", "alone"), [(0.0, NLL()), (1.0, DEFT())])
def test_at_either_end_it_is_one_of_them_bit_for_bit(weight: float, alone: NLL | DEFT) -> None:
    stats, mix = random_stats(), Mix(weight=weight)
    assert torch.equal(mix(stats), alone(stats)) and torch.equal(mix.gate(stats), alone.gate(stats))
    assert mix.deformed == alone


def test_more_than_two_are_a_mix_of_mixes_and_a_legend_says_so() -> None:
    three = parse_objective("Mix(first=NLL, second=Mix(first=DEFT, second=DFT), weight=0.4)")
    stats = random_stats()
    torch.testing.assert_close(three.gate(stats), 0.6 + 0.2 * DEFT().gate(stats) + 0.2 * DFT().gate(stats))
    assert parse_objective(repr(three)) == three


def test_parts_follow_the_run() -> None:
    mix, stats = Mix(first=Schedule(), second=NLL()), random_stats()
    assert mix.scheduled
    assert torch.equal(mix.at(RunState(0.1))(stats), NLL()(stats))
    torch.testing.assert_close(mix.at(RunState(0.9)).gate(stats), 0.5 * DEFT().gate(stats) + 0.5)


def test_parts_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(UserError, match=r"^Mix: first and second .* same k"):
        Mix(first=EAFT(k=3), second=EAFT(k=4))
    with pytest.raises(UserError, match=r"^Mix: first and second cannot both"):
        Mix(first=Rescaled(), second=Rescaled(base=NLL()))
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError, match=r"^Mix: weight"):
            Mix(weight=bad)
