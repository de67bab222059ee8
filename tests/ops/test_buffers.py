"""The buffer of logits that is kept: who may write into it, and how large it may be."""

from __future__ import annotations

import resource
import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest
import torch
from dense import assert_close, dense_loss, differentiate, fused_loss, peak_bytes, problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from deft_lightning.functional import TokenStats
from deft_lightning.objectives import DEFT, EAFT, NLL, Cayley, Objective
from deft_lightning.ops import buffers, linear_loss, linear_token_stats

FLOAT = torch.empty(0)


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_the_next_call_writes_over_the_memory_of_the_one_before() -> None:
    first = buffers.row_buffer(FLOAT, 4, 100)
    where = address(first)
    buffers.give_back(first)
    second = buffers.row_buffer(torch.empty(0, dtype=torch.bfloat16), 7, 30)  # another dtype and shape, less memory
    assert address(second) == where and second.shape == (7, 30) and second.dtype == torch.bfloat16
    assert second.is_contiguous() and not second.requires_grad


def test_a_larger_buffer_takes_the_place_of_a_smaller_one() -> None:
    buffers.give_back(buffers.row_buffer(FLOAT, 4, 100))
    larger = buffers.row_buffer(FLOAT, 8, 100)
    assert larger.untyped_storage().nbytes() == 3200
    buffers.give_back(larger)
    assert address(buffers.row_buffer(FLOAT, 8, 100)) == address(larger)


def test_two_at_once_never_share_memory() -> None:
    buffers.give_back(buffers.row_buffer(FLOAT, 4, 100))
    first, second = buffers.row_buffer(FLOAT, 4, 100), buffers.row_buffer(FLOAT, 4, 100)
    assert address(first) != address(second)
    buffers.give_back(first)
    buffers.give_back(second)  # one is kept, the other is freed
    assert [storage.data_ptr() for storage in buffers._spare] == [address(first)]


def test_more_than_the_limit_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "KEPT_CPU", 1599)
    buffers.give_back(buffers.row_buffer(FLOAT, 4, 100))
    assert not buffers._spare
    buffers.give_back(buffers.row_buffer(FLOAT, 3, 100))
    assert buffers._spare


def test_a_fake_tensor_and_a_device_have_buffers_of_their_own() -> None:
    buffers.give_back(buffers.row_buffer(FLOAT, 4, 100))
    kept = list(buffers._spare)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for like in (mode.from_tensor(FLOAT), FLOAT):
            fake = buffers.row_buffer(like, 4, 100)
            assert isinstance(fake, FakeTensor)
            buffers.give_back(fake)
    buffers.give_back(buffers.row_buffer(torch.empty(0, device="meta"), 4, 100))
    assert [storage.data_ptr() for storage in buffers._spare] == [storage.data_ptr() for storage in kept]


@pytest.mark.parametrize("vocabulary", [40, 3000, 40_000])
def test_tensors_of_the_cpu_are_worked_on_whatever_the_default_device(vocabulary: int) -> None:
    case = problem(9, vocabulary, seed=1, masked=0.0, bias=True)
    wanted = differentiate(dense_loss(EAFT(k=5)), case)
    for _ in range(2):  # the second time with the buffer of the first
        with torch.device("meta"):
            assert_close(differentiate(fused_loss(EAFT(k=5)), case), wanted, 1e-10)


def test_an_error_that_is_held_does_not_hold_the_buffer() -> None:
    case = problem(12, 40, seed=1, masked=0.0)

    def fails(stats: TokenStats) -> Tensor:
        raise ZeroDivisionError("of the objective")

    with pytest.raises(ZeroDivisionError) as held:
        differentiate(fused_loss(fails), case)
    frames = [entry.frame.f_locals for entry in held.traceback]
    assert any("chunks" in found for found in frames)
    assert not any(hasattr(found.get("chunks"), "buffer") for found in frames)


