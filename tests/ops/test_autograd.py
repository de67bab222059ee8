"""The fused head as a citizen of autograd: true derivatives, retained graphs, versions, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense import (
    Problem,
    assert_stats_close,
    dense_loss,
    differentiate,
    distance,
    fused_loss,
    problem,
    relative_error,
    stats_from_logits,
)
from torch import Tensor

from deft_lightning.functional import TokenStats
from deft_lightning.objectives import DEFT, EAFT, NLL, Cayley, Likelihood, Objective, Tsallis
from deft_lightning.ops import plan
from deft_lightning.ops.linear import linear_loss, linear_token_stats

# --- finite differences ---------------------------------------------------------------------------------------------

# Their gate is the derivative of their value. DEFT's or Cayley's is not: the focus index is detached.
TRUE_DERIVATIVES: list[Objective] = [NLL(), Likelihood(), Tsallis(q=1.5)]
CALLS: dict[str, tuple[set[str], dict[str, float]]] = {
    "plain": (set(), {}),
    "bias": ({"bias"}, {}),
    "softcap": (set(), {"softcap": 3.0}),
    "logit_scale": (set(), {"logit_scale": -0.7}),
    "adapter": ({"low", "up"}, {}),
    "everything": ({"bias", "low", "up"}, {"softcap": 4.0, "logit_scale": 1.3}),
}
every_call = pytest.mark.parametrize("call", CALLS)
VOCAB, TARGETS = 7, torch.tensor([2, -100, 0, 6, 3, 2, -100, 5])


def tensors(extra: set[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (8, 3), "weight": (VOCAB, 3), "bias": (VOCAB,), "low": (8, 2), "up": (VOCAB, 2)}
    made = {name: torch.randn(*shape, generator=generator).double() for name, shape in shapes.items()}
    return {name: t.requires_grad_() for name, t in made.items() if name in {"hidden", "weight", *extra}}


def arguments(given: dict[str, Tensor], options: dict[str, float]) -> dict[str, Any]:
    adapter = (given["low"], given["up"]) if "low" in given else None
    return {
        "hidden": given["hidden"], "weight": given["weight"], "targets": TARGETS,
        "bias": given.get("bias"), "adapter": adapter, **options,
    }  # fmt: skip


@pytest.mark.slow
@every_call
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("objective", TRUE_DERIVATIVES, ids=repr)
def test_gradients_of_linear_loss_are_its_finite_differences(
    objective: Objective, weighted: bool, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "CHUNK_CPU", 4)  # two chunks of the six supervised tokens
    extra, options = CALLS[call]
    given = tensors(extra)
    token_weight = torch.linspace(0.0, 2.0, 8).double() if weighted else None

    def loss(*values: Tensor) -> Tensor:
        named = dict(zip(given, values, strict=True))
        return linear_loss(**arguments(named, options), objective=objective, token_weight=token_weight)[0]

    assert torch.autograd.gradcheck(loss, tuple(given.values()), eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.slow
@every_call
def test_gradients_of_log_prob_are_its_finite_differences(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CHUNK_CPU", 4)
    extra, options = CALLS[call]
    given = tensors(extra)

    def log_prob(*values: Tensor) -> Tensor:
        return linear_token_stats(**arguments(dict(zip(given, values, strict=True)), options)).log_prob

    assert torch.autograd.gradcheck(log_prob, tuple(given.values()), eps=1e-6, atol=1e-7, rtol=1e-6)


# --- a graph that is used again -------------------------------------------------------------------------------------


def through_stats(objective: Objective) -> Callable[[Problem], Tensor]:
    def head(case: Problem) -> Tensor:
        keep = case.targets != -100
        stats = linear_token_stats(
            case.hidden, case.weight, case.targets, bias=case.bias, topk=objective.topk, **case.options
        )
        return objective(stats.select(keep)).sum()

    return head


HEADS = {"loss": fused_loss, "statistics": through_stats}
every_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
Heads = Callable[[Objective], Callable[[Problem], Tensor]]
OBJECTIVES: list[Objective] = [DEFT(), Cayley(floor=0.5), EAFT(k=3)]
some_objectives = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def leaves_of(case: Problem) -> tuple[Problem, list[Tensor]]:
    assert case.bias is not None
    leaves = [t.detach().clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    return case._replace(hidden=leaves[0], weight=leaves[1], bias=leaves[2]), leaves


def grads_of(leaves: list[Tensor]) -> list[Tensor]:
    grads = [leaf.grad for leaf in leaves]
    assert all(grad is not None for grad in grads)
    return [grad for grad in grads if grad is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [40, 1100])
@every_head
@some_objectives
def test_backward_through_a_retained_graph_gives_the_same_again_and_leaves_the_first_alone(
    objective: Objective, head: Heads, n: int, dtype: torch.dtype
) -> None:
    case, leaves = leaves_of(problem(n, 13, bias=True, seed=n).to(dtype))
    loss = head(objective)(case)
    loss.backward(retain_graph=True)
    first = grads_of(leaves)
    copies = [grad.clone() for grad in first]
    for leaf in leaves:
        leaf.grad = None
    # Another factor, and one that hits what a buffer kept from the first would hold.
    (loss * 2).backward(retain_graph=True)
    for grad, copy, again in zip(first, copies, grads_of(leaves), strict=True):
        assert again.data_ptr() != grad.data_ptr()
        torch.testing.assert_close(grad, copy, rtol=0, atol=0)
        torch.testing.assert_close(again, 2 * copy, rtol=0, atol=0)
    loss.backward()  # into the .grad of the second: 2 + 1
    for copy, total in zip(copies, grads_of(leaves), strict=True):
        assert distance(total, 3 * copy.double()) <= torch.finfo(dtype).eps


@every_head
@some_objectives
def test_a_second_backward_through_a_freed_graph_raises(objective: Objective, head: Heads) -> None:
    case, leaves = leaves_of(problem(40, 9, bias=True, seed=1))
    loss = head(objective)(case)
    loss.backward()
    before = [grad.clone() for grad in grads_of(leaves)]
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    for grad, copy in zip(grads_of(leaves), before, strict=True):
        torch.testing.assert_close(grad, copy, rtol=0, atol=0)


@every_head
@pytest.mark.parametrize("which", ["hidden", "weight", "bias"])
def test_an_input_changed_in_place_before_a_second_backward_is_noticed(which: str, head: Heads) -> None:
    case, _ = leaves_of(problem(40, 9, masked=0.0, bias=True, seed=2, ignore_index=None))
    loss = head(DEFT())(case)
    loss.backward(retain_graph=True)
    with torch.no_grad():
        getattr(case, which).mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_head
def test_hidden_states_changed_in_place_do_not_disturb_a_head_that_dropped_ignored_rows(head: Heads) -> None:
    # It keeps a copy of the supervised rows, so there is nothing to notice: the gradients are those of the forward.
    case, leaves = leaves_of(problem(40, 9, bias=True, seed=2))
    loss = head(DEFT())(case)
    wanted = torch.autograd.grad(loss, leaves, retain_graph=True)
    with torch.no_grad():
        case.hidden.mul_(1.5)
    for found, before in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(found, before, rtol=0, atol=0)


# --- derivatives of derivatives -------------------------------------------------------------------------------------


@every_head
@pytest.mark.parametrize("by", ["grad", "backward"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["hidden", "weight", "bias"])
@some_objectives
def test_a_gradient_cannot_be_differentiated(objective: Objective, which: int, by: str, head: Heads) -> None:
    case, leaves = leaves_of(problem(40, 9, bias=True, seed=3))
    # Squared, so that the first gradient depends on the loss and a second one would be found, and be wrong.
    loss = head(objective)(case).square()
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(loss, leaves[which], create_graph=True)
        if by == "grad":
            torch.autograd.grad(grad.sum(), leaves[which])
        else:
            grad.sum().backward()


@every_head
@pytest.mark.parametrize("by", ["grad", "backward"])
@pytest.mark.parametrize("squared", [False, True])  # whether what comes from above is a constant or depends on the loss
def test_a_gradient_penalty_is_refused_rather_than_left_out(squared: bool, by: str, head: Heads) -> None:
    case, leaves = leaves_of(problem(40, 9, bias=True, seed=4))
    loss = head(NLL())(case)
    loss = loss.square() if squared else loss
    # Without an error the penalty is a constant to autograd, and training goes on as if there were none.
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
        penalised = loss + grad.square().sum()
        if by == "grad":
            torch.autograd.grad(penalised, leaves)
        else:
            penalised.backward()


# --- values ---------------------------------------------------------------------------------------------------------


@every_head
@some_objectives
def test_ignore_index_none_means_that_every_token_counts(objective: Objective, head: Heads) -> None:
    case = problem(600, 13, masked=0.0, bias=True, seed=5)
    case = case._replace(options={"softcap": 5.0})
    call = case._replace(options={"softcap": 5.0, "ignore_index": None})
    found, wanted = differentiate(head(objective), call), differentiate(head(objective), case)
    for f, w in zip(found, wanted, strict=True):
        assert distance(f, w) == 0
    # Nothing is scattered, and a token whose target happens to be the default is a mistake, not an ignored token.
    with pytest.raises((IndexError, RuntimeError)):
        head(objective)(call._replace(targets=case.targets.masked_fill(case.targets == 3, -100)))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@some_objectives
def test_the_value_where_gradients_are_off_is_that_of_training(
    objective: Objective, dtype: torch.dtype, context: Callable[[], Any]
) -> None:
    narrow = problem(700, 17, bias=True, softcap=6.0, seed=6).to(dtype)
    hidden = narrow.hidden.clone().requires_grad_()
    arguments: dict[str, Any] = {"bias": narrow.bias, "softcap": 6.0}
    wanted, wanted_stats = linear_loss(hidden, narrow.weight, narrow.targets, objective, **arguments)
    with context():
        found, stats = linear_loss(hidden, narrow.weight, narrow.targets, objective, **arguments)
        alone = linear_token_stats(hidden, narrow.weight, narrow.targets, topk=objective.topk, **arguments)
    assert wanted.requires_grad and not found.requires_grad
    assert found.item() == wanted.item()
    assert_stats_close(stats, wanted_stats, rtol=0, atol=0)
    assert_stats_close(alone, wanted_stats, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@every_head
@some_objectives
def test_an_upstream_of_zero_gives_zeros_for_everything(objective: Objective, head: Heads, dtype: torch.dtype) -> None:
    found = differentiate(head(objective), problem(600, 13, bias=True, seed=7).to(dtype), upstream=0.0)
    assert found.loss.item() != 0
    for grad in found[1:]:
        assert grad is not None and not grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_head
@pytest.mark.parametrize("objective", [DEFT(), EAFT(k=3)], ids=repr)  # a floor looks at the micro-batch
def test_gradients_of_two_micro_batches_add_up(objective: Objective, head: Heads, dtype: torch.dtype) -> None:
    narrow = problem(1200, 13, bias=True, seed=8).to(dtype)
    whole = differentiate(head(objective), narrow, upstream=0.01)
    case, leaves = leaves_of(narrow)
    for half in (slice(0, 500), slice(500, None)):
        loss = head(objective)(case._replace(hidden=case.hidden[half], targets=case.targets[half]))
        (loss * 0.01).backward()
    for found, wanted in zip(grads_of(leaves), whole[1:], strict=True):
        assert found.dtype == dtype
        assert distance(found, wanted) <= 16 * torch.finfo(dtype).eps


def test_a_head_within_a_larger_graph_passes_every_gradient_on() -> None:
    case = problem(60, 9, bias=True, seed=9)
    tied = (torch.randn(9, 6, generator=torch.Generator().manual_seed(3)).double() / 3).requires_grad_()
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def run(head: Callable[[Problem], Tensor]) -> tuple[Tensor, ...]:
        # A tied embedding: the head's weight is also where its hidden states come from; and a learnt loss weight.
        hidden = torch.tanh(tied[torch.arange(60) % 9] + case.hidden)
        loss = scale.exp() * head(case._replace(hidden=hidden, weight=tied)) + tied.square().sum()
        return torch.autograd.grad(loss, (tied, scale))

    for found, wanted in zip(run(fused_loss(DEFT())), run(dense_loss(DEFT())), strict=True):
        assert distance(found, wanted) <= 1e-10


# --- float16 --------------------------------------------------------------------------------------------------------


def half(n: int, *, dim: int = 16, seed: int = 10) -> Problem:
    """A vocabulary whose probabilities are mostly below the smallest normal float16, 6e-5."""
    case = problem(n, 5000, dim, masked=0.0, bias=True, seed=seed).to(torch.float16)
    assert (torch.softmax((case.hidden.double() @ case.weight.double().T), -1) < 6e-5).double().mean() > 0.5
    return case


def assert_no_worse_than_twice_dense(
    narrow: Problem, objective: Callable[[TokenStats], Tensor], head: Heads, upstream: float
) -> None:
    oracle = differentiate(dense_loss(objective), narrow.to(torch.float64), upstream)
    dense = differentiate(dense_loss(objective), narrow, upstream)
    fused = differentiate(head(objective), narrow, upstream)
    for name in ("hidden", "weight", "bias"):
        found, plain, wanted = (getattr(result, name) for result in (fused, dense, oracle))
        assert found.dtype == torch.float16 and torch.isfinite(plain).all()
        assert torch.isfinite(found).all(), f"{name}: {(~torch.isfinite(found)).sum()} entries are not finite"
        error, allowed = relative_error(found, wanted), relative_error(plain, wanted)
        assert error <= 2 * allowed + 1e-6, f"{name}: {error:.2e} against {allowed:.2e}"


@pytest.mark.slow
@every_head
@pytest.mark.parametrize("objective", [NLL(), *OBJECTIVES, Likelihood()], ids=repr)
@pytest.mark.parametrize(("n", "upstream"), [(20, 1.0), (530, 0.05)])  # one chunk, and two
def test_float16_gradients_of_tiny_probabilities_are_no_worse_than_twice_dense_float16(
    objective: Objective, head: Heads, n: int, upstream: float
) -> None:
    assert_no_worse_than_twice_dense(half(n), objective, head, upstream)


@every_head
def test_float16_gradients_under_a_loss_scale_are_no_worse_than_twice_dense_float16(head: Heads) -> None:
    # A dense head has the scale of a GradScaler on its logits' gradients before it rounds them, this one only when it
    # is done. All targets are improbable here, so that gradients without any scale are p * pi, a subnormal number.
    narrow = half(40)
    narrow.targets[:] = torch.randint(5000, (40,), generator=torch.Generator().manual_seed(3))
    assert_no_worse_than_twice_dense(narrow, Likelihood(), head, 1024.0)


def test_float16_values_are_no_worse_than_twice_dense_float16() -> None:
    narrow = half(40)
    with torch.no_grad():
        logits = torch.nn.functional.linear(narrow.hidden, narrow.weight, narrow.bias)
        exact = torch.nn.functional.linear(*(t.double() for t in (narrow.hidden, narrow.weight, narrow.bias)))
    dense = stats_from_logits(logits.float(), narrow.targets, 0)
    oracle = stats_from_logits(exact, narrow.targets, 0)
    found = linear_token_stats(narrow.hidden, narrow.weight, narrow.targets, bias=narrow.bias)
    for name in ("log_prob", "collision", "entropy"):
        error, allowed = (relative_error(getattr(s, name), getattr(oracle, name)) for s in (found, dense))
        assert error <= 2 * allowed, f"{name}: {error:.2e} against {allowed:.2e}"


@pytest.mark.slow
@every_head
@pytest.mark.parametrize("n", [300, 700])
def test_float16_gradients_stay_finite_where_many_tokens_have_one_target(head: Heads, n: int) -> None:
    # A frequent word: its row of dW is a sum over all its tokens before the mean divides it.
    narrow = half(n)
    narrow.targets[::2] = 7
    narrow.hidden[::2] = narrow.hidden[::2] + 2
    assert_no_worse_than_twice_dense(narrow, NLL(), head, 1 / n)


@every_head
def test_float16_gradients_stay_finite_where_the_gate_is_large(head: Heads) -> None:
    # Tsallis beyond q = 1 has gates above 1: 70 for p = 2e-4, which float16 has no trouble with.
    assert_no_worse_than_twice_dense(half(40), Tsallis(q=1.5), head, 0.01)
