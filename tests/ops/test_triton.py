"""The row kernels in Triton without a GPU: run by its interpreter, compiled for CUDA, and chosen or refused.

Triton reads ``TRITON_INTERPRET`` when it is imported, which importing this package does, and its interpreter leaves
``triton.language`` patched. So the kernels run in a process of their own: a test here runs the class
:class:`TestInterpreted` in one. ``TRITON_INTERPRET=1 python -m pytest tests/ops/test_triton.py`` shows its tests one
by one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import (
    FP32,
    Problem,
    assert_close,
    assert_stats_close,
    dense_logits,
    dense_loss,
    differentiate,
    fused_loss,
    problem,
    relative_error,
    stats_from_logits,
    to_dtype,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.objectives import DEFT, EAFT, NLL, Cayley, Objective, known_objectives
from deft_lightning.ops import ColumnSparsity, backend, chunked, plan
from deft_lightning.ops.backend import choose_kernel
from deft_lightning.ops.linear import linear_loss, linear_token_stats
from deft_lightning.ops.torch_rows import Transform

HERE = Path(__file__)
ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# --- which kernel runs ----------------------------------------------------------------------------------------------

NARROW = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with triton, which does not interpret."""
    monkeypatch.setattr(backend, "_triton_installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64], ids=str)
@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_auto_is_torch_on_the_cpu(
    dtype: torch.dtype, interpreted: str, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)  # its interpreter is for tests that ask for it
    assert choose_kernel("auto", "cpu", dtype) == choose_kernel("torch", "cpu", dtype) == "torch"


def test_auto_on_cuda_is_triton_where_it_can_compute(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choose_kernel("auto", "cuda", dtype) for dtype in NARROW] == ["triton"] * 3
    assert choose_kernel("auto", "cuda", torch.float64) == "torch"
    assert choose_kernel("torch", "cuda", torch.bfloat16) == "torch"
    assert choose_kernel("triton", "cuda", torch.bfloat16) == "triton"
    monkeypatch.setattr(backend, "_triton_installed", lambda: False)
    assert choose_kernel("auto", "cuda", torch.bfloat16) == "torch"


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_triton_away_from_cuda_needs_its_interpreter(
    device: str, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"on {device}; use backend torch$"):
        choose_kernel("triton", device, torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_kernel("triton", device, torch.float32) == "triton"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_triton_is_refused_in_float64_and_where_it_is_not_installed(
    device: str, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match=r"float64; use backend torch$"):
        choose_kernel("triton", device, torch.float64)
    monkeypatch.setattr(backend, "_triton_installed", lambda: False)
    with pytest.raises(UserError, match=r"not installed; use backend torch$"):
        choose_kernel("triton", device, torch.float32)


@pytest.mark.parametrize("stats_only", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_head_says_in_one_line_that_triton_cannot_run_here(
    dtype: torch.dtype, stats_only: bool, installed: None
) -> None:
    hidden, weight = torch.zeros(5, 4, dtype=dtype), torch.zeros(7, 4, dtype=dtype)
    targets = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(UserError, match=r"backend triton cannot run.*use backend torch") as refused:
        if stats_only:
            linear_token_stats(hidden, weight, targets, backend="triton")
        else:
            linear_loss(hidden, weight, targets, NLL(), backend="triton")
    assert len(str(refused.value).splitlines()) == 1


# --- compiled for CUDA ----------------------------------------------------------------------------------------------

QWEN = 151_936  # divisible by 16: rows are aligned, and the compiler reads eight entries of bfloat16 at once
VARIANTS = [("aligned", 80), ("aligned", 90), ("unaligned", 80), ("one entry", 80)]
KERNELS = ["_statistics_kernel", "_gradient_kernel"]


def compile_kernels() -> None:
    """Compile as the head would launch, and print a JSON object a kernel; runs in a process of its own."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from deft_lightning.ops import triton_rows

    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    types = {
        "targets": "*i64", "arg_max": "*i64", "out": "*fp32", "top": "*fp32", "log_sum": "*fp32", "slope": "*fp32",
        "target_slope": "*fp32", "stride": "i32", "vocabulary": "i32", "rows": "i32", "scale": "fp32", "cap": "fp32",
    }  # fmt: skip
    for pointer, dtype in {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32}.items():
        for alignment, architecture in VARIANTS:
            like = torch.empty(1, 1 if alignment == "one entry" else QWEN, dtype=dtype)
            for capped in (False, True):
                transform = Transform(softcap=30.0 if capped else None)
                options = triton_rows.TritonRows(like, transform)._options(like)
                for name in KERNELS:
                    kernel = getattr(triton_rows, name)
                    signature = {a: pointer if a == "product" else types.get(a, "constexpr") for a in kernel.arg_names}
                    constants = {a: options[a] for a, kind in signature.items() if kind == "constexpr"}
                    assert set(constants) == {"CAPPED", "BLOCK"} and constants["CAPPED"] == capped
                    if alignment == "one entry":  # a launch makes every integer that is 1 a constant
                        ones = {a: 1 for a in signature if signature[a] == "i32"}
                        signature, constants = signature | dict.fromkeys(ones, "constexpr"), constants | ones
                    attributes = {
                        (i,): [["tt.divisibility", 16]]
                        for i, a in enumerate(signature)
                        if alignment == "aligned" and (signature[a] == "i32" or signature[a].startswith("*"))
                    }
                    made = triton.compile(
                        ASTSource(kernel, signature, constants, attributes),
                        target=GPUTarget("cuda", architecture, 32),
                        options={key: options[key] for key in ("num_warps", "enable_fp_fusion")},
                    )
                    report = ""
                    if architecture == 80:  # PTX for later ones may be newer than this assembler
                        Path("kernel.ptx").write_text(made.asm["ptx"])
                        command = [str(ptxas), "-v", "--gpu-name=sm_80", "kernel.ptx", "-o", os.devnull]
                        done = subprocess.run(command, capture_output=True, text=True)
                        report = done.stdout + done.stderr
                    key = [name, pointer, alignment, capped, architecture]
                    print(json.dumps({"key": key, "cubin": len(made.asm["cubin"]), "report": report}), flush=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), *map(str, Path(__file__).parents[:2]), environment.get("PYTHONPATH", "")]
        ),
    }
    command = [sys.executable, "-c", "import test_triton; test_triton.compile_kernels()"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    results = map(json.loads, filter(None, done.stdout.splitlines()))
    return {tuple(result["key"]): result for result in results}


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize(("alignment", "architecture"), VARIANTS)
@pytest.mark.parametrize("pointer", ["*bf16", "*fp16", "*fp32"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernels_compile_for_cuda_without_a_gpu_and_spill_nothing(
    kernel: str, pointer: str, alignment: str, capped: bool, architecture: int,
    compiled: dict[tuple[Any, ...], dict[str, Any]],
) -> None:  # fmt: skip
    result = compiled[kernel, pointer, alignment, capped, architecture]
    assert result["cubin"] > 1000
    if architecture == 80:
        # Five accumulators a lane are kept in registers: memory for them would cost more than reading the logits.
        assert " 0 bytes spill stores" in result["report"], result["report"]


# --- run by the interpreter -----------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this process runs them")
def test_the_kernels_pass_their_tests_in_tritons_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::TestInterpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-20_000:]


OBJECTIVES: list[Objective] = [
    *(cls() for cls in known_objectives().values() if cls.__module__.startswith("deft_lightning.")),
    Cayley(floor=0.5),
    EAFT(k=3),
]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
# One token and one entry, a block that is not full, exactly full, and one entry more; more than two blocks.
SHAPES = [(0, 7), (1, 1), (1, 2), (4, 1), (3, 33), (2, 4095), (2, 4096), (2, 4097), (2, 9001)]
OPTIONS: dict[str, dict[str, Any]] = {
    "masked": {"masked": 0.5},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "logit_scale": {"logit_scale": 0.25},
    "negative logit_scale": {"logit_scale": -1.5, "softcap": 6.0},
    "token_weight": {"weighted": True},
    "everything": {"masked": 0.4, "bias": True, "softcap": 4.0, "logit_scale": 1.7, "weighted": True},
}


def triton_loss(objective: Callable[[TokenStats], Tensor]) -> Callable[[Problem], Tensor]:
    return fused_loss(objective, backend="triton")


def triton_stats(case: Problem, topk: int = 0) -> TokenStats:
    return linear_token_stats(
        case.hidden, case.weight, case.targets, bias=case.bias, topk=topk, backend="triton", **case.options
    )


def of_one_row(logits: Tensor, targets: Tensor, topk: int = 0) -> TokenStats:
    """Statistics of one row of logits, which enters as the bias, for several targets."""
    hidden, weight = torch.zeros(len(targets), 1), torch.zeros(len(logits), 1)
    return linear_token_stats(hidden, weight, targets, bias=logits, topk=topk, backend="triton")


def rows(product: Tensor, targets: Tensor, transform: Transform) -> tuple[TokenStats, Tensor]:
    """Statistics of a product, and the gradient of log p by it, which replaces it."""
    from deft_lightning.ops.triton_rows import TritonRows

    kernel = TritonRows(product, transform)
    stats = kernel.statistics(product, targets)
    kernel.gradient_(product, targets, stats, torch.ones(len(targets)))
    return stats, product


def ramps(vocab: int) -> dict[str, Tensor]:
    """Rows that take the running maximum of a lane every way it can go."""
    steps = torch.arange(vocab).float()
    generator = torch.Generator().manual_seed(vocab)
    return {
        "rising": steps * (60 / vocab),  # every block has a new maximum
        "falling": -steps * (60 / vocab),
        "level": torch.zeros(vocab),
        "see-saw": torch.where(steps % 2 == 0, steps, -steps) * (40 / vocab),
        "noise": 4 * torch.randn(vocab, generator=generator),
        "peak in the last entry": torch.where(steps == vocab - 1, 9.0, 0.0),
        "far below zero": -1e4 + torch.randn(vocab, generator=generator),
    }


class TestInterpreted:
    """The kernels on the CPU, in Triton's interpreter."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize(("n", "vocab"), SHAPES)
    @every_objective
    def test_linear_loss_matches_dense_float64_for_every_shape(self, objective: Objective, n: int, vocab: int) -> None:
        case = problem(n, vocab, masked=0.0, seed=n + vocab)
        found = differentiate(triton_loss(objective), case.to(torch.float32))
        assert found.loss.dtype == torch.float32 and found.loss.shape == ()
        assert_close(found, differentiate(dense_loss(objective), case), FP32)

    @pytest.mark.parametrize("option", OPTIONS)
    @every_objective
    def test_linear_loss_matches_dense_float64_for_every_option(self, objective: Objective, option: str) -> None:
        case = problem(8, 23, seed=1, **OPTIONS[option])
        wanted = differentiate(dense_loss(objective), case, upstream=0.37)
        assert_close(differentiate(triton_loss(objective), case.to(torch.float32), upstream=0.37), wanted, FP32)

    @pytest.mark.parametrize("size", [1, 4])
    @every_objective
    def test_several_chunks_match_dense_float64(
        self, objective: Objective, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plan, "CHUNK_CPU", size)
        case = problem(9, 37, seed=2, masked=0.0, bias=True, weighted=True)
        wanted = differentiate(dense_loss(objective), case)
        assert_close(differentiate(triton_loss(objective), case.to(torch.float32)), wanted, FP32)

    def test_rows_of_logits_may_lie_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(chunked, "row_buffer", lambda like, n, v: like.new_full((n, v + 27), torch.nan)[:, :v])
        case = problem(9, 37, seed=2, masked=0.0, bias=True, weighted=True)
        wanted = differentiate(dense_loss(DEFT()), case)
        assert_close(differentiate(triton_loss(DEFT()), case.to(torch.float32)), wanted, FP32)

    @pytest.mark.parametrize("options", [{}, {"softcap": 60.0}], ids=["plain", "softcap"])
    def test_columns_left_out_stay_within_the_bound_that_is_told(self, options: dict[str, Any]) -> None:
        case = problem(20, 600, dim=24, scale=14.0, masked=0.0, seed=3, **options)
        sparsity = ColumnSparsity(2**-9)
        left_out = case._replace(options={**case.options, "sparsity": sparsity}).to(torch.float32)
        found, wanted = differentiate(triton_loss(DEFT()), left_out), differentiate(dense_loss(DEFT()), case)
        told = sparsity.taken()
        assert told.kept < 0.5 and 0 < told.bound <= 2 * 2**-9
        assert relative_error(found.hidden, wanted.hidden) < 0.02 and relative_error(found.weight, wanted.weight) < 0.02

    @settings(deadline=None, max_examples=40, derandomize=True)
    @given(
        n=st.integers(0, 6),
        vocab=st.integers(1, 40),
        dim=st.integers(1, 9),
        masked=st.sampled_from([0.0, 0.5, 1.0]),
        bias=st.booleans(),
        weighted=st.booleans(),
        options=st.sampled_from([{}, {"softcap": 2.0}, {"logit_scale": -0.5}, {"softcap": 30.0, "logit_scale": 4.0}]),
        upstream=st.sampled_from([1.0, -2.5, 1e-4, 0.0]),
        which=st.integers(0, len(OBJECTIVES) - 1),
        seed=st.integers(0, 10_000),
    )
    def test_linear_loss_matches_dense_float64_for_any_combination(
        self, n: int, vocab: int, dim: int, masked: float, bias: bool, weighted: bool, options: dict[str, float],
        upstream: float, which: int, seed: int,
    ) -> None:  # fmt: skip
        case = problem(n, vocab, dim, masked=masked, bias=bias, weighted=weighted, seed=seed, **options)
        wanted = differentiate(dense_loss(OBJECTIVES[which]), case, upstream)
        assert_close(differentiate(triton_loss(OBJECTIVES[which]), case.to(torch.float32), upstream), wanted, FP32)

    @pytest.mark.parametrize("topk", [0, 4])
    @pytest.mark.parametrize("option", OPTIONS)
    @pytest.mark.parametrize(("n", "vocab"), [(0, 7), (3, 1), (5, 2), (8, 33), (3, 4099)])
    def test_statistics_and_the_gradient_of_log_prob_match_dense_float64(
        self, n: int, vocab: int, option: str, topk: int
    ) -> None:
        case = problem(n, vocab, seed=3, **OPTIONS[option])
        keep = case.targets != -100
        exact = stats_from_logits(dense_logits(case), case.targets.clamp_min(0), topk)
        upstream = torch.randn(n, generator=torch.Generator().manual_seed(1)).double()

        def fused(c: Problem) -> Tensor:
            stats = triton_stats(c, topk)
            for found, wanted in zip(stats, exact, strict=True):
                assert (found is None) == (wanted is None)
                if found is not None and wanted is not None:
                    assert found.shape == (n,) and not found[~keep].any()
                    assert found.dtype in (torch.bool, torch.float32, torch.int64)
                    torch.testing.assert_close(found[keep].to(wanted.dtype), wanted[keep], rtol=1e-4, atol=1e-5)
            return (stats.log_prob * upstream.float()).sum()

        def dense(c: Problem) -> Tensor:
            return (stats_from_logits(dense_logits(c)[keep], c.targets[keep], 0).log_prob * upstream[keep]).sum()

        wanted = differentiate(dense, case)
        # The sum over tokens of either sign cancels; it is covered by the statistics themselves.
        assert_close(differentiate(fused, case.to(torch.float32))._replace(loss=wanted.loss), wanted, FP32)

    def test_an_adapter_is_part_of_the_product(self) -> None:
        case = problem(6, 33, masked=0.0, bias=True, softcap=5.0, seed=4)
        generator = torch.Generator().manual_seed(5)
        low, up = (torch.randn(n, 2, generator=generator).double().requires_grad_() for n in (6, 33))
        narrow = [t.detach().float().requires_grad_() for t in (low, up)]
        plain = case.to(torch.float32)
        found, _ = linear_loss(
            plain.hidden, plain.weight, case.targets, DEFT(), bias=plain.bias, softcap=5.0, backend="triton",
            adapter=(narrow[0], narrow[1]),
        )  # fmt: skip
        # hidden @ weight.T + low @ up.T as one product of wider factors.
        wide = case._replace(hidden=torch.cat([case.hidden, low], 1), weight=torch.cat([case.weight, up], 1))
        wanted = dense_loss(DEFT())(wide)
        for f, w in zip(torch.autograd.grad(found, narrow), torch.autograd.grad(wanted, (low, up)), strict=True):
            assert ((f - w).abs().max() / w.abs().max()).item() <= FP32
        assert found.item() == pytest.approx(wanted.item(), rel=FP32)

    @pytest.mark.parametrize("vocab", [1, 2, 257, 4096, 3 * 4096 + 5])
    @pytest.mark.parametrize("shape", ramps(1))
    def test_the_running_maximum_may_move_in_any_way(self, shape: str, vocab: int) -> None:
        logits = ramps(vocab)[shape]
        targets = torch.tensor([0, vocab // 2, vocab - 1])
        exact = stats_from_logits(logits.double().expand(3, -1), targets, 5)
        found = of_one_row(logits, targets, topk=5)
        # At the ends of a ramp log p is some tens of nats, and a sum of 12,000 entries has rounded a few times.
        assert_stats_close(found, to_dtype(exact, torch.float32), 5e-6, 5e-6)

    def test_finite_logits_of_any_size_have_the_statistics_of_float64(self) -> None:
        # A block of four lanes has an empty one, as far below the largest logit as float32 goes.
        product = torch.tensor([[3e38, -3.3e38, 0.0], [-2e38, -2e38, -3e38], [3e38, 3e38, 1.0]])
        targets = torch.tensor([0, 1, 1])
        exact = stats_from_logits(product.double(), targets, 2)
        stats, _ = rows(product, targets, Transform(topk=2))
        assert_stats_close(stats, to_dtype(exact, torch.float32), 1e-6, 0)

    @pytest.mark.parametrize("offset", [0.0, 100.0, 2000.0, -10_000.0, 1e6])
    def test_gradients_do_not_depend_on_what_all_logits_have_in_common(self, offset: float) -> None:
        # Eighths, so that float32 holds them beside the offset: these are the very logits the oracle sees.
        steps = torch.randint(-40, 40, (3, 301), generator=torch.Generator().manual_seed(15))
        product = steps / 8 + offset
        targets = torch.tensor([0, 17, 300])
        exact = product.double().requires_grad_()
        log_prob = torch.log_softmax(exact, -1).gather(-1, targets.unsqueeze(-1))
        (wanted,) = torch.autograd.grad(log_prob.sum(), exact)
        _, gradient = rows(product, targets, Transform())
        # Each entry, not a share of the largest: an error that all of them have adds up in dX.
        torch.testing.assert_close(gradient.double(), wanted, rtol=FP32, atol=0)

    @pytest.mark.parametrize("padding", [-torch.inf, torch.finfo(torch.float32).min])
    @every_objective
    def test_entries_without_mass_disturb_nothing(self, objective: Objective, padding: float) -> None:
        if objective.needs.reference and padding == -torch.inf:
            pytest.skip("a reference that bars nothing is infinitely far from a prediction that does")
        vocab = 4096 + 40
        case = problem(3, vocab, masked=0.0, bias=True, seed=6, logit_scale=0.5)
        assert case.bias is not None
        # Whole lanes, an entry before and one after those with mass, and the end of the vocabulary.
        case.bias[5:4000] = padding
        case.bias[4096:4101] = padding
        case.bias[-2:] = padding
        case.targets[:] = torch.tensor([0, 4050, 4101])
        wanted = differentiate(dense_loss(objective), case)
        found = differentiate(triton_loss(objective), case.to(torch.float32))
        assert_close(found, wanted, FP32)
        assert found.bias is not None and not found.bias[case.bias == padding].any()

    @every_objective
    def test_extreme_logits_give_finite_values_and_gradients(self, objective: Objective) -> None:
        # +-1e4 at the target and elsewhere, one-hot, uniform; the last two vocabulary entries are padding.
        hidden = torch.tensor(
            [[1e4, -1e4, 0, 0], [-1e4, 1e4, 0, 0], [0, 0, 1e4, 1e4], [-1e4] * 4, [0] * 4, [90, 0, 0, 0]]
        )
        bias = torch.tensor([0.0, 0, 0, 0, -torch.inf, -torch.inf])
        case = Problem(hidden.repeat(2, 1), torch.eye(6, 4), torch.arange(2).repeat_interleave(6), bias)
        found = differentiate(triton_loss(objective), case)
        assert all(value is not None and torch.isfinite(value).all() for value in found)
        assert found.bias is not None and not found.bias[4:].any()

    # A capped infinity is the cap, a number like any other.
    @pytest.mark.parametrize(("bad", "softcap"), [(torch.nan, None), (torch.nan, 5.0), (torch.inf, None)])
    @pytest.mark.parametrize("vocab", [1, 2, 37, 4096 + 40])
    def test_a_row_with_nan_has_no_plausible_statistic_and_the_others_are_not_hurt(
        self, vocab: int, bad: float, softcap: float | None
    ) -> None:
        clean = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab))
        transform = Transform(softcap=softcap)
        for at in {0, vocab // 2, vocab - 1}:
            targets = torch.tensor([0, at, vocab - 1])
            wanted, right = rows(clean.clone(), targets, transform)
            for target in {0, at, vocab - 1}:  # itself, and one of the others
                targets[1], spoilt = target, clean.clone()
                spoilt[1, at] = bad
                stats, gradient = rows(spoilt, targets, transform)
                for found, field in zip(stats[:3], wanted[:3], strict=True):
                    assert found is not None and field is not None and found[1].isnan()
                    assert found[[0, 2]].isfinite().all() and torch.equal(found[[0, 2]], field[[0, 2]])
                assert gradient[1].isnan().any() and torch.equal(gradient[[0, 2]], right[[0, 2]])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("vocab", [7, 4096 + 40])
    def test_nearly_certain_tokens_keep_their_digits(self, vocab: int, dtype: torch.dtype) -> None:
        gaps = torch.tensor([18.0, 21.0, 24.0, 27.0, 30.0])  # exact in every dtype; 1 - p goes down to 6e-13
        product = torch.zeros(5, vocab, dtype=dtype)
        product[:, vocab - 3] = gaps.to(dtype)
        targets = torch.full((5,), vocab - 3)
        stats, gradient = rows(product, targets, Transform())
        # In closed form, because p - 1 would cancel in float64 too.
        gaps = gaps.double()
        tail = (vocab - 1) * (-gaps).exp()
        torch.testing.assert_close(stats.log_prob.double(), -torch.log1p(tail), rtol=1e-5, atol=0)
        entropy = torch.log1p(tail) + gaps * tail / (1 + tail)
        torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=0)
        collision = (1 + tail * (-gaps).exp()) / (1 + tail).square()
        torch.testing.assert_close(stats.collision.double(), collision, rtol=2e-7, atol=0)
        assert stats.correct.all()
        if dtype != torch.float16:  # 6e-13 is no float16: the head boosts gradients for it
            rounding = max(1e-5, torch.finfo(dtype).eps)
            torch.testing.assert_close(gradient[:, vocab - 3].double(), tail / (1 + tail), rtol=rounding, atol=0)

    def test_a_nearly_certain_mistake_keeps_its_digits(self) -> None:
        gaps = torch.tensor([18.0, 24.0, 30.0])
        product = torch.zeros(3, 9)
        product[:, 4] = gaps
        stats, gradient = rows(product, torch.full((3,), 2), Transform())
        tail = 8 * (-gaps.double()).exp()
        torch.testing.assert_close(stats.log_prob.double(), -gaps.double() - torch.log1p(tail), rtol=1e-6, atol=0)
        assert not stats.correct.any()
        torch.testing.assert_close(gradient[:, 4].double(), -1 / (1 + tail), rtol=1e-5, atol=0)
        others = (-gaps.double()).exp() / (1 + tail)
        torch.testing.assert_close(gradient[:, 0].double(), -others, rtol=1e-5, atol=0)

    @pytest.mark.parametrize(
        "tied", [(0, 1), (3, 4095), (5, 4096), (5, 4096 + 5), (4000, 4100), (4100, 8200), (4, 9000), (8999, 9000)]
    )
    def test_correct_means_the_first_of_equal_entries(self, tied: tuple[int, int]) -> None:
        # In one lane of several blocks, in neighbouring lanes, and in a later lane whose entry comes first.
        logits = torch.randn(9001, generator=torch.Generator().manual_seed(7)).clamp_max(3.0)
        logits[list(tied)] = 4.0
        found = of_one_row(logits, torch.tensor([*tied, 17]))
        assert found.correct.tolist() == [True, False, False]
        assert found.log_prob[0] == found.log_prob[1]

    @pytest.mark.parametrize("vocab", [2, 33, 5000])
    def test_correct_with_every_entry_equal_means_the_first(self, vocab: int) -> None:
        assert of_one_row(torch.full((vocab,), -3.0), torch.tensor([0, 1, vocab - 1])).correct.tolist() == [
            True, False, False,
        ]  # fmt: skip

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @every_objective
    def test_narrow_gradients_are_no_worse_than_twice_the_dense_ones(
        self, objective: Objective, dtype: torch.dtype
    ) -> None:
        # Scaled, so that every truncated objective has something to train. The interpreter cuts float32 off to bfloat16
        # where a GPU rounds to nearest: gradients are off by up to a unit in the last place rather than a half, always
        # towards zero. With the rounding of the logits and of dX and dW, which both heads share, that is 1.2 times the
        # dense error here, so that twice it still means something.
        narrow = problem(24, 61, dim=16, masked=0.2, bias=True, seed=8, scale=5.0).to(dtype)
        oracle = differentiate(dense_loss(objective), narrow.to(torch.float64), upstream=0.01)
        dense = differentiate(dense_loss(objective), narrow, upstream=0.01)
        fused = differentiate(triton_loss(objective), narrow, upstream=0.01)
        for name in ("hidden", "weight", "bias"):
            found, plain, wanted = (getattr(result, name) for result in (fused, dense, oracle))
            assert found.dtype == dtype and wanted.any()
            error, allowed = relative_error(found, wanted), relative_error(plain, wanted)
            assert error <= 2 * allowed, f"{name}: {error:.2e} against {allowed:.2e}"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_statistics_of_narrow_logits_are_those_of_float32(self, dtype: torch.dtype) -> None:
        product = (3 * torch.randn(6, 4096 + 40, generator=torch.Generator().manual_seed(9))).to(dtype)
        before, targets = product.clone(), torch.arange(6) * 800
        exact = stats_from_logits(product.double(), targets, 3)
        found, gradient = rows(product, targets, Transform(topk=3))
        assert_stats_close(found, to_dtype(exact, torch.float32), 1e-5, 1e-5)
        assert gradient.dtype == dtype and not torch.equal(gradient, before)

    def test_float16_gradients_of_tiny_probabilities_are_no_worse_than_twice_the_dense_ones(self) -> None:
        narrow = problem(6, 5000, dim=16, masked=0.0, bias=True, seed=10).to(torch.float16)
        oracle = differentiate(dense_loss(DEFT()), narrow.to(torch.float64), upstream=0.05)
        dense = differentiate(dense_loss(DEFT()), narrow, upstream=0.05)
        fused = differentiate(triton_loss(DEFT()), narrow, upstream=0.05)
        for name in ("hidden", "weight", "bias"):
            found, plain, wanted = (getattr(result, name) for result in (fused, dense, oracle))
            assert relative_error(found, wanted) <= 2 * relative_error(plain, wanted), name

    # Rows of a buffer that is wider than they are.

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("vocab", [1, 33, 4096, 4097])
    def test_what_lies_between_rows_is_neither_used_nor_written(self, vocab: int, dtype: torch.dtype) -> None:
        # Larger than any logit: it would win every maximum if it were seen.
        buffer = torch.full((4, vocab + 9), 1000.0).to(dtype)
        product = buffer[:, 3 : 3 + vocab]
        product.copy_(torch.randn(4, vocab, generator=torch.Generator().manual_seed(11)))
        targets, transform = torch.tensor([0, vocab - 1, vocab // 2, 0]), Transform(softcap=7.0, topk=3)
        wanted, right = rows(product.clone().contiguous(), targets, transform)
        found, gradient = rows(product, targets, transform)
        assert [f is None for f in found] == [w is None for w in wanted] and found.topk_entropy is not None
        for f, w in zip(found, wanted, strict=True):
            assert f is None or (w is not None and torch.equal(f, w))
        assert torch.equal(gradient, right)
        assert (buffer[:, :3] == 1000).all() and (buffer[:, 3 + vocab :] == 1000).all()

    @pytest.mark.parametrize("vocab", [33, 4097])
    def test_nothing_is_touched_behind_the_last_row(self, vocab: int) -> None:
        import ctypes
        import mmap

        # The product ends where a page begins that nobody may touch: an entry too many is a crash.
        size, count = 16 * mmap.PAGESIZE, 2 * vocab
        memory = mmap.mmap(-1, size + mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0  # PROT_NONE
        product = torch.frombuffer(memory, dtype=torch.float32, count=count, offset=size - 4 * count).view(2, vocab)
        product.copy_(torch.randn(2, vocab, generator=torch.Generator().manual_seed(14)))
        targets = torch.tensor([0, vocab - 1])
        wanted, right = rows(product.clone(), targets, Transform())
        found, gradient = rows(product, targets, Transform())
        assert torch.equal(found.log_prob, wanted.log_prob) and torch.equal(gradient, right)

    def test_statistics_leave_the_product_as_it_is(self) -> None:
        from deft_lightning.ops.triton_rows import TritonRows

        product = torch.randn(2, 4097, generator=torch.Generator().manual_seed(12))
        before = product.clone()
        TritonRows(product, Transform(0.5, 3.0, 4)).statistics(product, torch.tensor([0, 4096]))
        assert torch.equal(product, before)

    def test_row_offsets_beyond_two_to_the_31_are_not_wrapped(self) -> None:
        # The last of three rows begins behind element 2**31, as row 14,135 of 151,936 entries does. Memory that is
        # never touched is never given, so the 4 GB are an address range.
        import resource  # only where triton is: not on Windows

        vocab, stride = 50, 2**30 + 64
        buffer = torch.empty(2 * stride + vocab, dtype=torch.bfloat16)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        product = buffer.as_strided((3, vocab), (stride, 1))
        compact = torch.randn(3, vocab, generator=torch.Generator().manual_seed(13)).bfloat16()
        product.copy_(compact)
        assert 2 * product.stride(0) > 2**31
        targets = torch.tensor([1, 2, 3])
        found, gradient = rows(product, targets, Transform(topk=3))
        wanted, right = rows(compact, targets, Transform(topk=3))
        for name in ("log_prob", "collision", "entropy", "correct", "topk_entropy", "arg_max"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name
        assert torch.equal(gradient, right)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
