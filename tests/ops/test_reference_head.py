"""The KL to a reference through the fused head: dense, fused and plain autograd agree on loss and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats, token_loss, token_stats
from deft_lightning.objectives import (
    DEFT,
    DFT,
    EAFT,
    NLL,
    Cayley,
    Floored,
    KLAnchor,
    Mix,
    Objective,
    Rescaled,
    RunState,
    Schedule,
    Truncated,
)
from deft_lightning.ops import ReferenceHead, linear_loss, linear_token_stats, plan

N, D, V, R = 70, 6, 13, 3
ANCHORED: list[Objective] = [
    KLAnchor(weight=0.3),
    KLAnchor(base=DFT(), weight=2.0),
    KLAnchor(base=Cayley(floor=0.5), weight=0.7),  # needs the batch first
    KLAnchor(base=EAFT(k=4), weight=0.7),
    Mix(first=KLAnchor(base=DEFT(), weight=1.0), second=NLL(), weight=0.25),
    Rescaled(base=KLAnchor(weight=0.3)).at(RunState(mean_gate=0.5)),
    Floored(base=KLAnchor(base=DEFT(), weight=0.3), floor=0.4),
    Truncated(threshold=0.1, base=KLAnchor(weight=0.3)),
    Schedule(then=KLAnchor(weight=0.3), switch=0.2, blend=0.5).at(RunState(0.5)),
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"softcap": 3.0},
    {"logit_scale": 0.4},
    {"softcap": 2.0, "logit_scale": -0.5},
]


class Case:
    """A head that has moved away from its reference, in float64."""

    def __init__(self, seed: int = 0, adapted: bool = True, count: int = N) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.hidden, self.weight, self.bias = draw(count, D), draw(V, D), draw(V)
        self.low, self.up = draw(count, R), 0.3 * draw(V, R)
        self.targets = torch.randint(V, (count,), generator=generator)
        self.targets[::7] = -100
        self.factor = torch.rand(count, dtype=torch.float64, generator=generator)
        low, up = (0.5 * draw(count, R), draw(V, R)) if adapted else (None, None)
        self.reference = ReferenceHead(
            self.hidden + 0.5 * draw(count, D), self.weight + 0.2 * draw(V, D), draw(V), low, up
        )

    def leaves(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        tensors = (self.hidden, self.weight, self.bias, self.low, self.up)
        return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def logits_of(hidden: Tensor, weight: Tensor, bias: Any, low: Any, up: Any, options: dict[str, Any]) -> Tensor:
    z = hidden @ weight.t()
    z = z if bias is None else z + bias
    z = z if low is None else z + low @ up.t()
    z = z * options.get("logit_scale", 1.0)
    cap = options.get("softcap")
    return cap * torch.tanh(z / cap) if cap else z


def oracle(case: Case, objective: Objective, leaves: list[Tensor], options: dict[str, Any]) -> Tensor:
    """Nothing of the package but the formula of the objective: KL and log p by torch, differentiated by torch."""
    kept = case.targets != -100
    log_pi = logits_of(*leaves, options)[kept].log_softmax(-1)  # type: ignore[arg-type]
    log_pi0 = logits_of(*case.reference, options)[kept].log_softmax(-1)
    divergence = (log_pi0.exp() * (log_pi0 - log_pi)).sum(-1)
    pi, entropy = log_pi.detach().exp(), -(log_pi.exp() * log_pi).sum(-1).detach()
    largest = pi.topk(max(objective.topk, 2), dim=-1).values
    largest = largest / largest.sum(-1, keepdim=True)
    targets, factor = case.targets[kept], case.factor[kept]
    stats = TokenStats(
        log_pi.gather(-1, targets.unsqueeze(-1)).squeeze(-1), pi.square().sum(-1), entropy, pi.argmax(-1) == targets,
        -(largest * largest.log()).sum(-1) if objective.topk else None, pi.argmax(-1), factor, reference_kl=divergence,
    )  # fmt: skip
    return (objective(stats) * factor).sum()


def fused(case: Case, objective: Objective, leaves: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, TokenStats]:
    hidden, weight, bias, low, up = leaves
    return linear_loss(
        hidden, weight, case.targets, objective, bias=bias, adapter=(low, up), token_weight=case.factor,
        reference=case.reference, **options,
    )  # fmt: skip


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], rtol: float = 1e-9, atol: float = 1e-10) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=atol)


@pytest.fixture(params=[512, 16])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(plan, "CHUNK_CPU", request.param)
    return int(request.param)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("objective", ANCHORED, ids=repr)
def test_fused_dense_and_plain_autograd_agree(objective: Objective, options: dict[str, Any], chunk: int) -> None:
    case = Case()
    leaves = case.leaves()
    wanted = oracle(case, objective, leaves, options)
    gradients = torch.autograd.grad(wanted, leaves)
    loss, stats = fused(case, objective, leaves, options)
    torch.testing.assert_close(loss, wanted)
    assert_same(torch.autograd.grad(loss, leaves), gradients)
    reference_logits = logits_of(*case.reference, options)
    dense = token_loss(
        logits_of(*leaves, options), case.targets, objective, token_weight=case.factor,  # type: ignore[arg-type]
        reference_logits=reference_logits,
    )  # fmt: skip
    torch.testing.assert_close(dense.sum(), wanted)
    assert_same(torch.autograd.grad(dense.sum(), leaves), gradients)
    own = token_stats(logits_of(*leaves, options), case.targets, reference_logits=reference_logits)  # type: ignore[arg-type]
    assert own.reference_kl is not None and stats.reference_kl is not None
    torch.testing.assert_close(stats.reference_kl, own.reference_kl.detach())
    assert not stats.reference_kl.requires_grad and (stats.reference_kl[case.targets == -100] == 0).all()


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_gradient_by_logits_is_gate_times_error_and_the_pull(weight: float) -> None:
    case, objective = Case(), KLAnchor(base=DEFT(), weight=weight)
    logits = case.hidden @ case.weight.t()
    reference = case.reference.hidden @ case.reference.weight.t()
    targets = case.targets.clamp_min(0)
    leaf = logits.clone().requires_grad_()
    loss = token_loss(leaf, targets, objective, reference_logits=reference)
    (found,) = torch.autograd.grad(loss.sum(), leaf)
    pi, pi0 = logits.softmax(-1), reference.softmax(-1)
    error = pi - torch.nn.functional.one_hot(targets, V)
    gate = objective.gate(token_stats(logits, targets, reference_logits=reference))
    torch.testing.assert_close(gate, DEFT().gate(token_stats(logits, targets)))
    torch.testing.assert_close(found, gate.unsqueeze(-1) * error + weight * (pi - pi0))


def test_weight_zero_is_the_base_bit_for_bit_and_wants_no_reference() -> None:
    case, leaves = Case(), Case().leaves(torch.float32)
    anchored, base = KLAnchor(base=DEFT(), weight=0.0), DEFT()
    assert not anchored.needs.reference and KLAnchor().needs.reference
    hidden, weight, bias, low, up = leaves
    results = []
    for objective in (anchored, base):
        loss, stats = linear_loss(hidden, weight, case.targets, objective, bias=bias, adapter=(low, up))
        assert stats.reference_kl is None
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_reference_that_nobody_looks_at_changes_no_bit() -> None:
    case, leaves = Case(), Case().leaves(torch.float32)
    results = []
    for reference in (None, case.reference):
        hidden, weight, bias, low, up = leaves
        loss, _ = linear_loss(
            hidden, weight, case.targets, DEFT(), bias=bias, adapter=(low, up), reference=reference, backend="torch"
        )
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_the_model_has_not_moved_the_kl_and_its_gradient_are_exactly_zero(dtype: torch.dtype) -> None:
    case = Case()
    hidden, weight = case.hidden.to(dtype).requires_grad_(), (5 * case.weight).to(dtype)
    reference = ReferenceHead(hidden.detach(), weight)
    loss, stats = linear_loss(hidden, weight, case.targets, Pull(), reference=reference)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == 0 and not gradient.any()
    assert stats.reference_kl is not None and not stats.reference_kl.any()
    dense = token_stats(hidden @ weight.t(), case.targets, reference_logits=hidden @ weight.t()).reference_kl
    assert dense is not None and not dense.any()


class Pull:
    """The KL alone: a loss that does not depend on the label. No class of the tree, which other tests walk."""

    topk = 0

    def __call__(self, stats: TokenStats) -> Tensor:
        assert stats.reference_kl is not None
        return stats.reference_kl


def test_a_loss_of_the_kl_alone_trains_towards_the_reference(chunk: int) -> None:
    case = Case()
    leaves = case.leaves()
    loss, _ = fused(case, Pull(), leaves, {})
    wanted = oracle(case, Pull(), leaves, {})
    torch.testing.assert_close(loss, wanted)
    assert_same(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_low_precision_is_as_near_as_the_dense_one(dtype: torch.dtype, rtol: float) -> None:
    case = Case()
    leaves = case.leaves(dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    case.reference = case.reference.map(lambda tensor: tensor.to(dtype).double())
    wanted = oracle(case, ANCHORED[1], exact, {})
    loss, _ = fused(case, ANCHORED[1], leaves, {})
    assert loss.item() == pytest.approx(wanted.item(), rel=rtol)
    for one, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, exact), strict=True):
        assert (one.double() - other).norm() <= rtol * other.norm()


def test_barred_entries_and_far_predictions_are_finite() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, reference = (50 * torch.randn(20, 9, generator=generator) for _ in range(2))
    logits[:, 7:], reference[:, 7:] = -torch.inf, -torch.inf
    reference[:10, 6] = -torch.inf  # barred there alone
    logits[:2, 0], reference[:2, 1] = 1e4, 1e4
    leaf = logits.clone().requires_grad_()
    targets = torch.randint(6, (20,), generator=generator)
    stats = token_stats(leaf, targets, reference_logits=reference)
    eye = torch.eye(20)
    _, own = linear_loss(eye, logits.t().clone().nan_to_num(neginf=0.0), targets, NLL())  # a head of finite weights
    assert stats.reference_kl is not None and torch.isfinite(stats.reference_kl).all() and own is not None
    (gradient,) = torch.autograd.grad(stats.reference_kl.sum(), leaf)
    assert torch.isfinite(gradient).all() and not gradient[:, 7:].any()
    bias = torch.zeros(9)
    bias[7:] = -torch.inf
    finite, finite0 = (z.nan_to_num(neginf=0.0) for z in (logits, reference))
    head = ReferenceHead(finite0, torch.eye(9), bias)
    with torch.no_grad():
        found = linear_token_stats(finite, torch.eye(9), targets, bias=bias, reference=head).reference_kl
        wanted = token_stats(finite + bias, targets, reference_logits=finite0 + bias).reference_kl
    assert found is not None and wanted is not None
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 5])
def test_a_batch_without_supervised_tokens_is_a_zero_in_the_graph(count: int) -> None:
    case = Case(count=max(count, 1))
    leaves = [
        leaf[:count].detach().requires_grad_() if len(leaf) == len(case.hidden) else leaf for leaf in case.leaves()
    ]
    hidden, weight, bias, low, up = leaves
    reference = case.reference._replace(
        hidden=case.reference.hidden[:count], low=None if case.reference.low is None else case.reference.low[:count]
    )
    for objective in (KLAnchor(), KLAnchor(base=Cayley(floor=0.5))):
        loss, stats = linear_loss(
            hidden, weight, torch.full((count,), -100), objective, bias=bias, adapter=(low, up), reference=reference
        )
        assert loss.item() == 0 and len(stats.log_prob) == count
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, leaves))


def test_a_second_backward_computes_the_same_again() -> None:
    case = Case()
    leaves = case.leaves()
    loss, _ = fused(case, KLAnchor(weight=0.4), leaves, {})
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_same(torch.autograd.grad(loss, leaves), first)


def test_the_sum_of_predictions_is_that_of_the_model_and_counted_once(chunk: int) -> None:
    case = Case()
    for objective in (KLAnchor(), KLAnchor(base=Cayley(floor=0.5))):
        total = torch.zeros(V, dtype=torch.float64)
        linear_loss(case.hidden.requires_grad_(), case.weight, case.targets, objective, reference=case.reference,
                    prediction_sum=total)  # fmt: skip
        kept = case.targets != -100
        torch.testing.assert_close(total, (case.hidden @ case.weight.t()).softmax(-1)[kept].sum(0).detach())


def test_without_gradient_statistics_have_the_kl_and_with_one_they_are_refused() -> None:
    case = Case()
    options = {"bias": case.bias, "reference": case.reference}
    with torch.no_grad():
        stats = linear_token_stats(case.hidden, case.weight, case.targets, **options)  # type: ignore[arg-type]
        _, other = linear_loss(case.hidden, case.weight, case.targets, KLAnchor(), **options)  # type: ignore[arg-type]
    assert stats.reference_kl is not None and other.reference_kl is not None
    torch.testing.assert_close(stats.reference_kl, other.reference_kl)
    with pytest.raises(UserError, match=r"^linear_token_stats: reference_kl has no gradient"):
        linear_token_stats(case.hidden.requires_grad_(), case.weight, case.targets, **options)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    case = Case()
    for wrong in (case.reference._replace(hidden=case.hidden[1:]), case.reference._replace(weight=case.weight[1:])):
        with pytest.raises(UserError, match=r"^linear head: the reference has"):
            linear_loss(case.hidden, case.weight, case.targets, KLAnchor(), reference=wrong)
    calls: list[Callable[[], Any]] = [
        lambda: linear_loss(case.hidden.requires_grad_(), case.weight, case.targets, KLAnchor()),
        lambda: token_loss(case.hidden @ case.weight.t(), case.targets, KLAnchor()),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"^KLAnchor\(base=NLL\(\), weight=0\.05\) needs TokenStats\.reference_kl"):
            call()


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_a_weight_that_means_nothing_is_refused(bad: float) -> None:
    with pytest.raises(UserError, match=r"^KLAnchor: weight"):
        KLAnchor(weight=bad)


class Sizes(TorchDispatchMode):
    """Notes how many elements the largest result of any operation has."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.largest = max(self.largest, found.numel())
        return found


def test_never_more_than_a_chunk_of_logits_exists_of_either_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CHUNK_CPU", 8)
    case = Case()
    leaves = case.leaves()
    with Sizes() as sizes:
        loss, _ = fused(case, KLAnchor(base=Cayley(floor=0.5)), leaves, {})
        loss.backward()
    assert sizes.largest < N * V / 2
    with Sizes() as sizes:
        oracle(case, KLAnchor(), leaves, {})
    assert sizes.largest >= N * V * 6 // 7 - V  # the dense one holds them all
