"""Training of whole weights in bfloat16 says how many of them a step can move; nothing else is warned of."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import adam, bare_trainer, constant, save_tiny_llama, split_data, sums, write_rows

from deft_lightning import SFTModule
from deft_lightning.models import LoRA
from deft_lightning.training.rounding import share_that_moves


def test_a_step_below_half_the_distance_to_the_neighbour_moves_nothing() -> None:
    one = torch.tensor([1.0], dtype=torch.bfloat16)  # its neighbours are 2^-7 above and 2^-8 below
    assert [share_that_moves([one], step) for step in (2**-9.5, 2**-8.5, 2**-7.5)] == [0.0, 0.5, 1.0]
    assert share_that_moves([one, torch.full((3,), 1e-4, dtype=torch.bfloat16)], 2**-10) == 0.75
    assert share_that_moves([one.float()], 1e-6) == 1.0


@pytest.mark.parametrize("rate", [1e-6, 1e-5, 5e-5])
def test_the_share_is_that_of_a_step_of_adamw(rate: float) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter((0.02 * torch.randn(300, 200)).to(torch.bfloat16))
    before, expected = weight.detach().clone(), share_that_moves([weight], rate)
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
    weight.grad = torch.randn(weight.shape).to(torch.bfloat16)
    optimizer.step()
    moved = (weight != before).float().mean().item()
    assert 0.001 < moved < 0.99
    assert expected == pytest.approx(moved, abs=0.01)


def warned(folder: Path, precision: Any, **options: Any) -> list[str]:
    module = SFTModule(
        pretrained=save_tiny_llama(folder / "base", 0.02), optimizer=lambda p: adam(p, lr=1e-5), scheduler=constant,
        **options,
    )  # fmt: skip
    data = split_data(write_rows(folder / "rows.jsonl", sums(8)), cache_dir=str(folder / "cache"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bare_trainer(folder, max_epochs=-1, max_steps=2, precision=precision).fit(module, data)
    return [str(one.message) for one in caught if "rounding" in str(one.message)]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", "bfloat16"), ("bf16-true", "float32"), ("bf16-true", "bfloat16")]
)
def test_whole_weights_in_bfloat16_are_warned_of_once(precision: str, dtype: Any, tmp_path: Path) -> None:
    (line,) = warned(tmp_path, precision, dtype=dtype)
    assert "\n" not in line and "--trainer.precision bf16-mixed" in line and "bfloat16" in line and "1e-05" in line
    share = re.search(r"moves ([\d.]+)%", line)
    assert share is not None and 0.1 < float(share[1]) < 20


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("32-true", {}),
        ("bf16-mixed", {}),
        ("bf16-true", {"lora": LoRA(r=2)}),
        ("32-true", {"lora": LoRA(r=2), "dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_mixed_precision_and_adapters_are_not(precision: str, options: dict[str, Any], tmp_path: Path) -> None:
    assert warned(tmp_path, precision, **options) == []
