"""Columns left out of the gradient of the logits: the bound is a bound, and off is off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from dense import OBJECTIVES, Problem, dense_loss, differentiate, fused_loss, problem, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.objectives import DEFT, NLL, KLAnchor, Objective
from deft_lightning.ops import ColumnSparsity, linear_loss
from deft_lightning.ops.columns import ROWS_TELL, ColumnSums, KeptColumns, LeftOut

every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
quick = settings(deadline=None, max_examples=60, derandomize=True)


@dataclass(frozen=True)
class Uphill:
    """A gate that is negative for every second token: what columns hold has either sign."""

    topk: int = 0
    needs_batch: bool = False

    def __call__(self, stats: TokenStats) -> Tensor:
        signs = torch.where(torch.arange(len(stats.log_prob)) % 2 == 0, 1.0, -0.5)
        return -stats.log_prob * signs.to(stats.log_prob.dtype)


def gradient(n: int, vocabulary: int, seed: int, signs: bool = False, scale: float = 6.0) -> tuple[Tensor, Tensor]:
    """Return ``gate * (pi - onehot)`` of peaked predictions, and targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (n,), generator=generator)
    found = logits.softmax(-1)
    found[torch.arange(n), targets] -= 1
    gate = torch.rand(n, 1, generator=generator, dtype=torch.float64)
    return found * (torch.where(gate > 0.5, gate, -gate) if signs else gate), targets


def chosen(full: Tensor, targets: Tensor, sparsity: ColumnSparsity, signs: bool, block: int) -> KeptColumns | None:
    sums = ColumnSums(full, torch.float64, sparsity)
    for start in range(0, len(full), block):
        rows = slice(start, start + block)
        sums.add(full[rows], targets[rows], signs=signs, sums_to_zero=True)
    return sums.choose(full, targets)


def as_one(found: KeptColumns, like: Tensor) -> Tensor:
    """Return the gradient that the products are taken with."""
    whole = torch.outer(found.rows, found.columns)
    whole[:, found.kept] += found.entries
    assert whole.shape == like.shape
    return whole


# --- the bound ------------------------------------------------------------------------------------------------------


@quick
@given(
    n=st.integers(1, 90), vocabulary=st.integers(40, 400), seed=st.integers(0, 2**16), signs=st.booleans(),
    scale=st.floats(2.0, 12.0), power=st.integers(2, 13), block=st.integers(1, 40),
)  # fmt: skip
def test_what_is_logged_bounds_the_error_of_the_gradient_and_of_both_products(
    n: int, vocabulary: int, seed: int, signs: bool, scale: float, power: int, block: int
) -> None:
    full, targets = gradient(n, vocabulary, seed, signs, scale)
    sparsity = ColumnSparsity(2.0**-power)
    found = chosen(full, targets, sparsity, signs, block)
    logged = sparsity.taken()
    if found is None:
        assert logged == LeftOut(1.0, 0.0)
        return
    assert logged.kept == pytest.approx(len(found.kept) / vocabulary)
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(vocabulary, 7, generator=generator, dtype=torch.float64)
    rows = torch.randn(n, 7, generator=generator, dtype=torch.float64)
    allowed = logged.bound * full.norm() * (1 + 1e-9) + 1e-14
    assert (as_one(found, full) - full).norm() <= allowed
    left_out = full.clone()
    left_out[:, found.kept] = 0
    assert left_out.norm() <= sparsity.tolerance * full.norm() * (1 + 1e-9)
    by_rows = torch.empty(n, 7, dtype=torch.float64)
    found.multiply(weight, by_rows)
    assert (by_rows - full @ weight).norm() <= allowed * torch.linalg.matrix_norm(weight, 2) + 1e-12
    assert torch.allclose(by_rows, as_one(found, full) @ weight, atol=1e-12)
    assert torch.linalg.matrix_norm(rows, 2) * allowed + 1e-12 >= (as_one(found, full).T @ rows - full.T @ rows).norm()


def test_rows_sum_to_what_they_did() -> None:
    full, targets = gradient(50, 300, seed=3)
    found = chosen(full, targets, ColumnSparsity(2**-5), signs=False, block=16)
    assert found is not None and len(found.kept) < 150
    assert as_one(found, full).sum(-1).abs().max() < 1e-12


def test_flat_predictions_are_seen_from_their_first_rows_and_taken_as_a_whole() -> None:
    full, targets = gradient(2 * ROWS_TELL, 300, seed=0, scale=0.1)
    sums = ColumnSums(full, torch.float64, ColumnSparsity(2**-11))
    for start in range(0, len(full), 16):
        sums.add(full[start : start + 16], targets[start : start + 16], signs=False, sums_to_zero=True)
        assert sums.flat == (start + 16 >= ROWS_TELL)
    assert sums.choose(full, targets) is None and not sums.flat


