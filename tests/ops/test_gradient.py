"""The sum of a weight's gradient over chunks: what it rounds, and what it holds while it does."""

from __future__ import annotations

import pytest
import torch
from dense import bytes_held, relative_error
from torch import Tensor

from deft_lightning.ops import gradient
from deft_lightning.ops import plan as plans
from deft_lightning.ops.buffers import KEPT_CPU
from deft_lightning.ops.gradient import WeightGradient
from deft_lightning.ops.plan import CHUNK_CPU, CallShape, Plan
from deft_lightning.ops.torch_rows import Transform

BF16 = torch.finfo(torch.bfloat16).eps
ROWS, COLUMNS = 37, 24


def chunks(count: int, dtype: torch.dtype, *, drift: float = 0.5, n: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Products and hidden states of several chunks; with drift they agree on a direction, as those of a batch do."""
    generator = torch.Generator().manual_seed(count)
    common = torch.randn(ROWS, generator=generator), torch.randn(COLUMNS, generator=generator)
    return [
        (
            (torch.randn(n, ROWS, generator=generator) + drift * common[0]).to(dtype),
            (torch.randn(n, COLUMNS, generator=generator) + drift * common[1]).to(dtype),
        )
        for _ in range(count)
    ]


def exact(parts: list[tuple[Tensor, Tensor]], factor: float = 1.0) -> Tensor:
    return factor * sum((p.double().T @ h.double() for p, h in parts), torch.zeros(ROWS, COLUMNS).double())


def summed(parts: list[tuple[Tensor, Tensor]], parameter: torch.dtype, factor: float = 1.0) -> Tensor:
    compute = parts[0][0].dtype if parts else parameter
    total = WeightGradient(torch.empty(ROWS, COLUMNS, dtype=parameter), compute, len(parts))
    for product, hidden in parts:
        total.add(product, hidden)
    wide = torch.float64 if compute == torch.float64 else torch.float32
    return total.finish(torch.tensor(factor, dtype=wide))


def largest_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).abs().max() / wanted.abs().max()).item()


blocks = pytest.mark.parametrize("block", [gradient.BLOCK_CPU, 5 * COLUMNS, 1], ids=["one block", "of 5", "of 1"])


@blocks
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str)
def test_the_sum_of_wide_chunks_is_exact_whatever_the_blocks(
    dtype: torch.dtype, tolerance: float, count: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient, "BLOCK_CPU", block)
    parts = chunks(count, dtype)
    found = summed(parts, dtype, -0.3)
    assert found.dtype == dtype and found.shape == (ROWS, COLUMNS)
    assert largest_error(found, exact(parts, -0.3)) <= tolerance


@blocks
@pytest.mark.parametrize("parameter", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 2, 64])
def test_bfloat16_chunks_are_off_by_about_one_rounding(
    count: int, parameter: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient, "BLOCK_CPU", block)
    parts = chunks(count, torch.bfloat16)
    found = summed(parts, parameter)
    assert found.dtype == parameter
    # On the CPU torch rounds the product of a chunk, and the sum is rounded to the parameter: two half units at most.
    assert ((found.double() - exact(parts)).abs() <= 1.05 * BF16 * exact_magnitude(parts)).all()
    assert relative_error(found, exact(parts)) <= 0.5 * BF16


def exact_magnitude(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Bound on what is rounded: the sum of the sizes of the chunks' products."""
    return sum(((p.double().T @ h.double()).abs() for p, h in parts), torch.zeros(ROWS, COLUMNS).double())


def test_a_sum_in_bfloat16_would_be_several_times_worse() -> None:
    parts = chunks(64, torch.bfloat16)
    naive = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16)
    for product, hidden in parts:
        naive.addmm_(product.T, hidden)
    rounded = relative_error(exact(parts).to(torch.bfloat16), exact(parts))
    found = relative_error(summed(parts, torch.bfloat16), exact(parts))
    assert found <= 1.2 * rounded
    assert relative_error(naive, exact(parts)) >= 4 * found


def test_a_float32_parameter_keeps_more_of_bfloat16_chunks_than_bfloat16_can() -> None:
    parts = chunks(64, torch.bfloat16)
    found = summed(parts, torch.float32)
    assert found.dtype == torch.float32
    rounded = relative_error(exact(parts).to(torch.bfloat16), exact(parts))
    assert relative_error(found, exact(parts)) <= rounded / 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_sum_of_no_chunk_is_zero(dtype: torch.dtype) -> None:
    found = summed([], dtype, torch.inf)  # an upstream that would spoil what memory happens to hold
    assert found.dtype == dtype and found.shape == (ROWS, COLUMNS) and not found.any()


