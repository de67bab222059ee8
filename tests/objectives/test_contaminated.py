"""The noise model against its definition: the posterior by enumeration, the published likelihood by autograd, EM."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import random_context

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenContext, TokenStats, token_loss, token_stats
from deft_lightning.objectives import DEFT, NLL, BySource, Contaminated, NoiseRates, Rescaled, RunState

quick = settings(deadline=None, max_examples=30, derandomize=True)
levels = pytest.mark.parametrize("level", ["both", "token", "answer"])


def rated(answers: float, tokens: float, **options: Any) -> Contaminated:
    """Contaminated at rates, 0 where its level has none."""
    there = Contaminated(**options).at(RunState(0.5, rates=(answers, tokens)))
    assert isinstance(there, Contaminated)
    return there


def of_tokens(
    log_prob: Tensor, chance: Tensor, example: Tensor, answer_chance: Tensor | None = None, weight: Tensor | None = None
) -> TokenStats:
    """Statistics of tokens of which the noise model sees these alone."""
    same = torch.full_like(log_prob, 0.5)
    stats = TokenStats(log_prob, same, same, log_prob > -0.5)
    return stats.within(TokenContext(weight, chance, answer_chance, example))


def drawn(count: int, seed: int, answer_chance: bool = False) -> TokenStats:
    """Random tokens in float64, in answers of one to six."""
    generator = torch.Generator().manual_seed(seed)
    known = random_context(count, seed)
    log_prob = -6 * torch.rand(count, generator=generator, dtype=torch.float64) ** 2
    assert known.chance is not None and known.example is not None
    return of_tokens(log_prob, known.chance, known.example, known.answer_chance if answer_chance else None)


def answers(stats: TokenStats) -> list[Tensor]:
    assert stats.example is not None
    return [(stats.example == one).nonzero().flatten() for one in stats.example.unique()]


def likelihood(log_prob: Tensor, stats: TokenStats, e1: float, e2: float) -> Tensor:
    """Minus the log-likelihood of all answers, as it is published; plain products."""
    assert stats.chance is not None
    u = stats.chance.exp()
    v, a = u, (1 - e2) * log_prob.exp() + e2 * u
    if stats.answer_chance is not None:
        q = stats.answer_chance.exp()
        # Single tokens may be noise in either kind of answer; what chance is sure of is hardly evidence.
        v = a.detach() ** q * ((1 - e2) * q + e2 * u) ** (1 - q)
    return torch.stack([-torch.log((1 - e1) * a[at].prod() + e1 * v[at].prod()) for at in answers(stats)]).sum()


# --- value and gate -------------------------------------------------------------------------------------------------


@levels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rates_of_zero_are_nll_to_the_bit(level: Any, dtype: torch.dtype) -> None:
    stats = drawn(80, 0).map(lambda x: x.to(dtype) if x.is_floating_point() else x)
    clean = rated(0.0, 0.0, level=level)
    assert torch.equal(clean(stats), NLL()(stats)) and torch.equal(clean.gate(stats), NLL().gate(stats))


@quick
@given(e1=st.floats(0.01, 0.95), e2=st.floats(0.01, 0.95), apart=st.booleans(), seed=st.integers(0, 1000))
def test_loss_and_gate_are_those_of_the_published_likelihood(e1: float, e2: float, apart: bool, seed: int) -> None:
    stats = drawn(20, seed, apart)
    leaf = stats.log_prob.clone().requires_grad_()
    wanted = likelihood(leaf, stats, e1, e2)
    (slope,) = torch.autograd.grad(wanted, leaf)
    there = rated(e1, e2)
    torch.testing.assert_close(there(stats).sum(), wanted.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(there.gate(stats), -slope, rtol=1e-9, atol=1e-12)
    assert (there(stats) >= 0).all()


def test_a_token_of_which_chance_is_sure_is_no_evidence() -> None:
    """A format that the model does not write yet: right answers are no noise because of it."""
    log_prob, example = torch.tensor([1e-4, 1e-4, 0.9]).log(), torch.zeros(3, dtype=torch.long)
    ones = torch.ones(3)
    stats = TokenStats(
        log_prob, ones, 0 * ones, ones.bool(), chance=torch.tensor([1e-3, 1e-3, 1e-3]).log(),
        answer_chance=torch.tensor([0.999, 0.999, 0.01]).log(), example=example,
    )  # fmt: skip
    assert rated(0.5, 0.01).posterior(stats).answer.min() > 0.9
    wrong = stats._replace(log_prob=torch.tensor([0.999, 0.999, 1e-6]).log())
    assert rated(0.5, 0.01).posterior(wrong).answer.max() < 0.1


def joint(stats: TokenStats, at: Tensor, e1: float, e2: float) -> tuple[float, list[float]]:
    """P(the answer is right | labels), and P(answer and token are right | labels) of each token, by enumeration."""
    assert stats.chance is not None
    p, u = stats.log_prob[at].exp().tolist(), stats.chance[at].exp().tolist()
    noise = e1 * math.prod(u)
    total, right, tokens = noise, 0.0, [0.0] * len(p)
    for clean in itertools.product((True, False), repeat=len(p)):
        weight = 1 - e1
        for one, pt, ut in zip(clean, p, u, strict=True):
            weight *= (1 - e2) * pt if one else e2 * ut
        total, right = total + weight, right + weight
        tokens = [sum_ + weight * one for sum_, one in zip(tokens, clean, strict=True)]
    return right / total, [one / total for one in tokens]


@pytest.mark.parametrize(("e1", "e2"), [(0.3, 0.2), (0.9, 0.05), (0.02, 0.7)])
def test_the_gate_is_the_posterior_by_enumeration_of_what_may_have_happened(e1: float, e2: float) -> None:
    stats = drawn(30, 3)
    gate, found = rated(e1, e2).gate(stats), rated(e1, e2).posterior(stats)
    for at in answers(stats):
        right, tokens = joint(stats, at, e1, e2)
        assert found.answer[at].tolist() == pytest.approx([right] * len(at), rel=1e-10)
        assert gate[at].tolist() == pytest.approx(tokens, rel=1e-10)
        assert (found.answer * found.token)[at].tolist() == pytest.approx(tokens, rel=1e-10)


def test_one_level_alone_is_the_other_rate_at_zero() -> None:
    stats = drawn(40, 4)
    p, u = stats.log_prob.exp(), stats.chance.exp() if stats.chance is not None else None
    assert u is not None
    token = rated(0.0, 0.4, level="token")
    torch.testing.assert_close(token.gate(stats), 0.6 * p / (0.6 * p + 0.4 * u))
    torch.testing.assert_close(token(stats), -(0.6 * p + 0.4 * u).log())
    answer = rated(0.4, 0.0, level="answer")
    for at in answers(stats):
        right = 0.6 * p[at].prod()
        wanted = right / (right + 0.4 * u[at].prod())
        torch.testing.assert_close(answer.gate(stats)[at], wanted.expand(len(at)))


@levels
def test_a_weight_multiplies_the_derivative_of_its_token_and_no_other(level: Any) -> None:
    logits = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    targets, known = logits.detach().argmin(-1), random_context(12)
    weight = torch.rand(12, generator=torch.Generator().manual_seed(1)).double()
    there = rated(0.3, 0.2, level=level)
    loss = token_loss(logits, targets, there, token_weight=weight, context=known)
    (found,) = torch.autograd.grad(loss.sum(), logits)
    plain = logits.detach()
    error = torch.softmax(plain, -1) - torch.nn.functional.one_hot(targets, 7)
    gate = there.gate(token_stats(plain, targets).within(known))
    torch.testing.assert_close(found, (weight * gate).unsqueeze(-1) * error)


def test_answers_are_judged_apart() -> None:
    """One answer's tokens do not reach another, before it or behind; the same number later is another answer."""
    stats = drawn(30, 5)
    there, parts = rated(0.3, 0.2), answers(stats)
    together = there.gate(stats)
    for at in parts:
        torch.testing.assert_close(there.gate(stats.select(at)), together[at])
    # Two rows of a batch that both number their answers from 0.
    rows = [stats.select(torch.cat(parts[:3])), stats.select(torch.cat(parts[3:6]))]
    numbered = [
        row._replace(example=row.example - row.example.min()) for row in rows if row.example is not None
    ]  # fmt: skip
    joined = TokenStats(*(None if one[0] is None else torch.cat(one) for one in zip(*numbered, strict=True)))  # type: ignore[arg-type]
    wanted = torch.cat([there.gate(row) for row in rows])
    torch.testing.assert_close(there.gate(joined), wanted)


