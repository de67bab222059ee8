"""The row kernel in torch, alone: its search for the largest entries, and what it does between two products."""

from __future__ import annotations

import itertools

import pytest
import torch
from dense import assert_close, assert_stats_close, dense_loss, differentiate, distance, fused_loss, problem, to_dtype
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deft_lightning.functional import TokenStats
from deft_lightning.objectives import DEFT, EAFT, Cayley, Objective
from deft_lightning.ops import torch_rows as rows
from deft_lightning.ops.linear import linear_token_stats
from deft_lightning.ops.torch_rows import TorchRows, Transform, _largest

# No stripe of 128, one entry less and more than the eight stripes that are searched by stripe, a remainder behind
# the last one, and a vocabulary of Qwen's size.
VOCABULARIES = [1, 5, 127, 128, 1023, 1024, 1025, 3000, 151_936]
quick = settings(deadline=None, max_examples=100, derandomize=True)


def first_arg_max(z: Tensor) -> Tensor:
    # numpy promises the first of equal entries; torch promises nothing.
    return torch.from_numpy(z.numpy().argmax(-1)).unsqueeze(-1)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_arg_max_is_the_first_of_two_equal_entries_wherever_they_are(vocab: int) -> None:
    behind = vocab // 128 * 128  # first entry behind the last whole stripe
    places = {0, 1, 127, 128, 130, 300, behind - 1, behind, behind + 1, vocab - 1} & set(range(vocab))
    pairs = list(itertools.combinations_with_replacement(sorted(places), 2))
    z = torch.randn(len(pairs), vocab, generator=torch.Generator().manual_seed(vocab)).clamp_max(3.0)
    for row, pair in enumerate(pairs):
        z[row, list(pair)] = 4.0
    top, arg, largest = _largest(z, 0)
    assert arg.squeeze(-1).tolist() == [first for first, _ in pairs]
    assert (top == 4.0).all() and top.shape == (len(pairs), 1) and largest is None


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("spread", [2, 1000])  # integers: of 2 values nearly every entry is tied, of 1000 some are
def test_arg_max_is_the_first_of_many_equal_entries(vocab: int, spread: int) -> None:
    z = torch.randint(spread, (4, vocab), generator=torch.Generator().manual_seed(spread)).float()
    top, arg, _ = _largest(z, 0)
    torch.testing.assert_close(arg, first_arg_max(z))
    torch.testing.assert_close(top, z.amax(-1, keepdim=True), rtol=0, atol=0)


