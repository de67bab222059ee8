"""A folder of adapters as the model of a run: the base is loaded, the adapters train on and are exported again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import adam, bare_trainer, constant, save_tiny_llama, split_data, sums, weights, write_rows

from deft_lightning import SFTModule
from deft_lightning.errors import UserError
from deft_lightning.models import LoRA


def run(folder: Path, pretrained: str, steps: int = 2, merge: bool = False, **options: Any) -> tuple[Any, str]:
    torch.manual_seed(0)
    optimizer = options.pop("optimizer", lambda p: adam(p, lr=1e-2))
    module = SFTModule(pretrained=pretrained, optimizer=optimizer, scheduler=constant, **options)
    data = split_data(write_rows(folder / "rows.jsonl", sums(16)), cache_dir=str(folder / "cache"))
    trainer = bare_trainer(folder, max_epochs=-1, max_steps=steps)
    trainer.fit(module, data)
    output = str(folder / f"out{len(list(folder.iterdir()))}")
    trainer.export(module, output=output, merge=merge, datamodule=data)
    return module, output


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(60, 90)[None]).logits


@pytest.mark.parametrize("tokens", [None, ["<tool>"]], ids=["plain", "added tokens"])
@pytest.mark.parametrize("tied", [True, False])
def test_adapters_go_on_where_they_were_and_are_exported_again(tokens: Any, tied: bool, tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", 0.3, tie_word_embeddings=tied)
    first, folder = run(tmp_path, base, lora=LoRA(r=3, target_modules=["q_proj", "v_proj"]), add_tokens=tokens)
    assert not (Path(folder) / "config.json").exists()
    still, _ = run(tmp_path, folder, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    assert torch.equal(logits(still.model), logits(first.model)), "begun where the adapters were"
    assert weights(still.model).keys() == weights(first.model).keys()
    second, again = run(tmp_path, folder)
    assert second.lora == LoRA(3, 6, 0.0, ["q_proj", "v_proj"], embeddings=tokens is not None)
    assert not torch.equal(logits(second.model), logits(first.model))
    assert json.loads((Path(again) / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(again)
    if tokens:
        with safe_open(Path(again) / "adapter_model.safetensors", framework="pt") as file:
            assert sum("embed_tokens" in key for key in file.keys()) == 1
        plain.resize_token_embeddings(len(tokenizer))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, again)), logits(second.model))
    merged, whole_folder = run(tmp_path, again, merge=True)
    loaded = AutoModelForCausalLM.from_pretrained(whole_folder)
    torch.testing.assert_close(logits(loaded), logits(merged.model), rtol=1e-4, atol=1e-4)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    base = save_tiny_llama(tmp_path / "base", 0.3)
    return run(tmp_path, base, 1, lora=LoRA(r=3, target_modules=["q_proj", "v_proj"]))[1]


@pytest.mark.parametrize(
    ("lora", "name"),
    [
        (LoRA(r=4), "r 4"),
        (LoRA(r=3, alpha=1.0), "alpha 1.0"),
        (LoRA(r=3, target_modules=["q_proj"]), "target_modules"),
        (LoRA(r=3, embeddings=True), "embeddings True"),
    ],
    ids=str,
)
def test_options_that_contradict_the_adapters_are_one_line(lora: LoRA, name: str, folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"--model\.lora\.{name}.*leave --model\.lora out") as caught:
        SFTModule(pretrained=folder, lora=lora)
    assert "\n" not in str(caught.value)
    agreeing = SFTModule(pretrained=folder, lora=LoRA(r=3, alpha=6.0, dropout=0.5))
    assert agreeing.lora == LoRA(3, 6, 0.5, ["q_proj", "v_proj"])


def test_a_base_that_is_not_there_is_one_line(folder: str, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(
        UserError, match=r"holds adapters of .*base.*cannot be loaded: .*no such model folder"
    ) as caught:
        SFTModule(pretrained=folder)
    assert "\n" not in str(caught.value)


def test_adapters_of_another_model_and_broken_ones_are_one_line(folder: str, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "base")
    save_tiny_llama(tmp_path / "base", 0.3, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"do not fit .*base, for example .*layers\.1\.") as caught:
        run(tmp_path, folder)
    assert "\n" not in str(caught.value)
    (Path(folder) / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="adapters cannot be read"):
        SFTModule(pretrained=folder)


@pytest.mark.parametrize(("key", "value"), [("use_dora", True), ("r", 8), ("rank_pattern", {"q_proj": 2})])
def test_adapters_that_are_no_plain_lora_are_one_line(key: str, value: Any, folder: str) -> None:
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match="not plain LoRA with one rank") as caught:
        SFTModule(pretrained=folder)
    assert "\n" not in str(caught.value)


def test_tokens_are_not_added_to_adapters(folder: str) -> None:
    with pytest.raises(UserError, match=r"--model\.add_tokens.*holds adapters"):
        SFTModule(pretrained=folder, add_tokens=["<tool>"])