def test_the_opening_keeps_the_gate_at_a_tenth_of_the_collision() -> None:
    stats = drawn(60, 6)
    stats = stats._replace(chance=torch.full_like(stats.log_prob, -0.7))
    objective = Contaminated(opening=0.2)
    state = RunState(0.1, rates=(0.9, 0.3))
    opened, later = objective.at(state), objective.at(state._replace(progress=0.2))
    assert objective.scheduled and not Contaminated().scheduled
    posterior = later.gate(stats)
    assert 5 < int((posterior < 0.05).sum()) < 60
    torch.testing.assert_close(opened.gate(stats), posterior.clamp_min(0.05))
    assert isinstance(opened, Contaminated) and isinstance(later, Contaminated)
    torch.testing.assert_close(opened.noise_sums(stats), later.noise_sums(stats), msg="EM is fed the posterior")
    torch.testing.assert_close(opened(stats), later(stats), msg="the value is that of the likelihood")


# --- numbers at the edge --------------------------------------------------------------------------------------------


@levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gates_stay_finite_whatever_the_evidence(level: Any, dtype: torch.dtype) -> None:
    log_prob = torch.tensor([-2000.0, -1e-30, 0.0, -2000.0, -60.0, -104.0], dtype=dtype).repeat(20)
    chance = torch.tensor([-1e-3, -1e4, -700.0, -700.0, -1.0, -0.5], dtype=dtype).repeat(20)
    for lengths in (1, 2, 6, 60, 120):
        stats = of_tokens(log_prob, chance, torch.arange(120) // lengths)
        there = rated(0.5, 0.3, level=level)
        loss, gate, sums = there(stats), there.gate(stats), there.noise_sums(stats)
        assert torch.isfinite(loss).all() and torch.isfinite(sums).all() and (loss >= 0).all()
        assert ((gate >= 0) & (gate <= 1)).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_long_answer_is_settled_and_no_token_is_lost(sign: int) -> None:
    count = 4000
    log_prob = torch.full((count,), -2.0)
    stats = of_tokens(log_prob, log_prob - sign * 1.5, torch.zeros(count, dtype=torch.long))
    there = rated(0.5, 0.0, level="answer")
    assert there.posterior(stats).evidence[0].item() == pytest.approx(sign * 6000.0)
    assert there.gate(stats).tolist() == [1.0 if sign > 0 else 0.0] * count
    # -log((1 - e) prod p + e prod u), of which one term is left.
    wanted = count * min(2.0, 2.0 + sign * 1.5) - math.log(0.5)
    assert there(stats).double().sum().item() == pytest.approx(wanted, rel=1e-5)


# --- EM -------------------------------------------------------------------------------------------------------------


def world(e1: float, e2: float, seed: int, count: int = 3000, length: int = 6, vocab: int = 40) -> TokenStats:
    """Labels drawn from the model with known predictions and chance, and what the two say of them."""
    generator = torch.Generator().manual_seed(seed)
    n = count * length
    pi = torch.softmax(3 * torch.randn(n, vocab, generator=generator, dtype=torch.float64), -1)
    u = torch.softmax(torch.randn(vocab, generator=generator, dtype=torch.float64), 0)
    noise = (torch.rand(count, generator=generator) < e1).repeat_interleave(length)
    noise |= torch.rand(n, generator=generator) < e2
    from_model = torch.multinomial(pi, 1, generator=generator).squeeze(-1)
    by_chance = torch.multinomial(u, n, replacement=True, generator=generator)
    labels = torch.where(noise, by_chance, from_model)
    log_prob = pi.gather(-1, labels.unsqueeze(-1)).squeeze(-1).log()
    return of_tokens(log_prob, u.log()[labels], torch.arange(count).repeat_interleave(length))


@pytest.mark.parametrize(("e1", "e2"), [(0.6, 0.02), (0.3, 0.2), (0.05, 0.4), (0.02, 0.02)])
def test_em_recovers_the_rates_that_labels_were_drawn_with(e1: float, e2: float) -> None:
    stats, there = world(e1, e2, seed=int(100 * e1)), Contaminated(decay=0.5)
    for _ in range(60):
        there = there.updated(stats)
    assert there.rates.answers == pytest.approx(e1, abs=0.05) and there.rates.tokens == pytest.approx(e2, abs=0.05)


@pytest.mark.parametrize(("level", "e1", "e2"), [("token", 0.0, 0.35), ("answer", 0.45, 0.0)])
def test_em_of_one_level_recovers_its_rate_and_leaves_the_other_at_zero(level: Any, e1: float, e2: float) -> None:
    stats, there = world(e1, e2, seed=7), Contaminated(level=level, decay=0.5)
    for _ in range(60):
        there = there.updated(stats)
    assert there.rates == pytest.approx((e1, e2), abs=0.05)
    assert (there.rates.answers == 0) == (level == "token") and (there.rates.tokens == 0) == (level == "answer")


def test_a_step_of_em_is_the_mean_posterior_that_enters_with_its_share() -> None:
    stats = drawn(40, 8)
    there = rated(0.3, 0.2, decay=0.75)
    found = there.posterior(stats)
    wrong = torch.stack([1 - found.answer[at][0] for at in answers(stats)]).mean()
    noise = (found.answer * (1 - found.token)).sum() / found.answer.sum()
    wanted = NoiseRates(0.75 * 0.3 + 0.25 * float(wrong), 0.75 * 0.2 + 0.25 * float(noise))
    assert there.updated(stats).rates == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("e1", [0.05, 0.3, 0.6, 0.8])
def test_a_sample_before_the_first_step_gives_the_rate_that_answers_were_drawn_with(e1: float) -> None:
    stats, there = world(e1, 0.01, seed=int(100 * e1) + 1), Contaminated()
    assert there.tracks.sampled and there.rates == (0.01, 0.01)
    memory, found = there.tracks.begin(stats)
    assert found["noise/estimated"] == (3000, memory[0])
    assert memory[0] == pytest.approx(e1, abs=0.03) and memory[1] == 0.01, "the rate of tokens waits for training"
    assert there.at(there.tracks.told(memory, 1.0)).rates == memory


def test_a_sample_of_which_the_model_knows_nothing_gives_no_rate() -> None:
    """Fewer than one answer in ten looks right: it may be all noise, or a model that has yet to learn the task."""
    stats = world(0.97, 0.01, seed=3)
    memory, found = Contaminated().tracks.begin(stats)
    assert memory == (0.01, 0.01) and found["noise/estimated"] == (3000, None)
    assert "no estimate" in found["noise/estimated"].line("noise/estimated")
    nothing = stats.select(torch.zeros(0, dtype=torch.long))
    assert Contaminated().tracks.begin(nothing) == ((0.01, 0.01), {"noise/estimated": (0, None)})


def test_a_rate_that_is_given_is_the_first_and_tokens_alone_ask_for_no_sample() -> None:
    stats = world(0.5, 0.01, seed=4)
    given, tokens = Contaminated(start=0.2), Contaminated(level="token")
    assert not given.tracks.sampled and given.tracks.begin(stats) == ((0.2, 0.2), {})
    assert not tokens.tracks.sampled and tokens.tracks.begin(stats) == ((0.0, 0.01), {})


def test_sources_begin_with_rates_of_their_own() -> None:
    noisy, clean = world(0.6, 0.01, seed=5, count=1500), world(0.05, 0.01, seed=6, count=1500)
    assert clean.example is not None
    clean = clean._replace(example=clean.example + 1500)
    stats = TokenStats(*(None if one[0] is None else torch.cat(one) for one in zip(noisy, clean, strict=True)))  # type: ignore[arg-type]
    stats = stats._replace(source=torch.arange(2).repeat_interleave(9000) - 1)
    own = {"clean": Contaminated(), "given": Contaminated(start=0.2), "scaled": Rescaled(base=DEFT())}
    objective = BySource(base=Contaminated(), own=own)
    assert objective.tracks is not None and objective.tracks.sampled
    memory, found = objective.tracks.begin(stats)
    assert found == {"noise/estimated": (1500, memory[0]), "noise/clean/estimated": (1500, memory[2])}
    assert len(memory) == objective.tracks.sizes[1]
    assert memory[0] == pytest.approx(0.6, abs=0.04) and memory[2] == pytest.approx(0.05, abs=0.03)
    assert memory[4:] == (0.2, 0.2, 0.0, 0.0)
    assert objective.tracks.told(memory, 1.0).mean_gate == 1.0, "a mean gate begins at 1"


@pytest.mark.parametrize(("log_prob", "chance", "end"), [(0.0, -30.0, 0.01), (-30.0, -0.01, 0.95)])
def test_a_rate_never_leaves_its_bounds(log_prob: float, chance: float, end: float) -> None:
    values = torch.full((50,), log_prob, dtype=torch.float64), torch.full((50,), chance, dtype=torch.float64)
    there = Contaminated(decay=0.0, start=0.4)
    for _ in range(200):
        there = there.updated(of_tokens(*values, torch.arange(50)))
        assert all(0.01 <= rate <= 0.95 for rate in there.rates)
    assert there.rates.answers == end


def test_answers_and_tokens_count_in_em_what_they_weigh() -> None:
    stats = drawn(30, 9)
    weight = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).repeat(10)
    there = rated(0.3, 0.2)
    found, sums = there.posterior(stats), there.noise_sums(stats._replace(weight=weight)).tolist()
    each = [(float(weight[at].mean()), float(found.answer[at][0])) for at in answers(stats)]
    assert sums[0] == pytest.approx(sum(w * (1 - right) for w, right in each))
    assert sums[1] == pytest.approx(sum(w for w, _ in each))
    assert sums[2] == pytest.approx(float((weight * found.answer * (1 - found.token)).sum()))
    assert sums[3] == pytest.approx(float((weight * found.answer).sum()))
    ones = torch.ones(30, dtype=torch.float64)
    torch.testing.assert_close(there.noise_sums(stats._replace(weight=ones)), there.noise_sums(stats))
    nothing = there.updated(stats._replace(weight=torch.zeros(30, dtype=torch.float64)))
    assert nothing.rates == there.rates, "tokens that weigh nothing say nothing"


