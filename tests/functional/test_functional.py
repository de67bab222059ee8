"""Token statistics, the deformed logarithm and the dense loss against formulas that share no code with them."""

from __future__ import annotations

import json
import math
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import random_context

from deft_lightning.functional import TokenStats, deformed_log, token_loss, token_stats
from deft_lightning.objectives import DEFT, EAFT, NLL, Cayley

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "fixtures" / "objectives.json").read_text())
SHIFTED = GOLDEN["name"].index("shifted")
RTOL = {torch.float64: 1e-12, torch.float32: 2e-6}
# A saturated token has statistics near 1e-39, which float32 holds only as a subnormal.
ATOL = {torch.float64: 0.0, torch.float32: 1e-30}
quick = settings(deadline=None, max_examples=40, derandomize=True)


def dense_stats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Oracle: log p, collision, entropy and arg-max hits in float64 through plain ``log_softmax``."""
    log_pi = torch.log_softmax(logits.double(), dim=-1)
    pi = log_pi.exp()
    log_prob = log_pi.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return log_prob, (pi * pi).sum(-1), torch.special.entr(pi).sum(-1), logits.argmax(-1) == targets


def random_logits(shape: tuple[int, ...], vocab: int, seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, vocab, generator=generator, dtype=torch.float64)
    return logits, torch.randint(vocab, shape, generator=generator)


def in_float64(alpha: float, log_prob: float) -> tuple[float, float]:
    """Loss ``(1 - p^alpha) / alpha`` and gate ``p^alpha`` in 1100-digit arithmetic, from the very inputs given."""
    with localcontext() as context:
        context.prec = 1100  # 1 - p^alpha loses 624 of them for the smallest alpha and log p
        a, lp = Decimal(alpha), Decimal(log_prob)
        gate = (a * lp).exp()
        return float((1 - gate) / a if a else -lp), float(gate)


# --- token_stats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("field", ["log_prob", "collision", "entropy"])
def test_token_stats_reproduce_the_golden_numbers(field: str, dtype: torch.dtype) -> None:
    exact_logits = torch.tensor(GOLDEN["logits"], dtype=torch.float64)
    found = getattr(token_stats(exact_logits.to(dtype), torch.tensor(GOLDEN["target"])), field)
    wanted = torch.tensor(GOLDEN[field], dtype=torch.float64)
    assert found.dtype == dtype
    tolerance = RTOL[dtype] * wanted.abs() + ATOL[dtype]
    # "shifted" has logits near 1000, which no binary format holds: half an ulp of 1000 enters each logit, and none of
    # the statistics moves by more than twice that (sum_v |d log p / dz_v| <= 2; the others are flatter here).
    ulp = torch.finfo(dtype).eps * 512
    tolerance[SHIFTED] += 2 * (ulp / 2)
    error = (found.double() - wanted).abs()
    assert (error <= tolerance).all(), dict(zip(GOLDEN["name"], (error / tolerance).tolist(), strict=True))


@quick
@given(
    shape=st.sampled_from([(), (1,), (5,), (2, 3), (0,), (2, 0, 3)]),
    vocab=st.integers(1, 40),
    scale=st.sampled_from([0.0, 0.1, 3.0, 10.0]),
    offset=st.sampled_from([0.0, -300.0, 1000.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 10_000),
)
def test_token_stats_agree_with_log_softmax_in_float64(
    shape: tuple[int, ...], vocab: int, scale: float, offset: float, dtype: torch.dtype, seed: int
) -> None:
    logits, targets = random_logits(shape, vocab, seed, scale)
    logits = (logits + offset).to(dtype)
    stats = token_stats(logits, targets)
    log_prob, collision, entropy, correct = dense_stats(logits, targets)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rtol, atol = (1e-11, 1e-12) if wide == torch.float64 else (1e-5, 1e-12)
    for found, wanted in [(stats.log_prob, log_prob), (stats.collision, collision), (stats.entropy, entropy)]:
        assert found.shape == shape and found.dtype == wide
        torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=atol)
    torch.testing.assert_close(stats.correct, correct, rtol=0, atol=0)


@pytest.mark.slow
@quick
@given(vocab=st.integers(1, 50), scale=st.sampled_from([0.0, 1.0, 20.0, 1e4]), seed=st.integers(0, 10_000))
def test_statistics_stay_within_their_bounds(vocab: int, scale: float, seed: int) -> None:
    logits, targets = random_logits((6,), vocab, seed, scale)
    stats = token_stats(logits.float(), targets)
    assert (stats.log_prob <= 0).all() and (stats.entropy >= 0).all()
    assert (stats.entropy <= math.log(vocab) * (1 + 1e-6)).all()
    assert (stats.collision >= (1 - 1e-6) / vocab).all() and (stats.collision <= 1 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_vocabulary_changes_no_statistic_and_gets_no_gradient(dtype: torch.dtype) -> None:
    logits, targets = random_logits((9,), 11, seed=1)
    logits = logits.to(dtype)
    padded = torch.cat([logits, torch.full((9, 5), -torch.inf, dtype=dtype)], dim=-1).requires_grad_()
    plain = logits.clone().requires_grad_()
    found, wanted = token_stats(padded, targets, topk=14), token_stats(plain, targets, topk=14)
    torch.testing.assert_close(found, wanted)
    (grad,) = torch.autograd.grad(found.log_prob.sum(), padded)
    assert (grad[:, 11:] == 0).all()
    torch.testing.assert_close(grad[:, :11], torch.autograd.grad(wanted.log_prob.sum(), plain)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_extreme_logits_are_exact(dtype: torch.dtype) -> None:
    big = 9984.0  # the bfloat16 number nearest to 1e4
    rows = [[big, -big, -big], [-big, big, -big], [-big, -big, -big], [big, big, -big], [big, -torch.inf, -torch.inf]]
    logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
    stats = token_stats(logits, torch.zeros(5, dtype=torch.int64))
    log2, log3 = math.log(2), math.log(3)
    torch.testing.assert_close(stats.log_prob, torch.tensor([0.0, -2 * big, -log3, -log2, 0.0]))
    torch.testing.assert_close(stats.collision, torch.tensor([1.0, 1.0, 1 / 3, 0.5, 1.0]))
    torch.testing.assert_close(stats.entropy, torch.tensor([0.0, 0.0, log3, log2, 0.0]))
    (grad,) = torch.autograd.grad(stats.log_prob.sum(), logits)
    third = 1 / 3
    wanted = [[0, 0, 0], [1, -1, 0], [2 * third, -third, -third], [0.5, -0.5, 0], [0, 0, 0]]
    torch.testing.assert_close(grad, torch.tensor(wanted, dtype=dtype))


def test_only_log_prob_is_differentiable_and_its_gradient_passes_gradcheck() -> None:
    logits, targets = random_logits((3, 2), 6, seed=2)
    logits.requires_grad_()
    stats = token_stats(logits, targets, topk=3)
    assert [field is not None and field.requires_grad for field in stats] == [True, *[False] * (len(stats) - 1)]
    assert torch.autograd.gradcheck(lambda z: token_stats(z, targets, topk=3).log_prob, (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_gradient_of_a_nearly_certain_token_does_not_cancel(dtype: torch.dtype) -> None:
    # 1 - p is 6e-8 to 6e-13 here: p - 1 in float32 keeps no digit of it.
    gaps = torch.tensor([18.0, 24.0, 30.0])
    logits = torch.zeros(3, 7, dtype=dtype)
    logits[:, 4] = gaps.to(dtype)
    logits.requires_grad_()
    stats = token_stats(logits, torch.full((3,), 4))
    (grad,) = torch.autograd.grad(stats.log_prob.sum(), logits)
    away = 6 * (-gaps.double()).exp()
    # A logit is known to its rounding alone, and so is the logarithm of what it gives.
    error = (grad[:, 4].double() / (away / (1 + away)) - 1).abs()
    assert (error <= torch.finfo(dtype).eps * (2 + gaps)).all()


@quick
@given(vocab=st.integers(1, 30), topk=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_topk_entropy_is_that_of_the_renormalised_largest_probabilities(vocab: int, topk: int, seed: int) -> None:
    logits, targets = random_logits((4,), vocab, seed)
    pi = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True).values[:, :topk]
    wanted = torch.special.entr(pi / pi.sum(-1, keepdim=True)).sum(-1)
    found = token_stats(logits, targets, topk=topk).topk_entropy
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_arg_max_is_the_first_choice_whatever_the_target(dtype: torch.dtype) -> None:
    logits = torch.tensor([[[0.0, 3.0, 1.0], [2.0, -1.0, 0.5]], [[-9.0, -8.0, -7.0], [1.0, 4.0, 4.5]]], dtype=dtype)
    targets = torch.tensor([[1, 1], [0, -100]])
    stats = token_stats(logits.requires_grad_(), targets)
    assert stats.arg_max is not None and stats.arg_max.dtype == torch.int64
    assert stats.arg_max.tolist() == [[1, 0], [2, 0]] and stats.correct.tolist() == [[True, False], [False, False]]


def test_statistics_made_by_hand_may_leave_out_the_last_fields() -> None:
    log_prob, correct = torch.tensor([-1.0, -2.0]), torch.tensor([True, False])
    four = TokenStats(log_prob, log_prob.exp(), -log_prob, correct)
    five = TokenStats(log_prob, log_prob.exp(), -log_prob, correct, -log_prob / 2)
    assert set(four[4:]) == {None} and five.arg_max is None
    for stats, there in ((four, 4), (five, 5)):
        picked = stats.select(torch.tensor([1])).detach()
        assert [field is not None for field in picked] == [place < there for place in range(len(stats))]
        assert picked.log_prob.tolist() == [-2.0] and picked.correct.tolist() == [False]


def test_topk_entropy_is_absent_unless_asked_for() -> None:
    logits, targets = random_logits((4,), 5, seed=3)
    assert token_stats(logits, targets).topk_entropy is None


@pytest.mark.parametrize("ignore_index", [-100, -1, 2])
def test_ignored_positions_have_zero_statistics_and_leave_the_others_alone(ignore_index: int) -> None:
    logits, targets = random_logits((4, 5), 6, seed=4)
    targets[targets == ignore_index] = 3
    logits[0, 0, 0] = 9.0  # ignored, and the arg-max is the entry that an implementation may put in its place
    whole = token_stats(logits, targets, ignore_index=ignore_index, topk=2)
    ignored = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    ignored[0, 0] = True
    found = token_stats(logits, targets.masked_fill(ignored, ignore_index), ignore_index=ignore_index, topk=2)
    for before, after in zip(whole[:6], found[:6], strict=True):
        assert before is not None and after is not None
        assert (after[ignored] == 0).all()
        torch.testing.assert_close(after[~ignored], before[~ignored], rtol=0, atol=0)


def test_ignored_positions_get_no_gradient() -> None:
    logits, targets = random_logits((4,), 6, seed=5)
    targets[1:3] = -100
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(token_stats(logits, targets).log_prob.sum(), logits)
    assert (grad[1:3] == 0).all() and (grad[0] != 0).all() and (grad[3] != 0).all()


def test_select_and_detach_treat_every_field_alike() -> None:
    logits, targets = random_logits((2, 3), 6, seed=6)
    known = random_context(6).map(lambda field: field.view(2, 3))._replace(weight=torch.rand(2, 3))
    beside = logits.detach() / 2
    stats = token_stats(logits.requires_grad_(), targets, topk=4, reference_logits=beside).within(known)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    for full, part in zip(stats, stats.select(mask), strict=True):
        assert full is not None and part is not None
        torch.testing.assert_close(part, full[mask], rtol=0, atol=0)
    assert stats.log_prob.requires_grad and not stats.detach().log_prob.requires_grad
    bare = token_stats(logits, targets)
    assert bare.select(mask).topk_entropy is None and bare.detach().topk_entropy is None and bare.weight is None


# --- deformed_log -------------------------------------------------------------------------------------------------

ALPHAS = [0.0, 5e-324, 1e-310, 1e-45, 1e-40, 1e-20, 1e-17, 1e-9, 1e-6, 1e-3, 0.1, 0.5, 1.0, 3.0, 10.0, -1e-12, -0.5]
LOG_PROBS = [0.0, -1e-300, -1e-39, -1e-20, -1e-8, -1e-3, -0.7, -4.0, -15.0, -50.0]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gate"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_deformed_log_and_its_gate_match_exact_arithmetic(alpha: float, dtype: torch.dtype, what: str) -> None:
    log_prob = torch.tensor(LOG_PROBS, dtype=dtype, requires_grad=True)
    alpha = torch.tensor(alpha, dtype=dtype).item()
    loss = deformed_log(log_prob, alpha)
    (slope,) = torch.autograd.grad(loss.sum(), log_prob)
    found = (loss if what == "loss" else -slope).tolist()
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    wrong = []
    for lp, value in zip(log_prob.tolist(), found, strict=True):
        wanted = in_float64(alpha, lp)[("loss", "gate").index(what)]
        # Rounding the product alpha * log p once changes its exponential by that much: no float formula does better.
        if abs(value - wanted) > 4 * eps * (1 + abs(alpha * lp)) * abs(wanted) + tiny:
            wrong.append((lp, value, wanted))
    assert not wrong, f"(log p, found, wanted) {wrong}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_deformed_log_is_continuous_across_the_switch_to_its_limit(dtype: torch.dtype) -> None:
    log_prob = torch.full((), -1.0, dtype=dtype)
    eps = torch.finfo(dtype).eps
    for share in (0.2, 0.2499, 0.2501, 0.3, 0.5, 1.0, 2.0):
        alpha = torch.tensor(share * eps, dtype=dtype).item()
        found = deformed_log(log_prob, alpha).double().item()
        assert found == pytest.approx(in_float64(alpha, -1.0)[0], rel=eps, abs=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_deformed_log_at_zero_is_exactly_nll(dtype: torch.dtype) -> None:
    log_prob = torch.tensor([0.0, -1e-30, -0.3, -2e4], dtype=dtype, requires_grad=True)
    loss = deformed_log(log_prob, 0)
    assert torch.equal(loss, -log_prob)
    assert torch.equal(torch.autograd.grad(loss.sum(), log_prob)[0], -torch.ones_like(log_prob))


def test_deformed_log_passes_gradcheck_with_alpha_fixed() -> None:
    alpha = torch.tensor([0.0, 1e-20, 1e-3, 0.4, 1.0, 2.5, -0.5], dtype=torch.float64)
    log_prob = torch.tensor([-0.2, -1.0, -2.0, -0.1, -3.0, -0.5, -1.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda lp: deformed_log(lp, alpha), (log_prob,))


def test_deformed_log_broadcasts_alpha_and_keeps_shape_and_dtype() -> None:
    log_prob = -torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    alpha = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    found = deformed_log(log_prob, alpha)
    assert found.shape == (3, 4) and found.dtype == torch.float32
    for column, value in enumerate(alpha.tolist()):
        torch.testing.assert_close(found[:, column], deformed_log(log_prob[:, column], value), rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 1.0, 10.0])
def test_deformed_log_is_finite_for_the_least_probable_tokens(alpha: float) -> None:
    log_prob = torch.tensor([-100.0, -2e4, -3e38], requires_grad=True)
    loss = deformed_log(log_prob, alpha)
    (grad,) = torch.autograd.grad(loss.sum(), log_prob)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all()


# --- token_loss ---------------------------------------------------------------------------------------------------


def test_token_loss_takes_any_callable_and_keeps_the_shape_of_the_targets() -> None:
    logits, targets = random_logits((2, 3), 5, seed=7)
    found = token_loss(logits, targets, lambda stats: stats.entropy - 2 * stats.log_prob)
    log_prob, _, entropy, _ = dense_stats(logits, targets)
    torch.testing.assert_close(found, entropy - 2 * log_prob, rtol=1e-12, atol=0)


@pytest.mark.parametrize("target", [3, -100])
def test_token_loss_of_a_single_position_is_a_scalar(target: int) -> None:
    logits, _ = random_logits((), 5, seed=8)
    loss = token_loss(logits, torch.tensor(target), NLL())
    wanted = 0.0 if target < 0 else -torch.log_softmax(logits, -1)[target].item()
    assert loss.shape == () and loss.item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float64, torch.float64), (torch.float32,) * 2, (torch.bfloat16, torch.float32)],
)
def test_loss_is_wide_and_gradient_has_the_dtype_of_the_logits(dtype: torch.dtype, wide: torch.dtype) -> None:
    logits, targets = random_logits((6,), 5, seed=9)
    logits = logits.to(dtype).requires_grad_()
    loss = token_loss(logits, targets, DEFT())
    loss.mean().backward()
    assert loss.dtype == wide and logits.grad is not None and logits.grad.dtype == dtype


@pytest.mark.parametrize("ignore_index", [-100, -7, 0])
@pytest.mark.parametrize("objective", [DEFT(), Cayley(floor=0.5), EAFT(k=3)], ids=repr)
def test_padding_neither_enters_the_loss_nor_gets_a_gradient_even_if_it_is_nan(
    objective: DEFT | Cayley | EAFT, ignore_index: int
) -> None:
    logits, targets = random_logits((7,), 6, seed=10)
    targets[targets == ignore_index] = 4
    alone = logits.clone().requires_grad_()
    wanted = token_loss(alone, targets, objective, ignore_index)
    (wanted_grad,) = torch.autograd.grad(wanted.sum(), alone)
    where = torch.tensor([0, 2, 3, 4, 6, 9, 10])
    padded = torch.full((12, 6), torch.nan, dtype=torch.float64)
    padded[where] = logits
    padded_targets = torch.full((12,), ignore_index)
    padded_targets[where] = targets
    padded = padded.reshape(3, 4, 6).requires_grad_()
    found = token_loss(padded, padded_targets.reshape(3, 4), objective, ignore_index)
    (grad,) = torch.autograd.grad(found.sum(), padded)
    filled = torch.zeros(12, dtype=torch.float64).index_copy(0, where, wanted.detach())
    filled_grad = torch.zeros(12, 6, dtype=torch.float64).index_copy(0, where, wanted_grad)
    torch.testing.assert_close(found.detach(), filled.reshape(3, 4), rtol=0, atol=0)
    torch.testing.assert_close(grad, filled_grad.reshape(3, 4, 6), rtol=0, atol=0)


def test_token_loss_hands_the_objective_the_supervised_tokens_and_the_topk_it_asks_for() -> None:
    seen: list[TokenStats] = []

    class Spy:
        topk = 3

        def __call__(self, stats: TokenStats) -> Tensor:
            seen.append(stats)
            return -stats.log_prob

    logits, targets = random_logits((5,), 6, seed=11)
    targets[[1, 4]] = -100
    token_loss(logits, targets, Spy())
    (stats,) = seen
    assert stats.log_prob.shape == (3,)
    wanted = token_stats(logits, targets, topk=3).select(torch.tensor([0, 2, 3]))
    torch.testing.assert_close(stats, wanted, rtol=0, atol=0)
