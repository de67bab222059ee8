"""A processor without instructions for bfloat16 is told of before training, by a measurement."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deft_lightning.training import slow_products
from deft_lightning.training.fsdp2 import FSDP2Strategy
from deft_lightning.training.protocols import precision_of
from deft_lightning.training.slow_products import times_as_long, warn_of_slow_products


def said(model: Any, precision: str = "32-true") -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_slow_products(model, precision)
    return [str(one.message) for one in caught]


def test_the_factor_is_that_of_the_fastest_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that says what each product took: bfloat16 7 s, then 4 and 5; float32 9 s, then 2 and 3."""
    ticks = iter([0, 7, 10, 14, 20, 25, 0, 9, 10, 12, 20, 23])
    monkeypatch.setattr(slow_products.time, "perf_counter", lambda: next(ticks))
    assert times_as_long(torch.bfloat16) == 2.0


@pytest.mark.parametrize(("factor", "warned"), [(21.4, True), (1.1, False)])
def test_a_large_model_is_warned_of_where_the_processor_is_slow(
    factor: float, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(slow_products, "times_as_long", lambda dtype: (asked.append(dtype), factor)[1])
    large = torch.nn.Linear(8192, 4096, bias=False, dtype=torch.bfloat16)
    lines = said(large)
    assert asked == [torch.bfloat16] and len(lines) == warned
    if warned:
        assert "takes 21 times as long in bfloat16" in lines[0] and "--model.dtype float32" in lines[0]
    asked.clear()
    small, full = torch.nn.Linear(64, 64, dtype=torch.bfloat16), torch.nn.Linear(8192, 4096, bias=False)
    assert said(small) == said(full) == [] and asked == [], "nothing is measured where nothing depends on it"
    mixed = said(full, "bf16-mixed")  # weights in float32, products in bfloat16
    assert len(mixed) == warned and said(small, "bf16-mixed") == []
    assert not warned or mixed[0].endswith("--trainer.precision 32-true trains faster here")


def test_fsdp2_in_low_precision_is_no_full_float32() -> None:
    """FSDP takes the precision over, and leaves Lightning's at 32-true."""
    strategy = FSDP2Strategy()
    trainer = SimpleNamespace(strategy=strategy, precision="32-true")
    assert precision_of(trainer) == "32-true"
    strategy.low_precision = True
    assert precision_of(trainer) == "bf16-mixed"


def test_full_float32_on_a_gpu_is_warned_of() -> None:
    with FakeTensorMode():  # weights of a device that need not be there
        large = torch.nn.ParameterList([torch.empty(8192, 4096, device="cuda")])
        small = torch.nn.ParameterList([torch.empty(64, 64, device="cuda")])
    (line,) = said(large, "32-true")
    assert "--trainer.precision bf16-mixed" in line and "set_float32_matmul_precision('high')" in line
    assert said(small, "32-true") == said(large, "bf16-mixed") == []
    torch.set_float32_matmul_precision("high")
    try:
        assert said(large, "32-true") == []
    finally:
        torch.set_float32_matmul_precision("highest")
