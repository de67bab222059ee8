"""Runs with adapters over a quantised base: checkpoints, resume, export, two ranks, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from start_ranks import run_ranks
from test_adapter_checkpoints import another, fit, module_of
from test_ranks import prepare
from transformers import AutoModelForCausalLM
from worlds import ROOT, bare_trainer, same_state, save_tiny_llama, split_data, sums, weights, write_rows

from deft_lightning import SFTModule, Trainer
from deft_lightning.errors import UserError
from deft_lightning.models import LoRA, load_checkpoint
from deft_lightning.models.contents import problem

pytest.importorskip("bitsandbytes", reason="a quantised base needs the packages of deft-lightning[qlora]")
pytestmark = pytest.mark.slow

LORA = LoRA(r=2, dropout=0.1)


@pytest.fixture(params=["nf4", "int8"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def base(tmp_path: Path) -> str:
    return save_tiny_llama(tmp_path / "base", 0.3, hidden_size=64)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"head": "dense"}, {"add_tokens": ["<tool>"]}, {"dtype": "bfloat16"},
     {"lora": LoRA(r=2, target_modules=["q_proj", "lm_head"])}],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_holds_the_adapters_and_resumes_to_the_bit(
    options: dict[str, Any], kind: Any, base: str, tmp_path: Path
) -> None:
    options = {"lora": LORA, "quantization": kind, **options}
    whole, _ = fit(tmp_path / "whole", module_of(base, **options), 4)
    module, path = fit(tmp_path / "cut", module_of(base, **options), 2)
    held = load_checkpoint(path)
    assert problem(held) == ""
    trained = {f"model.{name}" for name in weights(module.model)}
    beside = {name for name in held["state_dict"].keys() - trained if "original_module" not in name}
    tied = {name for name in beside if "modules_to_save" in name}
    assert beside == tied and trained <= held["state_dict"].keys()
    again, _ = fit(tmp_path / "cut", module_of(base, **options), 4, path)
    assert same_state(again, whole)
    assert not torch.equal(*(weights(one.model)[min(weights(one.model))] for one in (whole, module)))


def test_it_is_loaded_exported_and_trained_further(kind: Any, base: str, tmp_path: Path) -> None:
    module, path = fit(tmp_path, module_of(base, lora=LORA, quantization=kind), 2)
    back = SFTModule.load_from_checkpoint(path)
    assert back.quantization == kind and same_state(back.model, module.model)
    assert Path(str(back.base_weights.files)) == Path(base)
    trainer = Trainer(logger=False, default_root_dir=str(tmp_path))
    trainer.export(ckpt_path=path, output=str(tmp_path / "whole"))
    settings = json.loads((tmp_path / "whole/config.json").read_text())
    assert settings["dtype"] == "float32" and "quantization_config" not in settings
    card = (tmp_path / "whole/README.md").read_text()
    assert f"| base quantised to | `{kind}` |" in card and "quantised for training and dequantised" in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    ids = torch.arange(10, 60)[None]
    module.model.train()
    for layer in module.model.modules():  # dropout alone
        layer.training = layer.training and not isinstance(layer, torch.nn.Dropout)
    with torch.no_grad():
        ours, theirs = (one(input_ids=ids).logits.double().log_softmax(-1) for one in (module.model, loaded))
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) < 1e-6
    trainer.export(ckpt_path=path, output=str(tmp_path / "adapters"), merge="none")
    assert (tmp_path / "adapters/adapter_model.safetensors").is_file()
    further = module_of(str(tmp_path / "adapters"), quantization=kind)
    further.configure_model()
    mine = weights(module.model)
    assert all(torch.equal(weight, mine[name]) for name, weight in weights(further.model).items())


def test_another_base_or_another_kind_is_refused(kind: Any, base: str, tmp_path: Path) -> None:
    _, path = fit(tmp_path, module_of(base, lora=LORA, quantization=kind), 2)
    other = "int8" if kind == "nf4" else "nf4"
    for asked in (None, other):
        with pytest.raises(UserError, match=f"is quantised to {kind}; set --model.quantization {kind}$"):
            fit(tmp_path, module_of(base, lora=LORA, quantization=asked), 4, path)
    another(base)
    with pytest.raises(UserError, match="its weights are not those that the adapters of the checkpoint were trained"):
        fit(tmp_path, module_of(base, lora=LORA, quantization=kind), 4, path)
    with pytest.raises(UserError, match="its weights are not those that the adapters of the checkpoint were trained"):
        SFTModule.load_from_checkpoint(path)


def test_a_base_that_is_rounded_from_another_dtype_is_told(
    base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, path = fit(tmp_path, module_of(base, lora=LORA, quantization="nf4"), 2)
    with caplog.at_level("INFO"):
        fit(tmp_path, module_of(base, lora=LORA, quantization="nf4", dtype="bfloat16"), 3, path)
    wanted = "is quantised to nf4 from bfloat16 on cpu, and was to nf4 from float32 on cpu in training"
    assert any(wanted in line for line in caplog.messages)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision_reaches_the_products(precision: str, kind: Any, base: str, tmp_path: Path) -> None:
    module, _ = fit(tmp_path, module_of(base, lora=LORA, quantization=kind), 1, precision=precision)
    dtypes = {layer.compute_dtype for layer in module.model.modules() if hasattr(layer, "compute_dtype")}
    assert dtypes == ({torch.bfloat16} if kind == "nf4" else set())


def test_float16_weights_are_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not with --trainer\.precision 16-true"):
        fit(tmp_path, module_of(base, lora=LORA, quantization="nf4"), 1, precision="16-true")


def test_the_command_line_with_the_config_of_the_package(base: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", sums(24))
    words = ["fit", "--config", "deft:model/qlora", "--model.pretrained", base, "--data.source", source,
             "--data.batch_size", "4", "--trainer.max_steps", "2", "--trainer.default_root_dir", str(tmp_path),
             "--trainer.accelerator", "cpu"]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "deft_lightning", *words], capture_output=True, text=True, cwd=ROOT)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert re.search(r"base: [\d,]+ parameters in nf4 \([\d.]+ MB\), [\d,]+ in bfloat16 \([\d.]+ MB\)", text)
    assert "merged into the base as dequantised from nf4" in text
    total = re.search(r"model: PeftModelForCausalLM, ([\d,]+) parameters", text)
    plain = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(base).parameters())
    adapters = 2 * 16 * (4 * (64 + 64) + 3 * (64 + 24))
    assert total is not None and int(total[1].replace(",", "")) == plain + adapters
    assert "MatMul8bitLt" not in text and "kernels-community" not in text


def test_prompts_are_answered_and_rows_are_read_over_it(kind: Any, base: str, tmp_path: Path) -> None:
    module = module_of(base, lora=LORA, quantization=kind)
    data = split_data(write_rows(tmp_path / "rows.jsonl", sums(24)))
    trainer = bare_trainer(tmp_path)
    assert 0.0 <= trainer.test(module, data, verbose=False)[0]["test/exact_match"] <= 1.0
    assert trainer.validate(module, data, verbose=False)[0]["val/nll"] > 0


def test_two_ranks_train_as_one_and_resume_to_the_bit(tmp_path: Path) -> None:
    prepare(tmp_path)
    save_tiny_llama(tmp_path / "pretrained", 0.3, hidden_size=64, num_hidden_layers=1)
    save_tiny_llama(tmp_path / "elsewhere", 0.3, hidden_size=64, num_hidden_layers=1, seed=1)
    run_ranks(Path(__file__).with_name("adapters_worker.py"), tmp_path, "ddp", "nf4")
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)["file"]
        assert found["held"] == found["trained"] and found["difference"] == 0.0
        assert "its weights are not those" in found["refused"]
