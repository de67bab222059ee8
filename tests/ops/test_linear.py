"""The fused head against a dense float64 head that shares no code with it, for every objective of the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense import (
    FP32,
    OBJECTIVES,
    Problem,
    Result,
    assert_close,
    assert_stats_close,
    context_for,
    dense_logits,
    dense_loss,
    differentiate,
    distance,
    fused_loss,
    peak_bytes,
    problem,
    stats_from_logits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.objectives import (
    DEFT,
    EAFT,
    NLL,
    Cayley,
    Objective,
    Tsallis,
)
from deft_lightning.ops import buffers, chunked, plan
from deft_lightning.ops.linear import linear_loss, linear_token_stats
from deft_lightning.ops.torch_rows import Transform

every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
quick = settings(deadline=None, max_examples=50, derandomize=True)


# --- linear_loss against the dense head -----------------------------------------------------------------------------

# Odd vocabularies, no token, one token, and counts on either side of a chunk of 512 and of two.
SHAPES = [(0, 7), (1, 1), (1, 2), (1, 33), (5, 1), (17, 101), (511, 37), (512, 37), (513, 37), (1025, 19)]


@pytest.mark.slow
@pytest.mark.parametrize(("n", "vocab"), SHAPES)
@every_objective
def test_linear_loss_matches_dense_float64_for_every_shape(objective: Objective, n: int, vocab: int) -> None:
    case = problem(n, vocab, masked=0.0, seed=n + vocab)
    wanted = differentiate(dense_loss(objective), case)
    found = differentiate(fused_loss(objective), case.to(torch.float32))
    assert found.loss.dtype == torch.float32 and found.loss.shape == ()
    assert_close(found, wanted, FP32)
    assert_close(differentiate(fused_loss(objective), case), wanted, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [40, 1100])
def test_rows_of_logits_that_lie_apart_give_the_same(
    n: int, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problem(n, 37, bias=bias, seed=4).to(dtype)
    wanted = differentiate(fused_loss(DEFT()), case)
    made: list[Tensor] = []

    def apart(like: Tensor, rows: int, columns: int) -> Tensor:
        made.append(like.new_full((rows, columns + 27), torch.nan))
        made[-1][:, columns:] = 0
        return made[-1][:, :columns]

    monkeypatch.setattr(chunked, "row_buffer", apart)
    assert_close(differentiate(fused_loss(DEFT()), case), wanted, 1e-6)
    assert made and not any(bool(one[:, 37:].any()) for one in made)  # nobody writes between them


def test_on_cuda_each_row_of_logits_begins_at_an_address_for_wide_loads() -> None:
    here = buffers.row_buffer(torch.empty(0), 3, 50_257)
    assert here.shape == (3, 50_257) and here.is_contiguous()
    there = buffers.row_buffer(torch.empty(0, device="meta", dtype=torch.bfloat16), 3, 50_257)
    assert there.shape == (3, 50_257) and there.stride() == (50_304, 1)
    assert buffers.row_buffer(torch.empty(0, device="meta"), 3, 49_152).is_contiguous()


OPTIONS: dict[str, dict[str, Any]] = {
    "masked": {"masked": 0.5},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "logit_scale": {"logit_scale": 0.25},
    "token_weight": {"weighted": True},
    "everything": {"masked": 0.4, "bias": True, "softcap": 4.0, "logit_scale": 1.7, "weighted": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
@every_objective
def test_linear_loss_matches_dense_float64_for_every_option(objective: Objective, option: str) -> None:
    case = problem(700, 23, seed=1, **OPTIONS[option])
    wanted = differentiate(dense_loss(objective), case, upstream=0.37)
    assert_close(differentiate(fused_loss(objective), case.to(torch.float32), upstream=0.37), wanted, FP32)


@pytest.mark.parametrize("count", [0, 1, 600])
@every_objective
def test_a_batch_without_supervised_tokens_is_a_zero_with_zero_gradients(objective: Objective, count: int) -> None:
    case = problem(count, 11, masked=1.0, bias=True, weighted=True).to(torch.float32)
    found = differentiate(fused_loss(objective), case)
    assert found.loss.item() == 0
    for grad in found[1:]:
        assert grad is not None and not grad.any()


@quick
@given(
    n=st.integers(0, 40),
    vocab=st.integers(1, 30),
    dim=st.integers(1, 9),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    bias=st.booleans(),
    weighted=st.booleans(),
    options=st.sampled_from([{}, {"softcap": 2.0}, {"logit_scale": -0.5}, {"softcap": 30.0, "logit_scale": 4.0}]),
    upstream=st.sampled_from([1.0, -2.5, 1e-4, 0.0]),
    which=st.integers(0, len(OBJECTIVES) - 1),
    seed=st.integers(0, 10_000),
)
def test_linear_loss_is_exact_in_float64_for_any_combination(
    n: int, vocab: int, dim: int, masked: float, bias: bool, weighted: bool, options: dict[str, float],
    upstream: float, which: int, seed: int,
) -> None:  # fmt: skip
    case = problem(n, vocab, dim, masked=masked, bias=bias, weighted=weighted, seed=seed, **options)
    wanted = differentiate(dense_loss(OBJECTIVES[which]), case, upstream)
    assert_close(differentiate(fused_loss(OBJECTIVES[which]), case, upstream), wanted, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("n", [100, 1100])
@every_objective
def test_bfloat16_is_no_worse_than_twice_the_dense_bfloat16_head(objective: Objective, n: int) -> None:
    narrow = problem(n, 61, dim=16, masked=0.2, bias=True, seed=3).to(torch.bfloat16)
    oracle = differentiate(dense_loss(objective), narrow.to(torch.float64), upstream=0.01)
    dense = differentiate(dense_loss(objective), narrow, upstream=0.01)
    fused = differentiate(fused_loss(objective), narrow, upstream=0.01)
    assert fused.loss.dtype == torch.float32
    for name, found, plain, wanted in zip(Result._fields, fused, dense, oracle, strict=True):
        assert found is not None and plain is not None and wanted is not None
        assert found.dtype == plain.dtype
        error, allowed = ((x.double() - wanted).norm().item() / wanted.norm().item() for x in (found, plain))
        # The sum of the losses can be right by luck; it is then held to float32.
        assert error <= 2 * allowed + 1e-6, f"{name}: {error:.2e} against {allowed:.2e}"


@pytest.mark.parametrize("upstream", [1 / 300, 0.01, 0.7])
def test_upstream_scalar_is_not_rounded_to_bfloat16(upstream: float) -> None:
    # Rounded, it would scale every gradient alike (1 / 300 by 0.998); the rounding of the entries averages out.
    narrow = problem(400, 61, dim=16, masked=0.0, seed=19).to(torch.bfloat16)
    one, scaled = (differentiate(fused_loss(NLL()), narrow, factor) for factor in (1.0, upstream))
    for full, part in [(one.hidden, scaled.hidden), (one.weight, scaled.weight)]:
        assert full is not None and part is not None
        share = (full.double() * part.double()).sum() / full.double().square().sum()
        assert share.item() == pytest.approx(upstream, rel=3e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_gradient_of_a_nearly_certain_token_does_not_cancel(dtype: torch.dtype) -> None:
    gaps = torch.tensor([18.0, 24.0, 30.0])  # 1 - p is 9e-8 to 6e-13: p - 1 keeps no digit of it
    hidden = torch.zeros(3, 7)
    hidden[:, 4] = gaps
    hidden = hidden.to(dtype).requires_grad_()
    loss, _ = linear_loss(hidden, torch.eye(7, dtype=dtype), torch.full((3,), 4), NLL())
    (grad,) = torch.autograd.grad(loss, hidden)
    away = 6 * (-gaps.double()).exp()
    # A logit is known to its rounding alone, and so is the logarithm of what it gives.
    error = (grad[:, 4].double() / (-away / (1 + away)) - 1).abs()
    assert (error <= torch.finfo(dtype).eps * (2 + gaps)).all()


@pytest.mark.parametrize("frozen", [("weight",), ("weight", "bias"), ("hidden",), ("hidden", "bias")])
@pytest.mark.parametrize("objective", [DEFT(), Cayley(floor=0.5)], ids=repr)
def test_frozen_inputs_get_no_gradient_and_change_no_other(objective: Objective, frozen: tuple[str, ...]) -> None:
    case = problem(600, 13, bias=True, seed=4).to(torch.float32)
    whole = differentiate(fused_loss(objective), case)
    part = differentiate(fused_loss(objective), case, frozen=frozen)
    for name, before, after in zip(Result._fields, whole, part, strict=True):
        if name in frozen:
            assert after is None
        else:
            assert before is not None and after is not None
            torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("objective", [DEFT(), Cayley(floor=0.5), EAFT(k=3)], ids=repr)
def test_statistics_of_linear_loss_are_those_of_all_tokens_detached(objective: Objective) -> None:
    case = problem(700, 29, masked=0.4, bias=True, softcap=5.0, seed=5)
    keep = case.targets != -100
    wanted = stats_from_logits(dense_logits(case), case.targets.clamp_min(0), objective.topk)
    leaf = case.hidden.float().requires_grad_()
    narrow = case.to(torch.float32)
    assert narrow.bias is not None
    _, stats = linear_loss(leaf, narrow.weight, case.targets, objective, bias=narrow.bias, **case.options)
    for found, field in zip(stats, wanted, strict=True):
        assert (found is None) == (field is None)
        if found is not None and field is not None:
            assert found.shape == (700,) and not found.requires_grad and not found[~keep].any()
            torch.testing.assert_close(found[keep].to(field.dtype), field[keep], rtol=1e-4, atol=1e-5)


def test_linear_loss_honours_the_ignore_index() -> None:
    case = problem(30, 9, masked=0.0, seed=6)
    case.targets[::4] = 3
    by_default, _ = linear_loss(case.hidden, case.weight, case.targets.masked_fill(case.targets == 3, -100), DEFT())
    found, stats = linear_loss(case.hidden, case.weight, case.targets, DEFT(), ignore_index=3)
    assert found.item() == by_default.item() and not stats.log_prob[case.targets == 3].any()


def test_any_callable_serves_as_an_objective() -> None:
    def margin(stats: TokenStats) -> Tensor:
        return (-stats.log_prob - 1.0).clamp_min(0) * (1 + stats.entropy) / (1 + stats.collision)

    case = problem(600, 21, bias=True, seed=7)
    assert_close(
        differentiate(fused_loss(margin), case.to(torch.float32)), differentiate(dense_loss(margin), case), FP32
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_token_weights_of_any_dtype_are_taken_and_get_no_gradient(dtype: torch.dtype) -> None:
    case = problem(40, 9, masked=0.2, seed=8)
    token_weight = torch.randint(0, 2, (40,), generator=torch.Generator().manual_seed(0)).to(dtype)
    if dtype.is_floating_point:
        token_weight = (token_weight * 0.5 + 0.25).requires_grad_()
    wanted = differentiate(dense_loss(DEFT()), case._replace(token_weight=token_weight.detach().double()))
    leaves = [t.float().requires_grad_() for t in (case.hidden, case.weight)]
    loss, _ = linear_loss(leaves[0], leaves[1], case.targets, DEFT(), token_weight=token_weight)
    loss.backward()
    assert loss.dtype == torch.float32 and token_weight.grad is None
    assert_close(Result(loss.detach(), leaves[0].grad, leaves[1].grad, None), wanted, FP32)


def test_backward_twice_gives_the_same_gradients_and_double_backward_is_refused() -> None:
    case = problem(40, 9, seed=9)
    hidden = case.hidden.requires_grad_()
    loss, _ = linear_loss(hidden, case.weight, case.targets, DEFT())
    (first,) = torch.autograd.grad(3 * loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, hidden, retain_graph=True)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(loss.square(), hidden, create_graph=True)


def test_strides_do_not_matter() -> None:
    case = problem(600, 9, seed=10)
    strided = case._replace(hidden=case.hidden.T.contiguous().T, weight=case.weight.T.contiguous().T)
    head = fused_loss(DEFT())

    def with_strides(c: Problem) -> Tensor:
        # The leaves are contiguous copies: take the strided view inside the graph.
        hidden, weight = c.hidden.T.contiguous().T, c.weight.T.contiguous().T
        assert not hidden.is_contiguous() and not weight.is_contiguous()
        return head(c._replace(hidden=hidden, weight=weight))

    assert_close(differentiate(with_strides, strided), differentiate(head, case), 1e-12)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("n", [50, 1100])
@pytest.mark.parametrize("objective", [DEFT(), Cayley(floor=0.5), EAFT(k=3)], ids=repr)
def test_linear_loss_has_the_same_value_where_gradients_are_off(
    objective: Objective, n: int, context: Callable[[], Any]
) -> None:
    case = problem(n, 17, seed=11)
    leaf = case.hidden.clone().requires_grad_()
    wanted, wanted_stats = linear_loss(leaf, case.weight, case.targets, objective)
    with context():
        found, stats = linear_loss(leaf, case.weight, case.targets, objective)
    assert not found.requires_grad
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert_stats_close(stats, wanted_stats, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o != Tsallis(q=1.5)], ids=repr)
def test_extreme_and_padded_logits_give_finite_values_and_gradients(objective: Objective, dtype: torch.dtype) -> None:
    # Rows: +-1e4 at the target and elsewhere, one-hot, uniform; the last two vocabulary entries are padding.
    hidden = torch.tensor([[1e4, -1e4, 0, 0], [-1e4, 1e4, 0, 0], [0, 0, 1e4, 1e4], [-1e4] * 4, [0] * 4, [90, 0, 0, 0]])
    weight = torch.eye(6, 4)
    bias = torch.tensor([0.0, 0, 0, 0, -torch.inf, -torch.inf])
    case = Problem(hidden.repeat(2, 1), weight, torch.arange(2).repeat_interleave(6), bias).to(dtype)
    found = differentiate(fused_loss(objective), case)
    assert all(value is not None and torch.isfinite(value).all() for value in found)
    assert found.bias is not None and not found.bias[4:].any()


# --- autocast -------------------------------------------------------------------------------------------------------


def under_autocast(head: Callable[[Problem], Tensor]) -> Callable[[Problem], Tensor]:
    def run(case: Problem) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return head(case)

    return run


@pytest.mark.parametrize("objective", [NLL(), DEFT(), Cayley(floor=0.5)], ids=repr)
def test_autocast_is_mirrored_with_float32_gradients_no_worse_than_twice_the_dense_error(objective: Objective) -> None:
    case = problem(700, 61, dim=16, bias=True, seed=12)
    oracle = differentiate(dense_loss(objective), case)
    plain = case.to(torch.float32)
    dense = differentiate(under_autocast(dense_loss(objective)), plain)
    fused = differentiate(under_autocast(fused_loss(objective)), plain)
    for name, found, reference, wanted in zip(Result._fields, fused, dense, oracle, strict=True):
        assert found is not None and reference is not None and wanted is not None
        assert found.dtype == torch.float32
        error, allowed = ((x.double() - wanted).norm().item() / wanted.norm().item() for x in (found, reference))
        assert error <= 2 * allowed + 1e-6, f"{name}: {error:.2e} against {allowed:.2e}"
    # The product really ran in bfloat16, as F.linear would have.
    assert distance(fused.hidden, differentiate(fused_loss(objective), plain).hidden) > 1e-4


@pytest.mark.parametrize("objective", [DEFT(), Cayley(floor=0.5)], ids=repr)
@pytest.mark.parametrize("stats_only", [False, True])
def test_autocast_is_a_cast_of_every_input_forward_and_backward(objective: Objective, stats_only: bool) -> None:
    def cast(case: Problem) -> Tensor:
        return head(case.to(torch.bfloat16))

    def through_stats(case: Problem) -> Tensor:
        return objective(linear_token_stats(case.hidden, case.weight, case.targets, bias=case.bias)).sum()

    head = through_stats if stats_only else fused_loss(objective)
    case = problem(700, 61, dim=16, masked=0.0, bias=True, seed=20).to(torch.float32)
    found, wanted = differentiate(under_autocast(head), case), differentiate(cast, case)
    assert_close(found._replace(weight=wanted.weight, bias=wanted.bias), wanted, 1e-6)
    # Gradients of float32 parameters are float32 sums that were never rounded to bfloat16; those of the cast were.
    assert found.weight is not None and found.weight.dtype == torch.float32
    assert_close(found, wanted, torch.finfo(torch.bfloat16).eps)
    assert distance(found.weight, wanted.weight) > 1e-4


def test_autocast_leaves_float64_alone() -> None:
    case = problem(600, 13, bias=True, seed=13)
    assert_close(
        differentiate(under_autocast(fused_loss(DEFT())), case), differentiate(dense_loss(DEFT()), case), 1e-10
    )


def test_statistics_under_autocast_are_those_of_the_bfloat16_product() -> None:
    case = problem(200, 13, masked=0.0, bias=True, seed=14).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_token_stats(case.hidden, case.weight, case.targets, bias=case.bias)
        logits = torch.nn.functional.linear(case.hidden, case.weight, case.bias)
    assert logits.dtype == torch.bfloat16 and found.log_prob.dtype == torch.float32
    assert_stats_close(found, stats_from_logits(logits.double(), case.targets, 0), rtol=1e-5, atol=1e-6)


# --- linear_token_stats ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("topk", [0, 4])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("n", "vocab"), SHAPES)
def test_linear_token_stats_and_its_gradient_match_dense_float64(n: int, vocab: int, option: str, topk: int) -> None:
    case = problem(n, vocab, seed=15, **OPTIONS[option])
    keep = case.targets != -100
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(1)).double()

    def fused(c: Problem) -> Tensor:
        stats = linear_token_stats(c.hidden, c.weight, c.targets, bias=c.bias, topk=topk, **c.options)
        wanted = stats_from_logits(dense_logits(case), case.targets.clamp_min(0), topk)
        for f, w in zip(stats, wanted, strict=True):
            assert (f is None) == (w is None)
            if f is not None and w is not None:
                assert f.shape == (n,) and not f[~keep].any()
                assert f.dtype in (torch.bool, torch.float32, torch.int64)
                torch.testing.assert_close(f[keep].to(w.dtype), w[keep], rtol=1e-4, atol=1e-5)
        assert [f is not None and f.requires_grad for f in stats] == [True, *[False] * (len(stats) - 1)]
        return (stats.log_prob * upstream.float()).sum()

    def dense(c: Problem) -> Tensor:
        stats = stats_from_logits(dense_logits(c)[keep], c.targets[keep], 0)
        return (stats.log_prob * upstream[keep]).sum()

    wanted = differentiate(dense, case)
    found = differentiate(fused, case.to(torch.float32))
    # The sum over tokens of either sign cancels; it is covered by the statistics themselves.
    assert_close(found._replace(loss=wanted.loss), wanted, FP32)


@every_objective
def test_an_objective_on_linear_token_stats_has_the_gradients_of_linear_loss(objective: Objective) -> None:
    if objective.needs.reference:
        pytest.skip("statistics with a reference have no gradient, and say so")
    case = problem(600, 17, masked=0.0, bias=True, seed=16)

    def through_stats(c: Problem) -> Tensor:
        stats = linear_token_stats(c.hidden, c.weight, c.targets, bias=c.bias, topk=objective.topk)
        return objective(stats.within(context_for(objective, c))).sum()

    assert_close(differentiate(through_stats, case), differentiate(fused_loss(objective), case), 1e-10)


def test_linear_token_stats_honours_ignore_index_and_frozen_inputs() -> None:
    case = problem(30, 9, masked=0.0, seed=17)
    case.targets[::4] = 3
    hidden = case.hidden.requires_grad_()
    found = linear_token_stats(hidden, case.weight, case.targets, ignore_index=3)
    wanted = linear_token_stats(hidden, case.weight, case.targets.masked_fill(case.targets == 3, -100))
    assert_stats_close(found, wanted, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(found.log_prob.sum(), hidden)
    assert not grad[case.targets == 3].any() and grad[case.targets != 3].any()
    assert case.weight.grad is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_linear_token_stats_works_where_gradients_are_off(context: Callable[[], Any]) -> None:
    case = problem(600, 9, seed=18)
    with context():
        found = linear_token_stats(case.hidden, case.weight, case.targets, topk=2)
    wanted = linear_token_stats(case.hidden, case.weight, case.targets, topk=2)
    assert_stats_close(found, wanted, rtol=0, atol=0)


# --- what is refused ------------------------------------------------------------------------------------------------

BAD_CALLS: dict[str, dict[str, Any]] = {
    "hidden with a batch dimension": {"hidden": torch.zeros(2, 3, 4)},
    "too few targets": {"targets": torch.zeros(4, dtype=torch.int64)},
    "targets with a batch dimension": {"targets": torch.zeros(5, 1, dtype=torch.int64)},
    "another width": {"weight": torch.zeros(7, 3)},
    "weight without rows": {"weight": torch.zeros(4)},
    "unknown backend": {"backend": "cuda-magic"},
}


@pytest.mark.parametrize("bad", BAD_CALLS)
@pytest.mark.parametrize("stats_only", [False, True])
def test_shapes_that_do_not_fit_and_unknown_backends_are_refused_in_one_line(bad: str, stats_only: bool) -> None:
    call: dict[str, Any] = {
        "hidden": torch.zeros(5, 4), "weight": torch.zeros(7, 4), "targets": torch.zeros(5, dtype=torch.int64),
    }  # fmt: skip
    call |= BAD_CALLS[bad]
    with pytest.raises(UserError) as refused:
        if stats_only:
            linear_token_stats(**call)
        else:
            linear_loss(**call, objective=NLL())
    message = str(refused.value)
    assert len(message.splitlines()) == 1 and (
        "cuda-magic" in message if bad == "unknown backend" else "(N, D)" in message
    )


# --- memory ---------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Records the largest storage behind any tensor that any operator, forward or backward, returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.made: set[tuple[int, int]] = set()  # (address, entries) of every storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.bytes = max(self.bytes, storage.nbytes())
                self.made.add((storage.data_ptr(), storage.nbytes() // leaf.element_size()))
        return out


VOCAB = 1001


def watched(head: Callable[[Problem], Tensor], n: int) -> LargestTensor:
    case = problem(n, VOCAB, dim=4, masked=0.0, bias=True).to(torch.float32)
    with LargestTensor() as watch:
        differentiate(head, case)
    return watch


def peak_of(head: Callable[[Problem], Tensor], n: int) -> int:
    case = problem(n, VOCAB, dim=4, masked=0.0, bias=True).to(torch.float32)
    buffers.release()
    return peak_bytes(lambda: differentiate(head, case))


def through_stats(case: Problem) -> Tensor:
    return DEFT()(linear_token_stats(case.hidden, case.weight, case.targets, bias=case.bias)).sum()


MEMORY_HEADS = {
    "one pass": fused_loss(DEFT()),
    "two passes": fused_loss(Cayley(floor=0.5)),
    "top-k": fused_loss(EAFT(k=5)),
    "statistics": through_stats,
}


@pytest.mark.slow
@pytest.mark.parametrize("head", MEMORY_HEADS.values(), ids=MEMORY_HEADS.keys())
def test_no_tensor_of_all_logits_is_ever_made(head: Callable[[Problem], Tensor]) -> None:
    n = 3000
    everything = n * VOCAB * 4
    # The instrument sees the dense head make it ...
    assert watched(dense_loss(DEFT()), n).bytes >= everything
    # ... and the fused head stays at a fixed number of rows, however many tokens there are.
    watch = watched(head, n)
    assert watch.bytes <= everything / 2.5
    assert watch.bytes == watched(head, 2 * n).bytes


@pytest.mark.slow
@pytest.mark.parametrize("head", MEMORY_HEADS.values(), ids=MEMORY_HEADS.keys())
def test_peak_memory_does_not_grow_with_the_number_of_tokens(head: Callable[[Problem], Tensor]) -> None:
    n = 1500
    everything = n * VOCAB * 4
    assert peak_of(dense_loss(DEFT()), 2 * n) - peak_of(dense_loss(DEFT()), n) >= everything
    assert peak_of(head, 2 * n) - peak_of(head, n) <= 0.05 * everything


@pytest.mark.parametrize("objective", [DEFT(), Cayley(floor=0.5)], ids=repr)
@pytest.mark.parametrize("frozen", [False, True])
def test_only_a_head_that_trains_makes_a_gradient_of_its_size(objective: Objective, frozen: bool) -> None:
    case = problem(600, VOCAB, dim=4).to(torch.float32)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(not frozen)
    with LargestTensor() as watch:
        linear_loss(hidden, weight, case.targets, objective)[0].backward()
    own = weight.untyped_storage().data_ptr()
    fresh = [entries for address, entries in watch.made if entries == VOCAB * 4 and address != own]
    assert bool(fresh) != frozen


class HeadProducts(TorchDispatchMode):
    """Counts the products that make logits, and the tokens in them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.mm and out.shape[1] == VOCAB:
            self.tokens.append(len(out))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("objective", "n", "products"),
    [
        (DEFT(), 300, [300]), (DEFT(), 1100, [367, 367, 366]), (Cayley(floor=0.5), 300, [300]),
        (Cayley(floor=0.5), 1100, [367, 367, 366, 367, 367]),
    ],
    ids=repr,
)  # fmt: skip
def test_the_last_chunk_of_an_objective_that_wants_all_tokens_first_is_not_multiplied_again(
    objective: Objective, n: int, products: list[int], dtype: torch.dtype
) -> None:
    case = problem(n, VOCAB, dim=4, masked=0.0).to(dtype)
    with HeadProducts() as watch:
        linear_loss(case.hidden.requires_grad_(), case.weight.requires_grad_(), case.targets, objective)
    assert watch.tokens == products


@pytest.mark.parametrize(("vocabulary", "tokens"), [(1, 1 << 18), (64, 4096), (260, 1008), (512, 512), (152_000, 512)])
def test_a_chunk_has_more_tokens_where_the_vocabulary_is_small(
    vocabulary: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "SMALL_CPU", 1 << 18)  # this folder's tests run without it
    shape = plan.CallShape(1 << 20, 8, vocabulary, torch.float32, cpu=True, narrow_weight=True)
    size = plan.Plan(NLL(), Transform(), "torch").chunk(shape)
    assert tokens * 0.99 < size <= tokens  # chunks of one size


@pytest.mark.parametrize("ignored", [0, 1])
def test_hidden_states_are_copied_only_where_some_are_ignored(ignored: int) -> None:
    case = problem(40, 30, dim=64, masked=0.0)
    hidden = case.hidden.requires_grad_()
    targets = case.targets.clone()
    targets[:ignored] = -100
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_loss(hidden, case.weight, targets, NLL())
    assert (hidden.data_ptr() in saved) == (not ignored)
