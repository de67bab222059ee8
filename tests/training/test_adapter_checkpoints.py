"""Checkpoints of adapters: they hold what trains, and every way to use one finds the base again, or refuses another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig
from worlds import (
    adam,
    bare_trainer,
    byte_tokenizer,
    constant,
    same_state,
    save_tiny_llama,
    split_data,
    sums,
    tiny_llama,
    weights,
    write_rows,
)

from deft_lightning import SFTModule, Trainer
from deft_lightning.callbacks import Checkpoint
from deft_lightning.errors import UserError
from deft_lightning.models import LoRA, add_adapters, load_checkpoint, model_from_checkpoint

pytestmark = pytest.mark.slow

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"lora": LoRA(r=2, dropout=0.1)},
    "bfloat16": {"lora": LoRA(r=2), "dtype": "bfloat16"},
    "head": {"lora": LoRA(r=2, target_modules=["q_proj", "lm_head"])},
    "embeddings": {"lora": LoRA(r=2, embeddings=True)},
    "tokens": {"lora": LoRA(r=2), "add_tokens": ["<tool>"]},
    "rslora": {"lora": LoRA(r=4, use_rslora=True, init_lora_weights="gaussian")},
    "dora": {"lora": LoRA(r=2, use_dora=True)},
    "norms": {"lora": LoRA(r=2, modules_to_save=["norm"])},
}
CHANGING = ["pissa", "pissa_niter_2", "olora"]


def module_of(base: str, **options: Any) -> SFTModule:
    return SFTModule(pretrained=base, optimizer=lambda p: adam(p, lr=1e-2), scheduler=constant, **options)


def fit(
    folder: Path, module: SFTModule, steps: int, resume: str | None = None, **options: Any
) -> tuple[SFTModule, str]:
    """Train up to a step, checkpointing each; return the module and its last checkpoint."""
    torch.manual_seed(0)
    keep = Checkpoint(dirpath=str(folder / f"{steps}"), every_n_train_steps=1)
    data = split_data(write_rows(folder / "rows.jsonl", sums(24)), cache_dir=str(folder / "cache"))
    trainer = bare_trainer(
        folder, max_epochs=-1, max_steps=steps, enable_checkpointing=True, callbacks=[keep], **options
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
    return module, str(Path(keep.last_model_path).resolve())


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return save_tiny_llama(tmp_path / "base", 0.3, tie_word_embeddings=request.param)


def test_it_holds_what_trains_and_resumes_to_the_bit(kind: dict[str, Any], base: str, tmp_path: Path) -> None:
    whole, _ = fit(tmp_path / "whole", module_of(base, **kind), 4)
    module, path = fit(tmp_path / "cut", module_of(base, **kind), 2)
    held = load_checkpoint(path)
    trained = {f"model.{name}" for name in weights(module.model)}
    beside = held["state_dict"].keys() - trained
    # A tied weight has two names; of an embedding that is trained whole, the one before is kept too.
    tied = {name for name in beside if "modules_to_save" in name}
    assert (
        beside - tied == {name for name in beside if ".original_module." in name}
        and trained <= held["state_dict"].keys()
    )
    lora = kind["lora"]
    assert bool(beside) == bool(kind.get("add_tokens") or lora.embeddings or lora.modules_to_save)
    assert held["deft_lightning"]["base"]["name"] == str(Path(base).resolve())
    again, _ = fit(tmp_path / "cut", module_of(base, **kind), 4, path)
    assert same_state(again, whole)


def test_every_way_to_use_it_finds_the_base(
    kind: dict[str, Any], base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, path = fit(tmp_path, module_of(base, **kind), 2)
    monkeypatch.chdir(tmp_path)
    restored = SFTModule.load_from_checkpoint(path, optimizer=lambda p: adam(p, lr=1e-2), scheduler=constant)
    assert same_state(restored.model, module.model)
    direct, merged = bare_trainer(tmp_path), tmp_path / "merged"
    direct.export(module, output=str(tmp_path / "direct"), merge=True)
    Trainer(logger=False, default_root_dir=str(tmp_path)).export(ckpt_path=path, output=str(merged))
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "direct", merged))
    assert same_state(one, other)
    adapters = tmp_path / "adapters"
    Trainer(logger=False, default_root_dir=str(tmp_path)).export(ckpt_path=path, output=str(adapters), merge=False)
    assert json.loads((adapters / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        Path(base).resolve()
    )
    if kind.get("add_tokens"):
        return  # of which a module that is restored knows nothing
    # Its own checkpoints leave out the same.
    _, later = fit(tmp_path / "later", restored, 3, path)
    assert load_checkpoint(later)["state_dict"].keys() == load_checkpoint(path)["state_dict"].keys()


@pytest.fixture
def trained(tmp_path: Path) -> tuple[str, str]:
    """A base and a checkpoint of plain adapters on it."""
    base = save_tiny_llama(tmp_path / "base", 0.3)
    return base, fit(tmp_path, module_of(base, **KINDS["plain"]), 2)[1]


def another(base: str) -> None:
    """Change one row of one weight of a base."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] += 0.01
    model.save_pretrained(base)


