"""Dense logits through the row kernel against the textbook path, which float64 takes: values, gradients, memory."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import OBJECTIVES, assert_stats_close, bytes_held, distance, to_dtype
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import random_context

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenContext, TokenStats, supervised_stats, token_loss, token_stats
from deft_lightning.objectives import (
    DEFT,
    DFT,
    EAFT,
    NLL,
    KLAnchor,
    Objective,
)
from deft_lightning.ops import dense

# Of the largest entry: rounding of statistics in float32, and of the gradient to the dtype of the logits.
GRADIENT = {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
narrow = pytest.mark.parametrize("dtype", GRADIENT, ids=str)
every_objective = pytest.mark.parametrize("objective", [*OBJECTIVES, KLAnchor(DFT(), 0.5)], ids=repr)


@pytest.fixture(params=[1 << 20, 40], ids=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Elements of a block: all of a small case, or a row or two of it."""
    size: int = request.param
    monkeypatch.setattr(dense, "BLOCK_CPU", size)
    return size


def laid_out(values: Tensor, layout: str) -> Tensor:
    """Values of shape ``(B, T, V)`` in memory of another layout."""
    if layout == "shifted":
        return torch.cat([values, torch.full_like(values[:, :1], torch.nan)], dim=1)[:, :-1]
    if layout == "padded":
        return torch.nn.functional.pad(values, (2, 3), value=torch.nan)[..., 2:-3]
    if layout == "transposed":
        return values.transpose(0, 2).contiguous().transpose(0, 2)
    if layout == "swapped":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    return values


def case(
    shape: tuple[int, ...], vocabulary: int, dtype: torch.dtype, seed: int, masked: float, layout: str = "plain"
) -> tuple[Tensor, Tensor]:
    """Logits of a dtype, and targets of which a third is the likeliest entry."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(*shape, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(vocabulary, shape, generator=generator)
    targets = torch.where(torch.rand(shape, generator=generator) < 0.3, logits.float().argmax(-1), targets)
    targets = targets.masked_fill(torch.rand(shape, generator=generator) < masked, -100)
    return laid_out(logits, layout) if len(shape) == 2 else logits, targets


def differentiated(
    logits: Tensor, targets: Tensor, objective: Objective, upstream: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of ``(losses * upstream).sum()`` by the logits."""
    leaf = logits.detach().requires_grad_()
    context = random_context(targets.numel()).map(lambda field: field.view(targets.shape))
    loss = token_loss(
        leaf, targets, objective, token_weight=weight, context=context, reference_logits=logits.detach() / 2
    )
    (gradient,) = torch.autograd.grad((loss * upstream).sum(), leaf)
    return loss.detach(), gradient


@narrow
@every_objective
def test_losses_and_gradients_are_those_of_float64(objective: Objective, dtype: torch.dtype, blocks: int) -> None:
    for masked in (0.0, 0.4):
        logits, targets = case((4, 11), 37, dtype, 1, masked, "shifted")
        upstream = torch.rand(4, 11, generator=torch.Generator().manual_seed(2))
        weight = torch.rand(4, 11, generator=torch.Generator().manual_seed(3))
        found, gradient = differentiated(logits, targets, objective, upstream, weight)
        wanted, exact = differentiated(logits.double(), targets, objective, upstream.double(), weight.double())
        assert found.dtype == torch.float32 and gradient.dtype == dtype
        assert distance(found, wanted) < 2e-5
        assert distance(gradient, exact) < GRADIENT[dtype]
        assert (gradient[targets == -100] == 0).all() and (found[targets == -100] == 0).all()


