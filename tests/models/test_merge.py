"""Adapters in the weights: exact in float32, and in the dtype of the base with what rounding costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from worlds import tiny_llama

from deft_lightning.errors import UserError
from deft_lightning.models import LoRA, add_adapters, save_hugging_face
from deft_lightning.models.load import ready
from deft_lightning.models.merge import merge_of, merged

IDS = torch.arange(10, 90)[None]


def adapted(dtype: torch.dtype, size: float = 0.05, tied: bool = True, **lora: Any) -> Any:
    """A model with adapters as if trained; ``size`` is the standard deviation of B."""
    model, _ = tiny_llama(0.3, tie_word_embeddings=tied)
    model = add_adapters(ready(model).to(dtype), LoRA(r=4, **lora))
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            weight.data += size * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    return model


def predictions(model: Any) -> Tensor:
    with torch.no_grad():
        return model.float().eval()(input_ids=IDS).logits.double().log_softmax(-1)


def kl(one: Tensor, other: Tensor) -> float:
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "lora", [{}, {"target_modules": ["q_proj", "lm_head"]}, {"embeddings": True}], ids=["body", "head", "whole"]
)
def test_merged_in_float32_it_predicts_as_the_trained_model(
    lora: dict[str, Any], dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    model = adapted(dtype, tied=tied, **lora)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    folder = save_hugging_face(model, None, [], tmp_path / "out")
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float32}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items()), "it stays as it was"
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with model.disable_adapter():
        untrained = predictions(model)
    assert kl(predictions(model), untrained) > 1e-3 and kl(predictions(model), predictions(loaded)) < 1e-6


@pytest.mark.parametrize(("size", "lost"), [(0.05, (0.0, 0.2)), (1e-4, (0.5, 2.0))])
def test_in_the_dtype_of_the_base_what_rounding_costs_is_told(
    size: float, lost: tuple[float, float], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = adapted(torch.bfloat16, size)
    folder = save_hugging_face(model, None, [], tmp_path / "out", merge="base")
    (line,) = [str(warning.message) for warning in recwarn if "merged in bfloat16" in str(warning.message)]
    told = float(line.split("rounding is ")[1].split("%")[0]) / 100
    assert lost[0] < told < lost[1]
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    # By hand: of one layer that the adapters change, against the sum in float64.
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    change = layer.get_delta_weight("default").double()
    name = "model.layers.0.mlp.up_proj.weight"
    written = load_file(folder / "model.safetensors")[name].double()
    error = (written - layer.base_layer.weight.double() - change).norm() / change.norm()
    assert 0.2 * told < float(error) < 5 * told


def test_a_base_in_float32_has_nothing_to_round(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = adapted(torch.float32)
    one, other = merged(model, "float32").state_dict(), merged(model, "base").state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert not [warning for warning in recwarn if "merged" in str(warning.message)]


def test_ways_to_merge() -> None:
    assert [merge_of(asked) for asked in (True, False, "base", "float32", "none")] == [
        "float32", "none", "base", "float32", "none",
    ]  # fmt: skip
    with pytest.raises(UserError, match="--merge bfloat16 is not one of float32, base, none"):
        merge_of("bfloat16")  # type: ignore[arg-type]