# --- what it refuses, and sources apart -----------------------------------------------------------------------------


def test_what_it_needs_and_is_not_there_is_one_line() -> None:
    bare = token_stats(torch.zeros(3, 5), torch.zeros(3, dtype=torch.long))
    with pytest.raises(UserError, match=r"TokenStats\.chance.*log u") as refused:
        Contaminated()(bare)
    assert "\n" not in str(refused.value)
    known = bare.within(TokenContext(chance=bare.log_prob))
    with pytest.raises(UserError, match=r"TokenStats\.example, the answer of each token"):
        Contaminated()(known)
    assert torch.isfinite(Contaminated(level="token")(known)).all()
    with pytest.raises(UserError, match=r"^Rescaled: base Contaminated\(.*estimates noise rates"):
        Rescaled(base=Contaminated())


def test_rates_of_sources_are_estimated_apart() -> None:
    noisy, clean = world(0.6, 0.02, seed=1, count=1500), world(0.02, 0.02, seed=2, count=1500)
    assert noisy.example is not None and clean.example is not None
    clean = clean._replace(example=clean.example + 1500)
    stats = TokenStats(*(None if one[0] is None else torch.cat(one) for one in zip(noisy, clean, strict=True)))  # type: ignore[arg-type]
    stats = stats._replace(source=torch.arange(2).repeat_interleave(9000) - 1)
    objective = BySource(base=Contaminated(decay=0.5), own={"clean": Contaminated(decay=0.5)})
    memory: tuple[float, ...] = ()
    for _ in range(40):
        assert objective.tracks is not None
        there = objective.at(objective.tracks.told(memory, 1.0))
        assert there.tracks is not None
        sums = there.tracks.sums(stats)
        assert len(sums) == there.tracks.sizes[0]
        memory = there.tracks.fold(memory, sums.tolist())
        assert len(memory) == there.tracks.sizes[1]
    assert memory == pytest.approx((0.6, 0.02, 0.02, 0.02), abs=0.05)
    state = objective.tracks.told(memory, 1.0)
    logged = objective.tracks.logged(state)
    assert logged.keys() == {
        "noise/estimated", "noise/estimated_tokens", "noise/clean/estimated", "noise/clean/estimated_tokens",
    }  # fmt: skip
    assert logged["noise/estimated"] == memory[0] and logged["noise/clean/estimated"] == memory[2]
    alone = Contaminated(decay=0.5).at(RunState(rates=memory[:2]))
    torch.testing.assert_close(objective.at(state).gate(stats)[:9000], alone.gate(noisy))