REFUSED = (
    r"its weights are not those that the adapters of the checkpoint were trained on, of .*base; .*--model.pretrained"
)


def use(name: str, base: str, path: str, tmp_path: Path) -> None:
    module, data = module_of(base, **KINDS["plain"]), split_data(str(tmp_path / "rows.jsonl"))
    trainer = bare_trainer(tmp_path, max_steps=3, max_epochs=-1)
    if name == "fit":
        trainer.fit(module, data, ckpt_path=path, weights_only=True)
    elif name == "validate":
        trainer.validate(module, data, ckpt_path=path, weights_only=True, verbose=False)
    elif name == "probe":
        trainer.probe(module, data, ckpt_path=path, output=str(tmp_path / "probe"))  # type: ignore[attr-defined]
    elif name == "load_from_checkpoint":
        SFTModule.load_from_checkpoint(path)
    else:
        trainer.export(ckpt_path=path, output=str(tmp_path / "out"))  # type: ignore[attr-defined]


USES = ["fit", "validate", "probe", "load_from_checkpoint", "export"]


@pytest.mark.parametrize("name", USES)
def test_another_base_is_refused_in_one_line(name: str, trained: tuple[str, str], tmp_path: Path) -> None:
    use(name, *trained, tmp_path)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    another(trained[0])
    with pytest.raises(UserError, match=REFUSED) as caught:
        use(name, *trained, tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_base_that_has_moved_is_named_by_an_option(trained: tuple[str, str], tmp_path: Path) -> None:
    base, path = trained
    before = SFTModule.load_from_checkpoint(path)
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(UserError, match=r"holds adapters of '.*base', which cannot be loaded: .*--model\.pretrained"):
        SFTModule.load_from_checkpoint(path)
    assert same_state(SFTModule.load_from_checkpoint(path, pretrained=str(tmp_path / "moved")).model, before.model)
    bare_trainer(tmp_path).export(module_of(str(tmp_path / "moved")), ckpt_path=path, output=str(tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_base_in_another_dtype_is_known_by_what_both_round_to(trained: tuple[str, str], tmp_path: Path) -> None:
    base, path = trained
    module, _ = fit(tmp_path, module_of(base, **KINDS["plain"], dtype="bfloat16"), 3, path)
    assert module.trainer.global_step == 3
    another(base)
    with pytest.raises(UserError, match=REFUSED):
        fit(tmp_path, module_of(base, **KINDS["plain"], dtype="bfloat16"), 4, path)


def test_a_run_in_low_precision_resumes_to_the_bit(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", 0.3)
    whole, _ = fit(tmp_path / "whole", module_of(base, lora=LoRA(r=2)), 4, precision="bf16-true")
    _, path = fit(tmp_path / "cut", module_of(base, lora=LoRA(r=2)), 2, precision="bf16-true")
    again, _ = fit(tmp_path / "cut", module_of(base, lora=LoRA(r=2)), 4, path, precision="bf16-true")
    assert same_state(again, whole)


def test_a_whole_checkpoint_of_an_earlier_version_still_loads(trained: tuple[str, str], tmp_path: Path) -> None:
    base, path = trained
    held = load_checkpoint(path)
    model = model_from_checkpoint(held)[0]
    everything = {f"model.{name}": value for name, value in model.state_dict().items()}
    about = {name: value for name, value in held["deft_lightning"].items() if name != "base"}
    old = tmp_path / "old.ckpt"
    torch.save({**held, "state_dict": everything, "deft_lightning": about}, old)
    one, _ = fit(tmp_path / "a", module_of(base, **KINDS["plain"]), 4, str(old))
    other, _ = fit(tmp_path / "b", module_of(base, **KINDS["plain"]), 4, path)
    assert same_state(one, other)
    another(base)  # which it does not need
    assert same_state(SFTModule.load_from_checkpoint(old).model, model)


WHOLE: dict[str, Callable[[str], SFTModule]] = {
    "no adapters": module_of,
    "random weights": lambda base: SFTModule(
        architecture={"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                      "num_attention_heads": 2, "max_position_embeddings": 128},
        optimizer=adam, scheduler=constant, lora=LoRA(r=2),
    ),
    "given": lambda base: module_of(AutoModelForCausalLM.from_pretrained(base), lora=LoRA(r=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_without_files_to_read_the_rest_from_it_holds_everything(name: str, tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", 0.3)
    module, path = fit(tmp_path, WHOLE[name](base), 1)
    held = load_checkpoint(path)
    assert "base" not in held["deft_lightning"]
    assert held["state_dict"].keys() == module.state_dict().keys()


def test_adapters_that_are_missing_or_of_another_shape_are_refused(trained: tuple[str, str], tmp_path: Path) -> None:
    held = load_checkpoint(trained[1])
    name = next(name for name in held["state_dict"] if "lora_B" in name)
    for changed in ({}, {name: torch.zeros(3, 2)}):
        state = {**{k: v for k, v in held["state_dict"].items() if k != name}, **changed}
        with pytest.raises(UserError, match=r"checkpoint is from a different model, for example .*lora_B"):
            model_from_checkpoint({**held, "state_dict": state})


def test_a_base_entry_that_is_none_is_malformed(trained: tuple[str, str], tmp_path: Path) -> None:
    held = load_checkpoint(trained[1])
    for odd in ("x", {"name": 3, "weights": {}}, {"name": "x"}, {"name": "x", "weights": {"int8": "0"}}):
        path = tmp_path / "odd.ckpt"
        torch.save({**held, "deft_lightning": {**held["deft_lightning"], "base": odd}}, path)
        with pytest.raises(UserError, match=r"malformed: 'deft_lightning\.base'"):
            load_checkpoint(path)


def test_the_default_rate_of_whole_models_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save_tiny_llama(tmp_path / "base", 0.3)
    line = "adapters train with the learning rate 5e-05, which suits full fine-tuning; 2e-4 is usual for adapters"
    with caplog.at_level("INFO"):
        fit(tmp_path, module_of(base, lora=LoRA(r=2)), 1)
        assert "learning rate" not in caplog.text
        fit(tmp_path, SFTModule(pretrained=base, scheduler=constant), 1)
        assert "learning rate" not in caplog.text
        fit(tmp_path, SFTModule(pretrained=base, scheduler=constant, lora=LoRA(r=2)), 1)
    assert f"{line}: --model.optimizer.lr 2e-4" in caplog.text


@pytest.mark.parametrize("init", CHANGING)
def test_adapters_that_change_the_base_are_kept_with_it(init: str, tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", 0.3)
    kind = {"lora": LoRA(r=2, init_lora_weights=init)}
    whole, last = fit(tmp_path / "whole", module_of(base, **kind), 4)
    module, path = fit(tmp_path / "cut", module_of(base, **kind), 2)
    assert load_checkpoint(path)["state_dict"].keys() == module.state_dict().keys()
    again, _ = fit(tmp_path / "cut", module_of(base, **kind), 4, path)
    assert same_state(again, whole)
    assert same_state(SFTModule.load_from_checkpoint(last).model, whole.model)
    trainer = bare_trainer(tmp_path)
    for source in ({"model": whole}, {"ckpt_path": last}):
        with pytest.raises(UserError, match=r"do not fit the original base: --merge float32"):
            trainer.export(**source, output=str(tmp_path / "adapters"), merge="none")
    trainer.export(ckpt_path=last, output=str(tmp_path / "merged"))
    ids = torch.arange(10, 60)[None]
    with torch.no_grad():
        one, other = (
            model.eval()(input_ids=ids).logits
            for model in (whole.model, AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
        )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"initialisation of the adapters.*init_lora_weights"):
        fit(tmp_path / "anchored", module_of(base, **kind, forgetting=True), 1)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"init_lora_weights": "eva"}, r"--model\.lora\.init_lora_weights eva: use true"),
        ({"modules_to_save": ["nrom"]}, r"--model\.lora\.modules_to_save: nothing in the model is named nrom"),
        ({"target_parameters": ["experts.x"]}, r"--model\.lora\.target_parameters: nothing .* is named experts\.x"),
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_one_line(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted) as caught:
        add_adapters(tiny_llama(0.3)[0], LoRA(r=2, **options))
    assert "\n" not in str(caught.value)


def test_a_resume_with_other_options_names_the_option(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", 0.3)
    _, path = fit(tmp_path, module_of(base, lora=LoRA(r=2)), 1)
    for name, value in {"use_rslora": True, "use_dora": True, "modules_to_save": ["norm"]}.items():
        with pytest.raises(UserError, match=rf"--model\.lora\.{name} .* cannot be resumed with another one"):
            fit(tmp_path, module_of(base, lora=LoRA(r=2, **{name: value})), 2, path)


def test_experts_are_adapted_merged_and_resumed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    base = str(tmp_path / "base")
    for part in (AutoModelForCausalLM.from_config(config), tokenizer):
        part.save_pretrained(base)
    kind = {"lora": LoRA(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])}
    whole, last = fit(tmp_path / "whole", module_of(base, **kind), 3)
    names = [name for name, weight in weights(whole.model).items() if "experts" in name and weight.any()]
    assert any("lora_B" in name for name in names)
    _, path = fit(tmp_path / "cut", module_of(base, **kind), 2)
    assert same_state(fit(tmp_path / "cut", module_of(base, **kind), 3, path)[0], whole)
    assert same_state(SFTModule.load_from_checkpoint(last).model, whole.model)
    bare_trainer(tmp_path).export(ckpt_path=last, output=str(tmp_path / "merged"))
    ids = torch.arange(10, 60)[None]
    with torch.no_grad():
        one, other = (
            model.eval()(input_ids=ids).logits
            for model in (whole.model, AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
        )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