def test_the_gradient_of_a_bias_takes_no_copy_of_a_chunk() -> None:
    """In 16 bits, where it is summed in float32; one chunk has all tokens."""
    tokens, vocabulary = 2000, 3000
    hidden = torch.randn(tokens, 8, dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, 8, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(vocabulary, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    peaks = [
        peak_bytes(lambda given=given: linear_loss(hidden, weight, targets, NLL(), bias=given))  # type: ignore[misc]
        for given in (None, bias)
    ]
    assert peaks[1] - peaks[0] < 0.2 * 4 * tokens * vocabulary


def test_what_inference_mode_has_made_can_be_trained_with() -> None:
    case = problem(9, 40, seed=1, masked=0.0)
    with torch.inference_mode():
        linear_token_stats(case.hidden, case.weight, case.targets)
    assert buffers._spare
    assert_close(differentiate(fused_loss(DEFT()), case), differentiate(dense_loss(DEFT()), case), 1e-10)


@pytest.mark.parametrize("objective", [NLL(), DEFT(), Cayley(floor=0.5)], ids=repr)
@pytest.mark.parametrize("left", [float("nan"), float("inf"), -1e30])
def test_nothing_of_what_stood_there_is_read(objective: Objective, left: float) -> None:
    case = problem(1100, 37, seed=3, masked=0.2, bias=True, weighted=True)
    wanted = differentiate(dense_loss(objective), case)
    buffers.release()
    before = buffers.row_buffer(torch.empty(0, dtype=torch.float64), 1100, 50).fill_(left)
    buffers.give_back(before)
    assert_close(differentiate(fused_loss(objective), case), wanted, 1e-10)
    assert [storage.data_ptr() for storage in buffers._spare] == [address(before)]  # it was that memory


def test_an_objective_that_calls_the_head_itself_gets_what_it_would_get_outside() -> None:
    case, other = problem(12, 40, seed=1, masked=0.0), problem(9, 30, seed=2, masked=0.0)
    inner: list[Any] = []

    def asks(stats: TokenStats) -> Tensor:
        inner.append(linear_loss(other.hidden, other.weight, other.targets, NLL())[0])
        return -stats.log_prob

    found = differentiate(fused_loss(asks), case)
    assert_close(found, differentiate(dense_loss(NLL()), case), 1e-10)
    assert torch.equal(inner[0], linear_loss(other.hidden, other.weight, other.targets, NLL())[0])


def test_an_error_of_an_objective_leaves_the_head_as_it_was() -> None:
    case = problem(12, 40, seed=1, masked=0.0)

    def fails(stats: TokenStats) -> Tensor:
        raise ZeroDivisionError("of the objective")

    with pytest.raises(ZeroDivisionError, match="of the objective"):
        differentiate(fused_loss(fails), case)
    assert_close(differentiate(fused_loss(DEFT()), case), differentiate(dense_loss(DEFT()), case), 1e-10)


@pytest.mark.slow
def test_threads_have_buffers_of_their_own() -> None:
    cases = [problem(64, 500, seed=seed, masked=0.0) for seed in range(4)]
    wanted = [differentiate(dense_loss(DEFT()), case) for case in cases]
    failed: list[BaseException] = []

    def work(place: int) -> None:
        try:
            for _ in range(50):
                assert_close(differentiate(fused_loss(DEFT()), cases[place]), wanted[place], 1e-10)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(buffers._spare) <= 1


FAULTS = """
    import resource, torch
    from deft_lightning.objectives import NLL
    from deft_lightning.ops import buffers, linear_token_stats
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        linear_token_stats(hidden, weight, targets)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    hidden, weight, targets = torch.randn(256, 8), torch.randn(48_000, 8), torch.zeros(256, dtype=torch.long)
    faults(), faults()
    kept = faults()
    buffers.release()
    print(kept, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults of Linux; the addresses above cover the rest")
def test_the_system_need_not_hand_its_pages_out_again() -> None:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FAULTS)], capture_output=True, text=True, check=True, timeout=300
    )
    kept, fresh = map(int, run.stdout.split())
    pages = 256 * 48_000 * 4 // resource.getpagesize()
    # Huge pages, where the system uses them, are a few faults for all of it.
    assert kept < 0.2 * pages and (fresh > 0.9 * pages or fresh < 0.05 * pages)
