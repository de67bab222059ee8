"""Model folders that are not what their config says: weights missing, renamed, damaged, too many for the memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LLAMA, architecture, build, checkpoint_of, one_line
from torch import Tensor

from deft_lightning.data.encoding.tokenizer import build_tokenizer, load_tokenizer
from deft_lightning.errors import UserError
from deft_lightning.models import (
    LoRA,
    add_adapters,
    describe,
    from_architecture,
    load_checkpoint,
    load_pretrained,
    model_from_checkpoint,
    save_hugging_face,
)
from deft_lightning.models import sizes as sizes_module

Weights = dict[str, Tensor]
UNTIED = {**LLAMA, "num_hidden_layers": 2, "tie_word_embeddings": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(UNTIED).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    weights = change(load_file(folder / "model.safetensors"))
    save_file(
        {name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def settings(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(folder: Path, match: str) -> str:
    with pytest.raises(UserError, match=match) as caught:
        load_pretrained(str(folder), "float32")
    one_line(caught, str(folder), "--model.pretrained")
    return str(caught.value)


# --- weights that are not there -------------------------------------------------------------------------------------


def test_a_layer_too_few_is_listed_and_counted(folder: Path) -> None:
    settings(folder, num_hidden_layers=3)
    refused(folder, r"weights are missing from its files \(9\): model\.layers\.2\..* and 6 more")


def test_one_tensor_under_another_name_is_named_with_it(folder: Path) -> None:
    rewrite(folder, lambda w: {k.replace("1.mlp.up_proj", "1.mlp.upward"): v for k, v in w.items()})
    refused(folder, r"missing.*\(1\): model\.layers\.1\.mlp\.up_proj\.weight; the files have .*upward")


def test_a_head_that_config_json_unties_by_mistake(tmp_path: Path) -> None:
    build({**LLAMA, "tie_word_embeddings": True}).save_pretrained(tmp_path)
    load_pretrained(str(tmp_path), "float32")
    settings(tmp_path, tie_word_embeddings=False)
    refused(tmp_path, r"missing.*: lm_head\.weight; .*tie_word_embeddings: true")


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod.", "model.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_read(folder: Path, prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    wanted = load_file(folder / "model.safetensors")
    rewrite(folder, lambda w: {prefix + name: value for name, value in w.items()})
    with caplog.at_level("INFO"):
        found = load_pretrained(str(folder), "float32").state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    if prefix != "model.":  # transformers takes that one off itself
        assert len([r for r in caplog.records if "are read without" in r.getMessage()]) == 1


def test_layers_that_were_compiled_are_read(folder: Path) -> None:
    wanted = load_file(folder / "model.safetensors")
    rewrite(folder, lambda w: {k.replace("layers.0.", "layers.0._orig_mod."): v for k, v in w.items()})
    found = load_pretrained(str(folder), "float32").state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_prefix_that_nobody_knows_is_shown(folder: Path) -> None:
    rewrite(folder, lambda w: {"student." + name: value for name, value in w.items()})
    refused(folder, r"missing.*the files have .*student\.")


def test_adapters_that_are_not_merged_are_named(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    rewrite(
        folder,
        lambda w: {f"{name}.lora_A.weight": torch.ones(1), f"{name}.base.weight": w.pop(f"{name}.weight"), **w},
    )
    refused(folder, "adapters that are not merged")


def test_shapes_that_differ_are_listed(folder: Path) -> None:
    settings(folder, intermediate_size=32)
    refused(
        folder,
        r"weights have another shape \(6\): .*\(24, 16\) in the file and \(32, 16\) by config\.json.* and 3 more",
    )


def test_weights_that_are_left_over_are_one_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(folder, lambda w: {**w, **{f"value_head.{i}": torch.ones(2) for i in range(5)}})
    with caplog.at_level("INFO"):
        load_pretrained(str(folder), "float32")
    (line,) = [r.getMessage() for r in caplog.records if "not used" in r.getMessage()]
    assert "(5): value_head.0" in line and "and 2 more" in line


def test_the_table_of_transformers_is_kept_back(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings(folder, num_hidden_layers=3)
    refused(folder, "missing")
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_shapes_alone_are_built_for_other_ranks(folder: Path) -> None:
    settings(folder, num_hidden_layers=3)  # the rank with the weights refuses
    with torch.device("meta"):
        assert next(load_pretrained(str(folder), "float32").parameters()).is_meta
        settings(folder, num_hidden_layers=10**9)
        refused(folder, "more than any model has")


# --- weights that are damaged ---------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 0x40
    path.write_bytes(content)


def braces(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("model.safetensors", damage) for damage in (cut, header, braces, empty)),
        # A zip file is read from its end: what the other two change is found there or by nobody.
        *(("pytorch_model.bin", damage) for damage in (cut, empty)),
    ],
)
def test_damaged_weights_name_the_file(folder: Path, damage: Callable[[Path], None], name: str) -> None:
    if name == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    damage(folder / name)
    refused(folder, name.replace(".", r"\."))


def test_an_index_that_names_a_missing_part(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    parts = {name: "two.safetensors" if "layers.1" in name else "one.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    refused(folder, r"index\.json names 'two\.safetensors', which is not there")


def test_weights_that_are_no_numbers(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    rewrite(folder, lambda w: {k: torch.full_like(v, torch.nan) if "up_proj" in k else v for k, v in w.items()})
    load_pretrained(str(folder), "float32")
    assert any(
        "weights hold values that are not numbers (2): model.layers.0.mlp.up_proj" in str(w.message) for w in recwarn
    )
    rewrite(folder, lambda w: {name: torch.full_like(value, torch.nan) for name, value in w.items()})
    refused(folder, "all its weights hold values that are not numbers")


# --- sizes ----------------------------------------------------------------------------------------------------------

ABSURD: list[tuple[str, Any]] = [
    ("num_hidden_layers", 10**9), ("num_hidden_layers", 20_000), ("vocab_size", 10**12), ("hidden_size", 0),
    ("hidden_size", -16), ("hidden_size", "16"), ("hidden_size", 10**15), ("num_attention_heads", 0),
    ("num_attention_heads", True), ("num_attention_heads", 3), ("num_hidden_layers", 1.5),
    ("intermediate_size", 10**30),
    ("vocab_size", "all"), ("num_key_value_heads", -1), ("vocab_size", 2**31 - 1),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), ABSURD)
def test_sizes_that_no_model_has(folder: Path, name: str, value: Any) -> None:
    begin = time.process_time()
    if value == 2**31 - 1:
        value, extra = 2**30, {"hidden_size": 16_384}  # what memory does not hold
    else:
        extra = {}
    with pytest.raises(UserError, match=r"--model\.architecture") as caught:
        from_architecture({**LLAMA, **extra, name: value}, None, "float32")
    one_line(caught)
    settings(folder, **extra, **{name: value})
    refused(folder, rf"\b{name}\b|{name.replace('num_', 'number of ').replace('_', ' ')}|memory")
    assert time.process_time() - begin < 5


def test_sizes_inside_of_a_part(folder: Path) -> None:
    settings(folder, text_config={"num_hidden_layers": 10**9})
    refused(folder, r"config\.json: text_config\.num_hidden_layers 1,000,000,000 is more than any model has")


def test_a_mask_beside_the_weights_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes_module, "available_memory", lambda: 1 << 24)
    options = {"model_type": "gpt_neo", "hidden_size": 4, "num_heads": 1, "num_layers": 1, "vocab_size": 8}
    with pytest.raises(UserError, match=r"95\.5 MiB of memory"):
        from_architecture(
            {**options, "attention_types": [[["global"], 1]], "max_position_embeddings": 10_000}, None, "float32"
        )


@pytest.mark.parametrize(("name", "value"), [("num_labels", 10**9), ("num_hidden_layers", 10**9)])
def test_sizes_are_looked_at_before_a_tokenizer_reads_the_config(folder: Path, name: str, value: int) -> None:
    build_tokenizer(["hello"], 0).save_pretrained(folder)
    settings(folder, **{name: value})
    with pytest.raises(UserError, match=rf"config\.json: {name} 1,000,000,000 is more than any model has"):
        load_tokenizer(str(folder))


def test_an_attention_that_a_checkpoint_names_is_no_kernel_of_the_hub() -> None:
    about = describe(build(LLAMA), None, None, [])
    for key in ("attn_implementation", "_attn_implementation"):
        changed = {**about, "config": json.dumps({**json.loads(about["config"]), key: "someone/kernel"})}
        with pytest.raises(UserError, match=rf"the checkpoint's config: {key} someone/kernel is a kernel from the hub"):
            model_from_checkpoint({"deft_lightning": changed, "state_dict": {}})


def test_adapters_of_a_checkpoint_are_on_the_modules_of_its_weights() -> None:
    wrapped = add_adapters(build(LLAMA), LoRA(r=2, target_modules=r".*\.(q|v)_proj"))
    held = {
        "deft_lightning": describe(wrapped, None, LoRA(r=2, target_modules=r".*\.(q|v)_proj"), []),
        "state_dict": {f"model.{name}": value for name, value in wrapped.state_dict().items()},
    }
    found = model_from_checkpoint(held)[0]
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in wrapped.state_dict().items())
    lora = held["deft_lightning"]["lora"]
    lora["target_modules"] = "(.*.*.*.*.*.*.*.*.*.*.*)*x"  # matching it would not end
    assert model_from_checkpoint(held)[0].state_dict().keys() == wrapped.state_dict().keys()
    lora["r"] = 10**9
    with pytest.raises(UserError, match="rank 1000000000 of its adapters, which have 2"):
        model_from_checkpoint(held)


@pytest.mark.parametrize(("name", "value"), [("num_hidden_layers", 10**9), ("hidden_size", 0), ("vocab_size", 2**31)])
def test_sizes_of_a_checkpoints_model(tmp_path: Path, name: str, value: int) -> None:
    path = checkpoint_of(build(LLAMA), None, None, tmp_path / "a.ckpt")
    checkpoint = load_checkpoint(path)
    about = checkpoint["deft_lightning"]
    about["config"] = json.dumps({**json.loads(about["config"]), name: value})
    with pytest.raises(UserError, match=rf"--ckpt_path.*{name}|--ckpt_path.*memory"):
        model_from_checkpoint(checkpoint)


def test_a_model_that_memory_does_not_hold_says_both_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes_module, "available_memory", lambda: 1000)
    says = r"weights need 0\.0 MiB of memory in float32, 0\.0 MiB are available; .*--model\.dtype bfloat16"
    refused(folder, says)
    with pytest.raises(UserError, match=says):
        from_architecture(LLAMA, None, "float32")


def test_available_memory_is_that_of_the_machine_or_less() -> None:
    free = sizes_module.available_memory()
    assert free is None or 2**20 < free < 2**50


def test_looking_at_the_size_leaves_random_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    one = build(LLAMA).state_dict()
    monkeypatch.setattr("deft_lightning.models.load.check_memory", lambda *_: None)
    two = build(LLAMA).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_rope_theta_of_older_configs_says_where_it_went() -> None:
    with pytest.raises(UserError, match=r"moved into.* --model\.architecture\.rope_parameters\.rope_theta 1000000 "):
        from_architecture({**LLAMA, "rope_theta": 1_000_000}, None, "float32")
    model = from_architecture({**LLAMA, "rope_parameters": {"rope_theta": 1e6}}, None, "float32")
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}


def test_rope_theta_of_a_kind_with_frequencies_by_attention_names_the_one_it_was() -> None:
    options = architecture("gemma3_text")
    with pytest.raises(UserError, match=r"rope_parameters\.full_attention\.rope_theta 500000 "):
        from_architecture({**options, "rope_theta": 500_000}, None, "float32")
    asked = {"full_attention": {"rope_theta": 5e5}}
    found = from_architecture({**options, "rope_parameters": asked}, None, "float32").config.rope_parameters
    assert found["full_attention"]["rope_theta"] == 5e5 and found["sliding_attention"]["rope_theta"] == 1e4


# --- generation settings that cannot be saved -----------------------------------------------------------------------

SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0.9, "top_p": 0.6, "do_sample": False}, {"temperature": 0.9, "top_p": 0.6, "do_sample": True}),
    ({"temperature": 0.6}, {"temperature": 0.6, "do_sample": True}),
    ({"top_k": 20}, {"top_k": 20, "do_sample": True}),
    ({"temperature": 0.0}, {"do_sample": None}),
    ({"temperature": 0.0, "top_p": 0.5}, {"temperature": None, "top_p": None}),
    ({"early_stopping": True}, {"early_stopping": None}),
    ({"num_beams": 1, "length_penalty": 0.5, "min_p": 0.1}, {"length_penalty": None, "min_p": 0.1, "do_sample": True}),
    ({"output_scores": True}, {"output_scores": None}),
    ({"max_new_tokens": 7, "eos_token_id": [2, 4]}, {"max_new_tokens": 7, "eos_token_id": [2, 4]}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("given", "wanted"), SETTINGS)
@pytest.mark.parametrize("through", ["folder", "checkpoint"])
def test_generation_settings_of_real_models_are_exported(
    tmp_path: Path, given: dict[str, Any], wanted: dict[str, Any], through: str, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import GenerationConfig

    build(LLAMA).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(given))
    model = load_pretrained(str(tmp_path / "base"), "float32")
    if through == "checkpoint":
        model, _, _ = model_from_checkpoint(load_checkpoint(checkpoint_of(model, None, None, tmp_path / "a.ckpt")))
    with caplog.at_level("INFO"):
        folder = save_hugging_face(model, None, [], tmp_path / "out")
    found = GenerationConfig.from_pretrained(folder)
    found.validate(strict=True)
    for name, value in wanted.items():
        assert getattr(found, name) == value or (not value and not getattr(found, name)), (name, found)
    lines = [r.getMessage() for r in caplog.records if "generation settings" in r.getMessage()]
    assert len(lines) == (0 if "max_new_tokens" in given else 1)
    load_pretrained(str(folder), "float32")


@pytest.mark.parametrize("given", [{"temperature": 0.7, "top_k": 5}, {"num_beams": 3}])
def test_generation_settings_in_config_json_are_exported(tmp_path: Path, given: dict[str, Any]) -> None:
    build(LLAMA).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").unlink()
    settings(tmp_path / "base", **given)
    model = load_pretrained(str(tmp_path / "base"), "float32")
    model.config.repetition_penalty = 1.3  # as code that still writes them there does
    folder = save_hugging_face(model, None, [], tmp_path / "out")
    found = json.loads((folder / "generation_config.json").read_text())
    assert given.items() <= found.items() and found["repetition_penalty"] == 1.3


# --- an export that cannot be written -------------------------------------------------------------------------------


def test_an_output_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match=r"file/out: cannot be written: .*--output.*--ckpt_path last") as caught:
        save_hugging_face(build(LLAMA), None, [], tmp_path / "file" / "out")
    one_line(caught)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("kind", ["file", "full", "link"])
def test_a_target_that_is_there_stays(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "full":
        target.mkdir()
        (target / "mine").touch()
    elif kind == "file":
        target.touch()
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists already"):
        save_hugging_face(build(LLAMA), None, [], target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_names_the_folder_and_leaves_nothing(tmp_path: Path) -> None:
    import resource

    model, before = build(LLAMA), resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(UserError, match=r"out: cannot be written: .*--output.*--ckpt_path last") as caught:
            save_hugging_face(model, None, [], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    one_line(caught)
    assert not list(tmp_path.iterdir()) and model.config.use_cache is False
    assert save_hugging_face(model, None, [], tmp_path / "out").is_dir()