@pytest.mark.slow
@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    which=st.integers(0, len(OBJECTIVES) - 1),
    shape=st.sampled_from([(), (1,), (7,), (0,), (2, 0), (3, 5), (1, 6), (5, 1)]),
    vocabulary=st.sampled_from([1, 2, 40, 127, 128, 1024, 3100]),
    layout=st.sampled_from(["plain", "shifted", "padded", "transposed", "swapped"]),
    masked=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(list(GRADIENT)),
    block=st.sampled_from([1, 300, 1 << 20]),
    seed=st.integers(0, 10_000),
)
def test_any_shape_layout_and_mask_gives_what_float64_gives(
    which: int, shape: tuple[int, ...], vocabulary: int, layout: str, masked: float, dtype: torch.dtype, block: int,
    seed: int,
) -> None:  # fmt: skip
    logits, targets = case(shape, vocabulary, dtype, seed, masked, layout)
    before = logits.clone()
    upstream = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "BLOCK_CPU", block)
        found, gradient = differentiated(logits, targets, OBJECTIVES[which], upstream)
        stats = token_stats(logits, targets, topk=3)
    wanted, exact = differentiated(logits.double(), targets, OBJECTIVES[which], upstream.double())
    # A loss near 0 is what is left of 1 - p: the tokens are held to the largest of them, or to rounding.
    assert distance(found, wanted) < 2e-5 or torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-6)
    assert distance(gradient, exact) < GRADIENT[dtype] or torch.allclose(gradient.double(), exact, rtol=0, atol=1e-6)
    assert_stats_close(
        to_dtype(stats, torch.float64), token_stats(logits.double(), targets, topk=3), rtol=1e-5, atol=2e-6
    )
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)  # nothing is written over them


@narrow
def test_the_largest_entry_is_the_first_of_equal_ones(dtype: torch.dtype, blocks: int) -> None:
    for vocabulary in (5, 300, 4000):
        logits = torch.randint(3, (50, vocabulary), generator=torch.Generator().manual_seed(0)).to(dtype)
        stats = token_stats(logits, torch.zeros(50, dtype=torch.int64))
        # numpy promises the first of equal entries.
        assert stats.arg_max is not None and stats.arg_max.tolist() == logits.float().numpy().argmax(-1).tolist()


@narrow
def test_a_logit_that_is_not_a_number_shows_in_loss_and_gradient_of_its_token_alone(
    dtype: torch.dtype, blocks: int
) -> None:
    for value in (torch.nan, torch.inf):
        logits, targets = case((6,), 30, dtype, 4, 0.0)
        logits[2, 7] = value
        loss, gradient = differentiated(logits, targets, DEFT(), torch.ones(6))
        bad = torch.arange(6) == 2
        assert loss[bad].isnan().all() and loss[~bad].isfinite().all()
        assert gradient[bad].isnan().any() and gradient[~bad].isfinite().all()