@blocks
@pytest.mark.parametrize("parameter", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("factor", [1 / 300, 0.01, 0.7])
def test_the_factor_is_not_rounded_to_bfloat16(
    factor: float, count: int, parameter: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rounded it would scale every entry alike, by 1e-3 or more; the rounding of the entries averages out.
    monkeypatch.setattr(gradient, "BLOCK_CPU", block)
    parts = chunks(count, torch.bfloat16)
    one, scaled = summed(parts, parameter).double(), summed(parts, parameter, factor).double()
    assert ((one * scaled).sum() / one.square().sum()).item() == pytest.approx(factor, rel=5e-4)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("parameter", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compute", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_pair_of_dtypes_gives_the_gradient_in_that_of_the_parameter(
    compute: torch.dtype, parameter: torch.dtype, count: int
) -> None:
    parts = chunks(count, compute)
    found = summed(parts, parameter, 0.25)
    assert found.dtype == parameter and found.is_contiguous()
    tolerance = max(torch.finfo(dtype).eps for dtype in (compute, parameter))
    assert relative_error(found, exact(parts, 0.25)) <= max(tolerance, 1e-14)


def test_chunks_of_different_lengths_and_strides_are_summed() -> None:
    parts = [
        (p[: 8 - i].T.contiguous().T, h[: 8 - i].T.contiguous().T) for i, (p, h) in enumerate(chunks(5, torch.float64))
    ]
    assert largest_error(summed(parts, torch.float64), exact(parts)) <= 1e-14


def test_the_gradient_does_not_share_memory_with_its_parameter() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for count in (0, 1, 2):
            parameter = torch.randn(ROWS, COLUMNS).to(dtype)
            total, before = WeightGradient(parameter, dtype, count), parameter.clone()
            for product, hidden in chunks(count, dtype):
                total.add(product, hidden)
            assert total.finish(torch.tensor(0.5)).data_ptr() != parameter.data_ptr()
            assert torch.equal(parameter, before)


# --- memory ---------------------------------------------------------------------------------------------------------

TALL, WIDE = 4096, 256  # a parameter of 2 MB in bfloat16, its sum of 4 MB
NARROW_BYTES, WIDE_BYTES = 2 * TALL * WIDE, 4 * TALL * WIDE


def held(parameter: torch.dtype, count: int) -> list[int]:
    """What is held while a gradient is summed and finished, and at last beside the object that summed it."""
    like = torch.empty(TALL, WIDE, dtype=parameter)
    product, hidden = torch.zeros(1, TALL, dtype=torch.bfloat16), torch.zeros(1, WIDE, dtype=torch.bfloat16)
    alive: list[WeightGradient | Tensor] = []

    def run() -> None:
        total = WeightGradient(like, torch.bfloat16, count)
        for _ in range(count):
            total.add(product, hidden)
        alive.extend([total, total.finish(torch.tensor(0.5))])

    return bytes_held(run)


def test_rounding_the_sum_holds_no_second_wide_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "BLOCK_CPU", TALL * WIDE // 16)
    slack = WIDE_BYTES // 8  # a block or two
    # The sum and the result, of which a block at a time is made from the other; a wide copy would be 4 MB more.
    several = held(torch.bfloat16, 3)
    assert WIDE_BYTES <= max(several) <= WIDE_BYTES + NARROW_BYTES + slack
    assert NARROW_BYTES <= several[-1] <= NARROW_BYTES + slack // 2  # the sum is gone, though its object is not
    # One chunk needs no wide sum, and a float32 parameter takes the sum itself.
    assert NARROW_BYTES <= max(held(torch.bfloat16, 1)) <= NARROW_BYTES + slack
    assert WIDE_BYTES <= max(held(torch.float32, 3)) <= WIDE_BYTES + slack


# --- chunks ---------------------------------------------------------------------------------------------------------


def call_shape(tokens: int, dtype: torch.dtype = torch.float32, narrow: bool = False, width: int = 64) -> CallShape:
    return CallShape(tokens, width, vocabulary=1000, dtype=dtype, cpu=True, narrow_weight=narrow)


@pytest.mark.parametrize("tokens", [0, 1, 511, 512, 513, 1025, 5000])
def test_chunks_are_few_and_of_nearly_one_size(tokens: int) -> None:
    size = Plan(None, Transform(), "torch").chunk(call_shape(tokens))
    count = -(-tokens // size)
    assert size <= CHUNK_CPU and count == -(-tokens // CHUNK_CPU)
    assert count * size - tokens < max(1, count)  # the last one lacks less than a token for each chunk


@pytest.mark.parametrize("width", [64, 576])
def test_one_chunk_where_that_takes_less_than_a_float32_sum_beside_it(width: int) -> None:
    plan, dtype = Plan(None, Transform(), "torch"), torch.bfloat16
    most = CHUNK_CPU + 2 * width  # its logits beyond those of a chunk take 2 N V bytes, the sum 4 V D
    assert plan.chunk(call_shape(most, dtype, True, width)) == most
    assert plan.chunk(call_shape(most + 1, dtype, True, width)) <= CHUNK_CPU
    assert plan.chunk(call_shape(most, dtype, False, width)) <= CHUNK_CPU  # no sum: nothing is spared
    assert plan.chunk(call_shape(most, torch.float32, True, width)) <= CHUNK_CPU


def test_one_chunk_where_its_logits_fit_into_the_buffer_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "KEPT_CPU", KEPT_CPU)  # this folder's tests run without it
    plan, most = Plan(None, Transform(), "torch"), 4 * CHUNK_CPU
    assert plan.chunk(call_shape(most, torch.bfloat16, True)) == most
    assert plan.chunk(call_shape(most + 1, torch.bfloat16, True)) <= CHUNK_CPU
    assert plan.chunk(call_shape(most, torch.bfloat16, False)) <= CHUNK_CPU  # no sum of dW beside it
    assert plan.chunk(call_shape(most // 2, torch.float32, True)) <= CHUNK_CPU
    rows = KEPT_CPU // (2 * 152_000)
    for tokens, chunk in ((rows, rows), (rows + 1, rows // 2 + 1)):
        assert plan.chunk(CallShape(tokens, 8, 152_000, torch.bfloat16, cpu=True, narrow_weight=True)) == chunk
