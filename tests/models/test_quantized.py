"""A base in 4 or 8 bits under adapters: what is stored, what is computed with it, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config
from worlds import byte_tokenizer, save_tiny_llama

from deft_lightning import SFTModule
from deft_lightning.errors import UserError
from deft_lightning.models import LoRA, add_adapters, find_head
from deft_lightning.models.checks import check_causal, check_head, evaluating
from deft_lightning.models.dequantized import float_weight
from deft_lightning.models.load import load_pretrained, recompute_activations
from deft_lightning.models.merge import merged
from deft_lightning.models.quantized import (
    base_line,
    compute_in,
    parameter_count,
    quantization_of,
    quantized_layers,
    scales,
)
from deft_lightning.objectives import DEFT, KLAnchor
from deft_lightning.training.fsdp2 import FSDP2Strategy
from deft_lightning.training.model_checks import check_precision

pytest.importorskip("bitsandbytes", reason="a quantised base needs the packages of deft-lightning[qlora]")
pytest.importorskip("accelerate", reason="a quantised base needs the packages of deft-lightning[qlora]")

KINDS = ["nf4", "int8"]
IDS = torch.arange(10, 90)[None]
# The quantiles of a normal distribution that NF4 has (arXiv 2305.14314, appendix E).
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return save_tiny_llama(tmp_path / "base", 0.3, hidden_size=64, tie_word_embeddings=request.param)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return save_tiny_llama(tmp_path / "base", 0.3, hidden_size=64)


def adapted(base: str, kind: Any, lora: LoRA | None = None, **options: Any) -> Any:
    """Adapters over a quantised base, as if trained."""
    torch.manual_seed(0)
    model = add_adapters(load_pretrained(base, "float32", quantization=kind, **options), lora or LoRA(r=4))
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return model


def predictions(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.double().log_softmax(-1)


def kl(one: Tensor, other: Tensor) -> float:
    return float((one.exp() * (one - other)).sum(-1).mean())


def test_what_is_stored_is_what_the_papers_say(folder: str, kind: Any) -> None:
    plain = dict(load_pretrained(folder, "float32").named_modules())
    layers = dict(quantized_layers(load_pretrained(folder, "float32", quantization=kind)))
    assert {name.rpartition(".")[2] for name in layers} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    for name, layer in layers.items():
        weight: Tensor = plain[name].weight.detach()
        stored = float_weight(layer)
        if kind == "int8":
            step = weight.abs().amax(dim=1, keepdim=True) / 127
            rounded = weight.half().float() - weight  # bitsandbytes goes through float16
            assert bool(((stored - weight - rounded).abs() <= step * 0.501).all())
            continue
        blocks = weight.reshape(-1, 64)
        largest = blocks.abs().amax(dim=1, keepdim=True)
        nearest = (blocks / largest).unsqueeze(-1).sub(torch.tensor(NF4)).abs().argmin(dim=-1)
        wanted = torch.tensor(NF4)[nearest] * largest
        # The scales of blocks are in 8 bits too.
        assert float((stored.reshape(-1, 64) - wanted).norm() / wanted.norm()) < 0.02


def test_bits_a_weight(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "wide", 0.3, hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    model = load_pretrained(base, "float32", quantization="nf4")
    packed = [layer.weight for _, layer in quantized_layers(model)]
    count = sum(map(parameter_count, packed))
    assert count == 4 * 512 * 512 + 3 * 512 * 1024
    tables = 7 * (16 + 256 + 1) * 4
    stored = sum(weight.numel() * weight.element_size() for weight in (*packed, *scales(model)))
    assert (stored - tables) * 8 / count == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, rel=1e-6)
    line = base_line(model, "nf4")
    assert line.startswith(f"base: {count:,} parameters in nf4 ({stored / 1e6:,.1f} MB), ")


def test_gradients_are_those_of_a_model_that_holds_the_same_weights_in_float32(base: str, kind: Any) -> None:
    model = adapted(base, kind)
    plain = add_adapters(load_pretrained(base, "float32"), LoRA(r=4))
    plain.load_state_dict({n: w for n, w in model.named_parameters() if "lora_" in n}, strict=False)
    modules = dict(plain.named_modules())
    with torch.no_grad():
        for name, layer in quantized_layers(model):
            modules[name].weight.copy_(float_weight(layer))
    for one in (model, plain):
        one.train()(input_ids=IDS, labels=IDS).loss.backward()
    wanted = {name: weight.grad for name, weight in plain.named_parameters() if weight.grad is not None}
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert found.keys() == wanted.keys() and all("lora_" in name for name in found) and len(found) == 2 * 7 * 2
    for name, gradient in found.items():
        assert float((gradient - wanted[name]).norm() / wanted[name].norm()) < 1e-4, name


@pytest.mark.parametrize("objective", [DEFT(), KLAnchor()], ids=repr)
@pytest.mark.parametrize("lora", [{}, {"target_modules": ["q_proj", "lm_head"]}, {"embeddings": True}], ids=str)
def test_the_fused_head_is_that_of_the_model(base: str, kind: Any, lora: dict[str, Any], objective: Any) -> None:
    model = adapted(base, kind, LoRA(r=4, **lora))
    seam = find_head(model, "torch")
    check_head(model, seam, IDS, objective)
    check_causal(model, IDS)
    assert type(seam.projection) is torch.nn.Linear and seam.projection.weight.dtype == torch.float32


def test_a_row_does_not_depend_on_the_rows_beside_it(folder: str, kind: Any) -> None:
    model = adapted(folder, kind)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] *= 1e3  # a row of outliers
    beside = torch.full_like(IDS, 7)
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            alone, both = model(input_ids=IDS).logits, model(input_ids=torch.cat([IDS, beside])).logits
        # Where the last bits of a product depend on its number of rows, that is no more than rounding.
        assert float((alone[0] - both[0]).abs().max()) <= 1e-4 * float(alone.abs().max())


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["q_proj", "lm_head"]}, {"embeddings": True},
                                  {"modules_to_save": ["norm"]}], ids=str)  # fmt: skip
def test_merged_it_predicts_as_the_trained_model(base: str, kind: Any, lora: dict[str, Any]) -> None:
    model = adapted(base, kind, LoRA(r=4, **lora)).train()  # without dropout; in eval mode int8 rounds inputs too
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    whole = merged(model, "float32")
    assert quantization_of(whole) is None and not hasattr(whole.config, "quantization_config")
    assert {weight.dtype for weight in whole.parameters()} == {torch.float32}
    trained = predictions(model)
    with model.disable_adapter():
        assert kl(trained, predictions(model)) > 1e-3
    assert kl(trained, predictions(whole)) < 1e-6
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters()), "it stays as it was"


def test_merged_in_the_dtype_of_the_base_its_rounding_is_told(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    model = add_adapters(load_pretrained(folder, "bfloat16", quantization="nf4"), LoRA(r=4))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(0.5)
    with caplog.at_level("INFO"):
        whole = merged(model, "base")
    assert {weight.dtype for weight in whole.parameters()} == {torch.bfloat16}
    assert any("merged into the base as dequantised from nf4" in line for line in caplog.messages)


def test_products_are_made_in_the_dtype_that_is_asked_for(folder: str) -> None:
    model = adapted(folder, "nf4", compute_dtype="bfloat16").eval()
    assert {layer.compute_dtype for _, layer in quantized_layers(model)} == {torch.bfloat16}
    low = predictions(model)
    compute_in(model, torch.float32)
    assert 1e-6 < kl(predictions(model), low) < 0.05
    assert kl(predictions(model), predictions(merged(model, "float32"))) < 1e-6


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no adapters": ({"lora": None}, "train adapters over it with --model.lora.r 16"),
    "unknown": ({"quantization": "int3"}, "--model.quantization must be nf4 or int8, not 'int3'"),
    "dora": ({"lora": LoRA(use_dora=True)}, "--model.lora.use_dora"),
    "pissa": ({"lora": LoRA(init_lora_weights="pissa")}, "--model.lora.init_lora_weights pissa"),
    "experts": ({"lora": LoRA(target_parameters=["mlp.experts.down_proj"])}, "--model.lora.target_parameters"),
    "compute dtype of int8": ({"quantization": "int8", "compute_dtype": "bfloat16"}, "--model.compute_dtype bfloat16"),
    "compute dtype alone": ({"quantization": None, "compute_dtype": "bfloat16"}, "add --model.quantization nf4"),
    "random weights": ({"pretrained": None, "architecture": {"model_type": "llama"}}, "random weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_one_line(name: str, folder: str) -> None:
    options, wanted = REFUSED[name]
    with pytest.raises(UserError) as caught:
        SFTModule(**{"pretrained": folder, "quantization": "nf4", "lora": LoRA(r=2), **options})
    assert wanted in str(caught.value) and "\n" not in str(caught.value)


def test_packages_that_are_missing_are_named(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"nf4 needs bitsandbytes: pip install 'deft-lightning\[qlora\]'$"):
        SFTModule(pretrained=folder, quantization="nf4", lora=LoRA(r=2))


def test_strategies_and_precisions_that_cannot_hold_it_are_refused() -> None:
    with pytest.raises(UserError, match=r"use --trainer\.strategy ddp"):
        check_precision("nf4", FSDP2Strategy())
    check_precision(None, FSDP2Strategy())


def test_quantised_modules_cannot_be_trained_whole(folder: str) -> None:
    for name in ("q_proj", "mlp"):
        module = SFTModule(pretrained=folder, quantization="nf4", lora=LoRA(r=2, modules_to_save=[name]))
        with pytest.raises(UserError, match=f"the weights of {name} are quantised"):
            module.configure_model()


def test_weights_that_are_quantised_already_are_refused(folder: str) -> None:
    config = Path(folder) / "config.json"
    held = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": held}))
    for asked in ("int8", None):
        with pytest.raises(UserError, match=f"quantised already .bitsandbytes.*--model.quantization {asked or 'nf4'} "):
            SFTModule(pretrained=folder, quantization=asked, lora=LoRA(r=2))


def test_transposed_layers_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=1, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="is a Conv1D"):
        load_pretrained(str(tmp_path / "gpt2"), "float32", quantization="nf4")


def test_a_model_that_was_given_may_be_quantised_as_this_package_does(folder: str) -> None:
    ours = load_pretrained(folder, "float32", quantization="nf4")
    module = SFTModule(pretrained=ours, lora=LoRA(r=2))
    assert module.quantization == "nf4" and module.base_weights.files == folder
    with pytest.raises(UserError, match="train adapters over it"):
        SFTModule(pretrained=ours)
    with pytest.raises(UserError, match="is loaded already"):
        SFTModule(pretrained=load_pretrained(folder, "float32"), quantization="nf4", lora=LoRA(r=2))
    other = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    given = AutoModelForCausalLM.from_pretrained(folder, quantization_config=other)
    with pytest.raises(UserError, match="quantised in another way"):
        SFTModule(pretrained=given, lora=LoRA(r=2))


def test_checkpointing_gives_the_same_gradients(folder: str, kind: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(folder, kind)
        if checkpointing:
            recompute_activations(model)
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_validation_leaves_the_weights_as_training_reads_them(folder: str) -> None:
    """Some CPUs pack 4-bit weights anew for products without a gradient."""
    model = adapted(folder, "nf4").train()
    before = float(model(input_ids=IDS, labels=IDS).loss.detach())
    with evaluating(model), torch.no_grad():
        model(input_ids=IDS)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert float(loss.detach()) == before
    assert not any(layer.support_avx512bf16_for_cpu for _, layer in quantized_layers(model))
    assert all(w.grad is not None for w in model.parameters() if w.requires_grad)