@pytest.mark.parametrize("k", [1, 2, 7, 8, 9, 20])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_the_largest_entries_are_those_of_topk(vocab: int, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    spread = torch.randn(3, vocab, generator=generator)
    tied = torch.randint(6, (3, vocab), generator=generator).float()
    # All of them in one stripe, and all of them behind the last one.
    together = torch.zeros(2, vocab)
    together[0, :k] = torch.arange(1.0, k + 1)[:vocab]
    together[1, -k:] = torch.arange(1.0, k + 1)[:vocab]
    for z in (spread, tied, together):
        top, arg, largest = _largest(z, k)
        assert largest is not None
        torch.testing.assert_close(largest, z.topk(min(k, vocab), dim=-1).values, rtol=0, atol=0)
        torch.testing.assert_close(top, largest[:, :1], rtol=0, atol=0)
        torch.testing.assert_close(arg, first_arg_max(z))


@quick
@given(
    n=st.integers(1, 4),
    vocab=st.integers(1, 70),
    k=st.integers(0, 20),
    spread=st.sampled_from([1, 2, 5, 100]),
    padded=st.integers(0, 69),
    seed=st.integers(0, 10_000),
)
def test_largest_entries_and_first_arg_max_for_any_ties(
    n: int, vocab: int, k: int, spread: int, padded: int, seed: int
) -> None:
    z = torch.randint(-spread, spread, (n, vocab), generator=torch.Generator().manual_seed(seed)).float()
    z[:, max(1, vocab - padded) :] = -torch.inf  # at least one entry has mass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "STRIPE", 3)  # short, so that small rows have many stripes and ties between them
        top, arg, largest = _largest(z, k)
    torch.testing.assert_close(arg, first_arg_max(z))
    torch.testing.assert_close(top, z.amax(-1, keepdim=True), rtol=0, atol=0)
    assert (largest is None) == (k == 0)
    if largest is not None:
        torch.testing.assert_close(largest, z.topk(min(k, vocab), dim=-1).values, rtol=0, atol=0)


# --- statistics and gradient of a block -----------------------------------------------------------------------------


def logits_of(product: Tensor, transform: Transform) -> Tensor:
    z = product * transform.logit_scale
    return transform.softcap * torch.tanh(z / transform.softcap) if transform.softcap else z


def oracle(product: Tensor, targets: Tensor, slope: Tensor, transform: Transform) -> tuple[TokenStats, Tensor]:
    """Statistics, and ``slope * d(log p)/d(product)`` by autograd, in float64."""
    product = product.detach().double().clone().requires_grad_()
    log_pi = torch.log_softmax(logits_of(product, transform), dim=-1)
    log_prob = log_pi.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    (gradient,) = torch.autograd.grad(log_prob, product, slope.double())
    pi = log_pi.detach().exp()
    largest = pi.topk(min(transform.topk, pi.shape[-1]), dim=-1).values
    arg = first_arg_max(logits_of(product, transform).detach()).squeeze(-1)
    return TokenStats(
        log_prob.detach(),
        pi.square().sum(-1),
        torch.special.entr(pi).sum(-1),
        arg == targets,
        torch.special.entr(largest / largest.sum(-1, keepdim=True)).sum(-1) if transform.topk else None,
        arg,
    ), gradient


TRANSFORMS = [
    Transform(),
    Transform(topk=5),
    Transform(softcap=6.0),
    Transform(logit_scale=-0.5, topk=3),
    Transform(logit_scale=1.5, softcap=8.0, topk=20),
]


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("vocab", [1, 2, 37, 1500])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
@every_dtype
def test_statistics_are_wide_and_the_gradient_is_rounded_once(
    dtype: torch.dtype, transform: Transform, vocab: int
) -> None:
    generator = torch.Generator().manual_seed(vocab)
    product = (3 * torch.randn(6, vocab, generator=generator)).to(dtype)
    targets = torch.randint(vocab, (6,), generator=generator)
    targets[:3] = logits_of(product, transform)[:3].argmax(-1)
    slope = torch.tensor([1.0, -0.5, 2.0, 1e-3, 0.0, 1.0]).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    wanted, gradient = oracle(product, targets, slope, transform)
    kernel = TorchRows(product, transform, 6)
    assert kernel.block == 6
    stats = kernel.statistics(product, targets)
    exact = dtype == torch.float64
    assert stats.log_prob.dtype == (torch.float64 if exact else torch.float32)
    assert_stats_close(stats, to_dtype(wanted, slope.dtype), *((1e-12, 1e-13) if exact else (1e-5, 2e-6)))
    kernel.gradient_(product, targets, stats, slope)
    # Half a unit in the last place (of a subnormal number: half of the smallest), on top of float32 arithmetic.
    limits, wide_eps = torch.finfo(dtype), torch.finfo(slope.dtype).eps
    allowed = limits.eps / 2 * gradient.abs() + limits.smallest_normal * limits.eps / 2
    allowed += 20 * wide_eps * gradient.abs().amax(-1, keepdim=True)
    allowed += 1e-15 * slope.double().abs().unsqueeze(-1)  # of the oracle, whose 1 - p cancels
    assert ((product.double() - gradient).abs() <= allowed).all()


def test_a_smaller_last_block_does_not_see_what_is_left_of_the_one_before() -> None:
    kernel = TorchRows(torch.empty(5, 40), Transform(softcap=4.0, topk=3), 5)
    generator = torch.Generator().manual_seed(0)
    for n in (5, 2, 4):
        product = torch.randn(n, 40, generator=generator)
        targets, slope = torch.arange(n), torch.ones(n)
        wanted, gradient = oracle(product, targets, slope, kernel.transform)
        stats = kernel.statistics(product, targets)
        kernel.gradient_(product, targets, stats, slope)
        torch.testing.assert_close(stats.log_prob.double(), wanted.log_prob, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(product.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [DEFT(), Cayley(floor=0.5), EAFT(k=3)], ids=repr)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_several_blocks_of_a_chunk_are_one_block(
    objective: Objective, options: dict[str, float], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab, n = 1001, 531  # a chunk of 512 tokens and one of 19
    case = problem(n, vocab, masked=0.0, bias=True, weighted=True, **options)
    narrow = case.to(dtype)
    head = fused_loss(objective)

    def statistics() -> TokenStats:
        return linear_token_stats(
            narrow.hidden, narrow.weight, narrow.targets, bias=narrow.bias, topk=objective.topk, **options
        )

    monkeypatch.setattr(rows, "BLOCK_CPU", n * vocab)
    one, one_stats = differentiate(head, narrow), statistics()
    monkeypatch.setattr(rows, "BLOCK_CPU", 100 * vocab + 3)
    assert TorchRows(narrow.weight.new_empty(512, vocab), Transform(), 512).block == 100
    several, several_stats = differentiate(head, narrow), statistics()
    # Rows do not meet before dX and dW: only a sum over rows may be ordered differently.
    for found, wanted in zip(several, one, strict=True):
        assert distance(found, wanted) <= 1e-6
    assert_stats_close(several_stats, one_stats, rtol=1e-6, atol=0)
    if dtype == torch.float64:
        assert_close(several, differentiate(dense_loss(objective), case), 1e-10)


@pytest.mark.parametrize("entries", [0, 1, 1000])
def test_a_block_has_at_least_one_row_and_no_more_than_the_chunk(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BLOCK_CPU", entries)
    assert TorchRows(torch.empty(7, 100), Transform(), 7).block == min(7, max(1, entries // 100))


@every_dtype
@pytest.mark.parametrize("padding", [-torch.inf, "lowest"])
@pytest.mark.parametrize("where", ["front", "back", "everything but one"])
def test_entries_without_mass_have_no_gradient_and_disturb_no_statistic(
    dtype: torch.dtype, padding: float | str, where: str
) -> None:
    vocab = 1100  # searched by stripes, with a remainder
    product = torch.randn(4, vocab, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = {"front": slice(0, 300), "back": slice(1000, None), "everything but one": slice(0, vocab - 1)}[where]
    product[:, out] = float(padding) if padding != "lowest" else torch.finfo(dtype).min
    rest = [i for i in range(vocab) if i not in range(vocab)[out]]
    targets = torch.tensor([rest[0], rest[-1], rest[len(rest) // 2], rest[0]])
    slope = torch.ones(4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    among_rest = torch.tensor([rest.index(int(t)) for t in targets])
    wanted, _ = oracle(product[:, rest], among_rest, slope, Transform(topk=4))
    kernel = TorchRows(product, Transform(topk=4), 4)
    stats = kernel.statistics(product, targets)
    assert wanted.arg_max is not None
    wanted = wanted._replace(arg_max=torch.tensor(rest)[wanted.arg_max])
    assert_stats_close(stats, to_dtype(wanted, slope.dtype), 1e-5, 1e-6)
    kernel.gradient_(product, targets, stats, slope)
    assert not product[:, out].any() and torch.isfinite(product).all()


@pytest.mark.parametrize("vocab", [1, 9, 1100])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_with_nan_or_infinity_has_no_plausible_statistic_and_the_others_are_not_hurt(
    vocab: int, bad: float
) -> None:
    product = torch.randn(3, vocab, generator=torch.Generator().manual_seed(2))
    targets = torch.zeros(3, dtype=torch.int64)
    wanted, gradient = oracle(product, targets, torch.ones(3), Transform())
    for at in {0, vocab // 2, vocab - 1}:
        spoilt = product.clone()
        spoilt[1, at] = bad
        kernel = TorchRows(spoilt, Transform(), 3)
        stats = kernel.statistics(spoilt, targets)
        kernel.gradient_(spoilt, targets, stats, torch.ones(3))
        for found, right in zip(stats[:3], wanted[:3], strict=True):
            assert found is not None and right is not None
            assert found[1].isnan() and found[[0, 2]].isfinite().all()
            torch.testing.assert_close(found[[0, 2]].double(), right[[0, 2]], rtol=1e-5, atol=1e-6)
        assert spoilt[1].isnan().any()
        torch.testing.assert_close(spoilt[[0, 2]].double(), gradient[[0, 2]], rtol=1e-5, atol=1e-6)


@every_dtype
def test_nearly_certain_tokens_keep_their_digits(dtype: torch.dtype) -> None:
    gaps = torch.tensor([18.0, 21.0, 24.0, 27.0, 30.0])  # exact in every dtype; 1 - p is 1e-5 to 6e-11
    vocab = 1100
    product = torch.zeros(5, vocab, dtype=dtype)
    product[:, 700] = gaps.to(dtype)
    targets = torch.full((5,), 700)
    kernel = TorchRows(product, Transform(), 5)
    stats = kernel.statistics(product, targets)
    kernel.gradient_(product, targets, stats, torch.ones(5, dtype=stats.log_prob.dtype))
    # In closed form, because p - 1 would cancel in float64 too.
    tail = (vocab - 1) * (-gaps.double()).exp()
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(stats.log_prob.double(), -torch.log1p(tail), rtol=rtol, atol=0)
    entropy = torch.log1p(tail) + gaps.double() * tail / (1 + tail)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=rtol, atol=0)
    collision = (1 + tail * (-gaps.double()).exp()) / (1 + tail).square()
    torch.testing.assert_close(stats.collision.double(), collision, rtol=max(rtol / 10, 1e-12), atol=0)
    if dtype != torch.float16:  # 6e-11 is no float16: the head boosts gradients for it
        rounding = max(rtol, torch.finfo(dtype).eps)
        torch.testing.assert_close(product[:, 700].double(), tail / (1 + tail), rtol=rounding, atol=0)


@pytest.mark.parametrize("offset", [0.0, 100.0, 2000.0, -10_000.0, 1e6])
def test_nothing_depends_on_what_all_logits_have_in_common(offset: float) -> None:
    # Eighths, so that float32 holds them beside the offset: these are the very logits the oracle sees.
    steps = torch.randint(-40, 40, (3, 301), generator=torch.Generator().manual_seed(15))
    product, targets = steps / 8 + offset, torch.tensor([0, 17, 300])
    wanted, gradient = oracle(product, targets, torch.ones(3), Transform())
    kernel = TorchRows(product, Transform(), 3)
    stats = kernel.statistics(product, targets)
    kernel.gradient_(product, targets, stats, torch.ones(3))
    torch.testing.assert_close(stats.log_prob.double(), wanted.log_prob, rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.entropy.double(), wanted.entropy, rtol=1e-5, atol=0)
    torch.testing.assert_close(product.double(), gradient, rtol=1e-5, atol=0)