@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_a_retained_graph_gives_the_same_twice_and_a_second_derivative_is_refused(masked: float, blocks: int) -> None:
    logits, targets = case((9,), 30, torch.float32, 5, masked)
    logits.requires_grad_()
    loss = token_loss(logits, targets, KLAnchor(DFT(), 0.5), reference_logits=logits.detach() / 2).sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(second, kept, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)
    (graph,) = torch.autograd.grad(loss.square(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        graph.sum().backward()


def test_logits_changed_in_place_before_backward_are_noticed() -> None:
    leaf, targets = case((9,), 30, torch.float32, 6, 0.0)
    logits = leaf.requires_grad_() * 1
    loss = token_loss(logits, targets, DEFT()).sum()
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("with_gradient", [False, True])
def test_autocast_changes_nothing(with_gradient: bool) -> None:
    logits, targets = case((9,), 30, torch.float32, 7, 0.3)
    logits.requires_grad_(with_gradient)
    plain = token_loss(logits, targets, DEFT())
    with torch.autocast("cpu", torch.bfloat16):
        cast = token_loss(logits, targets, DEFT())
    assert torch.equal(plain, cast) and cast.requires_grad == with_gradient


@pytest.mark.slow
@pytest.mark.parametrize("objective", [DEFT(), EAFT(k=3)], ids=repr)
def test_a_caller_can_be_compiled_as_a_whole(objective: Objective) -> None:
    logits, targets = case((9,), 30, torch.float32, 8, 0.3)
    logits.requires_grad_()

    def total(z: Tensor) -> Tensor:
        return token_loss(z, targets, objective).sum()

    found = torch.compile(total, fullgraph=True, backend="aot_eager")(logits)
    (gradient,) = torch.autograd.grad(found, logits)
    (wanted,) = torch.autograd.grad(total(logits), logits)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("masked", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("shifted", [False, True])
def test_no_logits_are_copied_and_one_gradient_is_made(masked: float, shifted: bool) -> None:
    rows, vocabulary = 256, 16_384
    logits = torch.randn(2, rows // 2 + shifted, vocabulary, generator=torch.Generator().manual_seed(9)).bfloat16()
    logits = (logits[:, :-1] if shifted else logits).detach().requires_grad_()
    targets = torch.randint(vocabulary, (2, rows // 2), generator=torch.Generator().manual_seed(10))
    targets[torch.rand(targets.shape, generator=torch.Generator().manual_seed(11)) < masked] = -100
    held = bytes_held(lambda: token_loss(logits, targets, DEFT()).sum().backward())
    gradient, block = 2 * rows * vocabulary, dense.BLOCK_CPU
    # Beside the gradient two float32 buffers of a block, and rows of it as they are read and written.
    assert max(held) < gradient + block * (4 + 4 + 2 + 2) + (1 << 20)
    assert held[-1] == gradient


def test_shapes_that_do_not_fit_are_refused_in_one_line() -> None:
    logits, targets = case((4,), 5, torch.float32, 12, 0.0)
    with pytest.raises(UserError, match=r"logits of shape \(4, 5\) do not fit 3 targets"):
        token_stats(logits, targets[:3])
    with pytest.raises(UserError, match=r"reference_logits of shape \(4, 4\)"):
        token_loss(logits, targets, DEFT(), reference_logits=logits[:, :4])


def test_the_package_starts_without_the_kernel() -> None:
    script = "import sys, deft_lightning.functional; print([m for m in sys.modules if m.startswith('deft_lightning.')])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "['deft_lightning._version', 'deft_lightning.tokens', 'deft_lightning.functional']"


class TestInTriton:
    """The same rows by the kernels in Triton: its interpreter, in a process of its own (see test_triton.py)."""

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"

    @pytest.mark.slow
    @pytest.mark.skipif(interpreted or importlib.util.find_spec("triton") is None, reason="needs triton, runs alone")
    def test_in_a_process_of_its_own(self) -> None:
        where = f"{Path(__file__)}::TestInTriton::test_gives_what_float64_gives"
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-v", where], capture_output=True, text=True, env=environment,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout[-3000:]

    @pytest.mark.skipif(not interpreted, reason="runs in Triton's interpreter")
    @pytest.mark.parametrize("masked", [0.0, 0.5])
    @pytest.mark.parametrize("topk", [0, 3])
    def test_gives_what_float64_gives(self, masked: float, topk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dense, "BLOCK_CPU", 80)
        logits, targets = case((3, 5), 37, torch.float32, 13, masked, "shifted")
        keep, leaf = targets != -100, logits.detach().requires_grad_()
        at = None if keep.all() else keep.flatten().nonzero().squeeze(1)
        stats: Any = dense.dense_stats(leaf, targets[keep], at, topk, backend="triton")
        slope = torch.rand(len(stats.log_prob), generator=torch.Generator().manual_seed(14))
        exact = logits.double().requires_grad_()
        wanted = token_stats(exact, targets, topk=topk)
        wide = wanted.log_prob.new_zeros(targets.shape).masked_scatter(keep, slope.double())
        (by_textbook,) = torch.autograd.grad((wanted.log_prob * wide).sum(), exact)
        for _ in range(2):  # a retained graph, too
            (gradient,) = torch.autograd.grad((stats.log_prob * slope).sum(), leaf, retain_graph=True)
            assert distance(gradient, by_textbook) < GRADIENT[torch.float32]
        assert_stats_close(
            to_dtype(TokenStats(*stats).detach(), torch.float64), wanted.detach().select(keep), rtol=1e-5, atol=2e-6
        )


@narrow
@pytest.mark.parametrize("masked", [0.0, 0.4, 1.0])
def test_statistics_of_supervised_tokens_are_those_picked_of_all(dtype: torch.dtype, masked: float) -> None:
    logits, targets = case((3, 5), 37, dtype, 17, masked, "shifted")
    keep = targets != -100
    for given_logits in (logits, logits.double()):
        found = supervised_stats(given_logits, targets, topk=3, reference_logits=given_logits / 2)
        wanted = token_stats(given_logits[keep], targets[keep], topk=3, reference_logits=given_logits[keep] / 2)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_weights_of_a_context_count_as_those_of_the_argument() -> None:
    logits, targets = case((9,), 30, torch.float32, 15, 0.0)
    weight = torch.rand(9, generator=torch.Generator().manual_seed(16))
    plain = token_loss(logits, targets, NLL())
    for found in (
        token_loss(logits, targets, NLL(), token_weight=weight),
        token_loss(logits, targets, NLL(), context=TokenContext(weight=weight)),
    ):
        torch.testing.assert_close(found, plain * weight)