def test_a_gradient_of_nothing_and_one_that_is_not_finite() -> None:
    full, targets = gradient(4, 60, seed=0)
    found = chosen(0 * full, targets, sparsity := ColumnSparsity(0.01), signs=False, block=4)
    assert found is not None and not as_one(found, full).any() and sparsity.taken().bound == 0
    full[1, 5] = torch.nan
    found = chosen(full, targets, ColumnSparsity(0.01), signs=False, block=4)
    assert found is None or bool(as_one(found, full).isnan().any())


# --- through the head -----------------------------------------------------------------------------------------------


def sparse_case(n: int, **options: Any) -> Problem:
    """A problem whose predictions are peaked."""
    return problem(n, 600, dim=24, scale=14.0, masked=0.0, **options)


def leaving_out(case: Problem, sparsity: ColumnSparsity) -> Problem:
    return case._replace(options={**case.options, "sparsity": sparsity})


@every_objective
@pytest.mark.parametrize("shape", ["plain", "bias and weights", "softcap", "two chunks"])
def test_gradients_stay_within_the_tolerance_of_the_float64_ones(objective: Objective, shape: str) -> None:
    n = 700 if shape == "two chunks" else 60
    options: dict[str, Any] = {"softcap": 60.0} if shape == "softcap" else {}
    if shape == "bias and weights":
        options |= {"bias": True, "weighted": True}
    case = sparse_case(n, seed=n, **options)
    wanted = differentiate(dense_loss(objective), case)
    sparsity = ColumnSparsity(2**-9)
    found = differentiate(fused_loss(objective), leaving_out(case, sparsity))
    assert found.loss == differentiate(fused_loss(objective), case).loss
    logged = sparsity.taken()
    if objective.needs.reference:
        assert logged == LeftOut(1.0, 0.0)
    else:
        assert 0 < logged.kept <= 1 and logged.bound <= 2 * 2**-9
    for name, gradient, exact in zip(wanted._fields[1:], found[1:], wanted[1:], strict=True):
        if exact is not None:
            assert relative_error(gradient, exact) <= (1e-9 if objective.needs.reference else 0.02), name


def test_columns_are_left_out_in_the_cases_above() -> None:
    """Else they would show nothing."""
    sparsity = ColumnSparsity(2**-9)
    case = sparse_case(60, seed=60)
    differentiate(fused_loss(DEFT()), leaving_out(case, sparsity))
    logged = sparsity.taken()
    assert logged.kept < 0.4 and logged.bound > 0
    assert sparsity.taken() == LeftOut(1.0, 0.0)


def test_gates_of_either_sign() -> None:
    case = sparse_case(60, seed=1)
    wanted, sparsity = differentiate(dense_loss(Uphill()), case), ColumnSparsity(2**-9)
    found = differentiate(fused_loss(Uphill()), leaving_out(case, sparsity))
    assert sparsity.taken().kept < 0.4
    assert relative_error(found.hidden, wanted.hidden) < 0.02 and relative_error(found.weight, wanted.weight) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_update_and_other_dtypes(dtype: torch.dtype) -> None:
    case = sparse_case(60, seed=2)
    generator = torch.Generator().manual_seed(0)
    low, up = torch.randn(60, 3, generator=generator).double(), torch.randn(600, 3, generator=generator).double()

    def run(to: torch.dtype, sparsity: ColumnSparsity | None) -> list[Tensor]:
        leaves = [t.detach().clone().to(to).requires_grad_() for t in (case.hidden, case.weight, low, up)]
        loss, _ = linear_loss(
            leaves[0], leaves[1], case.targets, NLL(), adapter=(leaves[2], leaves[3]), sparsity=sparsity
        )
        loss.backward()
        return [leaf.grad.double() for leaf in leaves if leaf.grad is not None]

    wanted, whole = run(torch.float64, None), run(dtype, None)
    sparsity = ColumnSparsity(2**-9)
    found = run(dtype, sparsity)
    assert sparsity.taken().kept < 0.4
    for exact, dense, sparse in zip(wanted, whole, found, strict=True):
        assert (sparse - exact).norm() <= (dense - exact).norm() + 0.02 * exact.norm()


def test_flat_predictions_give_what_they_gave() -> None:
    case = problem(200, 600, scale=0.2, masked=0.0)
    wanted = differentiate(fused_loss(DEFT()), case)
    found = differentiate(fused_loss(DEFT()), leaving_out(case, ColumnSparsity(2**-11)))
    assert torch.equal(found.hidden, wanted.hidden) and torch.equal(found.weight, wanted.weight)


def test_beside_a_reference_the_whole_gradient_is_taken() -> None:
    case, sparsity = sparse_case(40, seed=5), ColumnSparsity(2**-5)
    differentiate(fused_loss(KLAnchor(DEFT(), 0.1)), leaving_out(case, sparsity))
    assert sparsity.taken() == LeftOut(1.0, 0.0)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1e-3, float("nan")])
def test_a_tolerance_that_is_none(tolerance: float) -> None:
    with pytest.raises(UserError, match="above 0 and below 1"):
        ColumnSparsity(tolerance)
