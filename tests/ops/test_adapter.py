"""The low-rank update of the head's product against a dense head that adds it to the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from dense import FP32, distance, problem, relative_error, stats_from_logits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.objectives import DEFT, EAFT, NLL, Cayley, Likelihood, Objective
from deft_lightning.ops import plan
from deft_lightning.ops.linear import linear_loss, linear_token_stats

OBJECTIVES: list[Objective] = [NLL(), DEFT(), Likelihood(), Cayley(floor=0.5), EAFT(k=3)]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
ranks = pytest.mark.parametrize("rank", [1, 8])


class Adapted(NamedTuple):
    """What a head with a low-rank update is called with; every tensor but the targets may be differentiated."""

    targets: Tensor
    tensors: dict[str, Tensor]
    options: dict[str, float]

    def to(self, dtype: torch.dtype) -> Adapted:
        return self._replace(tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()})


def adapted(
    n: int, vocab: int, rank: int, *, dim: int = 6, bias: bool = True, masked: float = 0.3, seed: int = 0,
    **options: float,
) -> Adapted:  # fmt: skip
    case = problem(n, vocab, dim, bias=bias, masked=masked, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    # The size of the product's own entries divided by the root of the rank: an update that matters.
    low = torch.randn(n, rank, generator=generator).double()
    up = (torch.randn(vocab, rank, generator=generator) / rank**0.5).double()
    tensors = {"hidden": case.hidden, "weight": case.weight, "low": low, "up": up}
    return Adapted(case.targets, tensors | ({"bias": case.bias} if case.bias is not None else {}), options)


Head = Callable[[Adapted], Tensor]
Gradients = dict[str, Tensor | None]


def differentiate(head: Head, case: Adapted, upstream: float = 1.0, frozen: tuple[str, ...] = ()) -> Gradients:
    """Value and gradients of ``upstream * head(case)``; None for what is frozen."""
    leaves = {name: t.detach().clone().requires_grad_(name not in frozen) for name, t in case.tensors.items()}
    loss = head(case._replace(tensors=leaves))
    (loss * upstream).backward()
    return {"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def dense_logits(case: Adapted) -> Tensor:
    t = case.tensors
    logits = torch.nn.functional.linear(t["hidden"], t["weight"], t.get("bias")) + t["low"] @ t["up"].T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits * case.options.get("logit_scale", 1.0)
    cap = case.options.get("softcap")
    return cap * torch.tanh(logits / cap) if cap else logits


def dense_loss(objective: Objective) -> Head:
    def head(case: Adapted) -> Tensor:
        keep = case.targets != -100
        return objective(stats_from_logits(dense_logits(case)[keep], case.targets[keep], objective.topk)).sum()

    return head


def fused_loss(objective: Objective) -> Head:
    def head(case: Adapted) -> Tensor:
        t = case.tensors
        return linear_loss(
            t["hidden"], t["weight"], case.targets, objective,
            bias=t.get("bias"), adapter=(t["low"], t["up"]), **case.options,
        )[0]  # fmt: skip

    return head


def fused_stats(case: Adapted, topk: int = 0) -> TokenStats:
    t = case.tensors
    return linear_token_stats(
        t["hidden"], t["weight"], case.targets,
        bias=t.get("bias"), adapter=(t["low"], t["up"]), topk=topk, **case.options,
    )  # fmt: skip


def through_stats(objective: Objective) -> Head:
    def head(case: Adapted) -> Tensor:
        keep = case.targets != -100
        return objective(fused_stats(case, objective.topk).select(keep)).sum()

    return head


def assert_close(found: Gradients, wanted: Gradients, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    errors = {name: distance(found[name], wanted[name]) for name in wanted}
    assert all(error <= tolerance for error in errors.values()), errors


HEADS = {"loss": fused_loss, "statistics": through_stats}
every_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"bias": False, "masked": 0.0},
    "masked": {"masked": 0.5, "bias": False},
    "bias": {"masked": 0.0},
    "softcap and scale": {"softcap": 4.0, "logit_scale": 1.7},
}


@pytest.mark.slow
@ranks
@pytest.mark.parametrize("n", [0, 1, 30, 513, 1100])  # none, one, one chunk, two and three
@every_head
@every_objective
def test_values_and_gradients_match_dense_float64(
    objective: Objective, head: Callable[[Objective], Head], n: int, rank: int
) -> None:
    case = adapted(n, 19, rank, seed=n)
    if n == 1:
        case.targets[:] = 4
    wanted = differentiate(dense_loss(objective), case, upstream=0.37)
    found = differentiate(head(objective), case.to(torch.float32), upstream=0.37)
    assert_close(found, wanted, FP32)
    assert_close(differentiate(head(objective), case, upstream=0.37), wanted, 1e-10)
    if n > 1:  # the update is there to be seen
        assert distance(found["hidden"], differentiate(head(objective), without(case), 0.37)["hidden"]) > 0.01


def without(case: Adapted) -> Adapted:
    return case._replace(tensors=case.tensors | {"up": torch.zeros_like(case.tensors["up"])})


@pytest.mark.slow
@ranks
@pytest.mark.parametrize("option", OPTIONS)
@every_head
@every_objective
def test_every_option_matches_dense_float64(
    objective: Objective, head: Callable[[Objective], Head], option: str, rank: int
) -> None:
    case = adapted(40, 23, rank, seed=3, **OPTIONS[option])
    wanted = differentiate(dense_loss(objective), case)
    assert_close(differentiate(head(objective), case.to(torch.float32)), wanted, FP32)


@pytest.mark.parametrize("topk", [0, 4])
def test_statistics_of_all_tokens_match_dense_float64_and_are_zero_where_ignored(topk: int) -> None:
    case = adapted(700, 29, 3, masked=0.4, softcap=5.0)
    keep = case.targets != -100
    wanted = stats_from_logits(dense_logits(case), case.targets.clamp_min(0), topk)
    for found, field in zip(fused_stats(case.to(torch.float32), topk), wanted, strict=True):
        assert (found is None) == (field is None)
        if found is not None and field is not None:
            assert found.shape == (700,) and not found[~keep].any()
            torch.testing.assert_close(found[keep].to(field.dtype), field[keep], rtol=1e-4, atol=1e-5)


FROZEN = [("weight",), ("weight", "bias"), ("hidden", "weight", "bias"), ("low", "up"), ("low",), ("up", "hidden")]


@every_head
@pytest.mark.parametrize("frozen", FROZEN, ids=" and ".join)
@pytest.mark.parametrize("objective", [DEFT(), Cayley(floor=0.5)], ids=repr)
def test_frozen_tensors_get_no_gradient_and_change_no_other(
    objective: Objective, frozen: tuple[str, ...], head: Callable[[Objective], Head]
) -> None:
    case = adapted(600, 13, 4, seed=4).to(torch.float32)
    whole = differentiate(head(objective), case)
    part = differentiate(head(objective), case, frozen=frozen)
    for name, before in whole.items():
        after = part[name]
        assert (after is None) == (name in frozen)
        if after is not None:
            torch.testing.assert_close(after, before, rtol=0, atol=0)


class Made(TorchDispatchMode):
    """The number of entries of every tensor that any operator returns in a storage of its own size."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: set[int] = set()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.storages:
                self.entries.add(leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@every_head
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("objective", [DEFT(), Cayley(floor=0.5)], ids=repr)
def test_a_frozen_weight_costs_no_gradient_of_its_size(
    objective: Objective, frozen: bool, head: Callable[[Objective], Head]
) -> None:
    vocab, dim = 1009, 11  # primes: no other tensor has vocab * dim entries
    case = adapted(600, vocab, 4, dim=dim).to(torch.float32)
    leaves = {name: t.requires_grad_(name != "weight" or not frozen) for name, t in case.tensors.items()}
    with Made() as made:
        made.storages = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
        head(objective)(case).backward()
    assert (vocab * dim in made.entries) != frozen
    assert leaves["up"].grad is not None and (leaves["weight"].grad is None) == frozen


def assert_no_worse_than_twice(fused: Gradients, dense: Gradients, oracle: Gradients, *names: str) -> None:
    for name in names or [name for name in oracle if name != "loss"]:
        error, allowed = (relative_error(result[name], oracle[name]) for result in (fused, dense))
        assert error <= 2 * allowed + 1e-6, f"{name}: {error:.2e} against {allowed:.2e}"


@pytest.mark.slow
@ranks
@pytest.mark.parametrize("n", [100, 1100])
@every_head
@every_objective
def test_bfloat16_gradients_are_no_worse_than_twice_those_of_the_dense_bfloat16_head(
    objective: Objective, head: Callable[[Objective], Head], n: int, rank: int
) -> None:
    narrow = adapted(n, 61, rank, dim=16, masked=0.2, seed=5).to(torch.bfloat16)
    oracle = differentiate(dense_loss(objective), narrow.to(torch.float64), upstream=0.01)
    dense = differentiate(dense_loss(objective), narrow, upstream=0.01)
    fused = differentiate(head(objective), narrow, upstream=0.01)
    for name, found in fused.items():
        assert found is not None and found.dtype == (torch.float32 if name == "loss" else torch.bfloat16)
    assert_no_worse_than_twice(fused, dense, oracle)


@ranks
@pytest.mark.parametrize("n", [100, 1100])
def test_bfloat16_values_are_no_worse_than_twice_those_of_the_dense_bfloat16_head(n: int, rank: int) -> None:
    narrow = adapted(n, 61, rank, dim=16, masked=0.0, seed=5).to(torch.bfloat16)
    exact = stats_from_logits(dense_logits(narrow.to(torch.float64)), narrow.targets, 0)
    dense = stats_from_logits(dense_logits(narrow), narrow.targets, 0)
    t = narrow.tensors
    loss, stats = linear_loss(
        t["hidden"], t["weight"], narrow.targets, DEFT(), bias=t["bias"], adapter=(t["low"], t["up"])
    )
    # Per token: a sum over tokens can be right by luck.
    for found in (stats, fused_stats(narrow)):
        for name in ("log_prob", "collision", "entropy"):
            error, allowed = (relative_error(getattr(s, name), getattr(exact, name)) for s in (found, dense))
            assert error <= 2 * allowed, f"{name}: {error:.2e} against {allowed:.2e}"
    torch.testing.assert_close(loss, DEFT()(stats).sum(), rtol=1e-5, atol=0)


def under_autocast(head: Head) -> Head:
    def run(case: Adapted) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return head(case)

    return run


@ranks
@every_head
@pytest.mark.parametrize("objective", [NLL(), DEFT(), Cayley(floor=0.5)], ids=repr)
def test_autocast_gives_float32_gradients_no_worse_than_twice_the_dense_error(
    objective: Objective, head: Callable[[Objective], Head], rank: int
) -> None:
    case = adapted(700, 61, rank, dim=16, seed=6)
    oracle = differentiate(dense_loss(objective), case)
    plain = case.to(torch.float32)
    dense = differentiate(under_autocast(dense_loss(objective)), plain)
    fused = differentiate(under_autocast(head(objective)), plain)
    exact = differentiate(head(objective), plain)
    assert_no_worse_than_twice(fused, dense, oracle)
    for name, found in fused.items():
        assert found is not None and found.dtype == torch.float32
        # The products really ran in bfloat16.
        assert name == "loss" or distance(found, exact[name]) > 1e-4, name


@every_head
def test_float32_factors_beside_a_bfloat16_head_get_float32_gradients(head: Callable[[Objective], Head]) -> None:
    # As a LoRA in full precision on a frozen model in bfloat16.
    case = adapted(700, 61, 8, dim=16, masked=0.0, seed=7).to(torch.bfloat16)
    factors = {name: case.tensors[name].float() for name in ("low", "up")}
    mixed = case._replace(tensors=case.tensors | factors)
    oracle = differentiate(dense_loss(DEFT()), case.to(torch.float64), frozen=("weight", "bias"))
    dense = differentiate(dense_loss(DEFT()), case, frozen=("weight", "bias"))
    fused = differentiate(head(DEFT()), mixed, frozen=("weight", "bias"))
    for name in ("hidden", "low", "up"):
        found = fused[name]
        assert found is not None and found.dtype == (torch.bfloat16 if name == "hidden" else torch.float32)
    assert_no_worse_than_twice(fused, dense, oracle, "hidden", "low", "up")


@every_head
def test_a_lora_is_the_head_whose_weight_it_was_merged_into(head: Callable[[Objective], Head]) -> None:
    # low = scale * hidden @ A.T, up = B: the gradient by A reaches it through low, and hidden gets both parts.
    case = adapted(600, 17, 3, seed=8)
    generator = torch.Generator().manual_seed(9)
    down, up = torch.randn(3, 6, generator=generator).double(), case.tensors["up"]
    scale = 0.7

    def lora(hidden: Tensor, down: Tensor, up: Tensor) -> Tensor:
        low = scale * hidden @ down.T
        return head(DEFT())(case._replace(tensors=case.tensors | {"hidden": hidden, "low": low, "up": up}))

    def merged(hidden: Tensor, down: Tensor, up: Tensor) -> Tensor:
        weight, nothing = case.tensors["weight"] + scale * up @ down, torch.zeros(600, 3).double()
        return dense_loss(DEFT())(
            case._replace(tensors=case.tensors | {"hidden": hidden, "weight": weight, "low": nothing})
        )

    results = []
    for function in (lora, merged):
        leaves = [t.detach().clone().requires_grad_() for t in (case.tensors["hidden"], down, up)]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for found, wanted in zip(*results, strict=True):
        assert distance(found, wanted) <= 1e-10


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_number_of_chunks_does_not_matter(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = adapted(100, 13, 2, seed=10)
    wanted = differentiate(fused_loss(DEFT()), case)
    monkeypatch.setattr(plan, "CHUNK_CPU", size)
    assert_close(differentiate(fused_loss(DEFT()), case), wanted, 1e-12)


def test_factors_of_any_strides_are_taken() -> None:
    case = adapted(600, 13, 4, seed=11)
    wanted = differentiate(fused_loss(DEFT()), case)

    def strided(c: Adapted) -> Tensor:
        # The leaves are contiguous copies: take the strided views inside the graph.
        views = {name: c.tensors[name].T.contiguous().T for name in ("low", "up")}
        assert not any(view.is_contiguous() for view in views.values())
        return fused_loss(DEFT())(c._replace(tensors=c.tensors | views))

    assert_close(differentiate(strided, case), wanted, 1e-12)


def test_a_rank_of_zero_is_no_update() -> None:
    case = adapted(40, 13, 1, seed=12)
    none = case._replace(tensors=case.tensors | {"low": torch.zeros(40, 0).double(), "up": torch.zeros(13, 0).double()})
    found, wanted = differentiate(fused_loss(DEFT()), none), differentiate(fused_loss(DEFT()), without(case))
    for name in ("loss", "hidden", "weight", "bias"):
        assert distance(found[name], wanted[name]) <= 1e-12


BAD_ADAPTERS = {
    "ranks that differ": ((5, 2), (7, 3)),
    "tokens of another number": ((4, 2), (7, 2)),
    "another vocabulary": ((5, 2), (6, 2)),
    "a transposed factor": ((5, 2), (2, 7)),
    "a transposed low": ((2, 5), (7, 2)),
    "a batch dimension": ((1, 5, 2), (7, 2)),
    "vectors": ((5,), (7,)),
    "three dimensions": ((5, 2, 2), (7, 2, 2)),
}


@pytest.mark.parametrize("stats_only", [False, True])
@pytest.mark.parametrize("bad", BAD_ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(bad: str, stats_only: bool) -> None:
    low, up = BAD_ADAPTERS[bad]
    call: dict[str, Any] = {
        "hidden": torch.zeros(5, 4), "weight": torch.zeros(7, 4), "targets": torch.zeros(5, dtype=torch.int64),
        "adapter": (torch.zeros(low), torch.zeros(up)),
    }  # fmt: skip
    with pytest.raises(UserError) as refused:
        if stats_only:
            linear_token_stats(**call)
        else:
            linear_loss(**call, objective=NLL())
    message = str(refused.value)
    assert len(message.splitlines()) == 1 and "adapter (N, r) and (V, r)" in message
    assert str(low) in message and str(up) in message
