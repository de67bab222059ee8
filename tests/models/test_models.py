"""Models: built, loaded, read at the head, adapted and exported, against what transformers and peft do themselves."""

from __future__ import annotations

import copy
import json
import pickle
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    ARCHITECTURES,
    LLAMA,
    TINY,
    VOCAB,
    architecture,
    assert_same_gradients,
    build,
    checkpoint_of,
    deft_by_hand,
    gradients,
    logits_of,
    one_line,
    prepare,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from deft_lightning.errors import UserError
from deft_lightning.models import (
    LoRA,
    add_adapters,
    check_fits,
    check_head,
    check_pretrained,
    find_head,
    from_architecture,
    load_checkpoint,
    load_pretrained,
    model_from_checkpoint,
    save_hugging_face,
)
from deft_lightning.models.load import keep_rotary_fp32, recompute_activations
from deft_lightning.objectives import DEFT

# --- from_architecture ----------------------------------------------------------------------------------------------


def test_an_unknown_model_type_is_one_line_with_close_matches() -> None:
    with pytest.raises(UserError) as caught:
        from_architecture({"model_type": "lama"}, None, "float32")
    one_line(caught, "--model.architecture.model_type", "'lama'", "Did you mean", "llama")


def test_a_model_type_that_is_no_causal_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"--model\.architecture\.model_type") as caught:
        from_architecture({"model_type": "vit"}, None, "float32")
    one_line(caught)


def test_an_unknown_option_is_one_line_with_close_matches() -> None:
    with pytest.raises(UserError) as caught:
        from_architecture({**LLAMA, "hiden_size": 32}, None, "float32")
    one_line(caught, "--model.architecture.hiden_size", "llama has no such option", "hidden_size")


def test_options_that_cannot_be_built_together_are_one_line() -> None:
    with pytest.raises(UserError, match=r"--model\.architecture") as caught:
        from_architecture({**LLAMA, "num_attention_heads": 3}, None, "float32")
    one_line(caught)


def test_an_option_of_the_wrong_type_is_one_line() -> None:
    with pytest.raises(UserError, match=r"--model\.architecture") as caught:
        from_architecture({**LLAMA, "hidden_size": "many"}, None, "float32")
    one_line(caught)


def test_llama_is_the_default_and_every_option_takes_effect() -> None:
    model = build({**TINY, "num_hidden_layers": 2, "tie_word_embeddings": True})
    assert model.config.model_type == "llama" and len(model.model.layers) == 2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tuple(model.lm_head.weight.shape) == (VOCAB, 16)


def test_gpt2_takes_its_own_option_names_and_the_common_ones() -> None:
    own = build({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": VOCAB})
    common = build(architecture("gpt2"))
    assert own.transformer.wte.weight.shape == common.transformer.wte.weight.shape == (VOCAB, 16)
    assert (own.config.n_positions, common.config.n_positions) == (32, 64)


def test_vocabulary_and_special_ids_follow_the_tokenizer(tokenizer: Any) -> None:
    given = {k: v for k, v in LLAMA.items() if k not in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    model = from_architecture(given, tokenizer, "float32")
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.bos_token_id is None, "the tokenizer has none"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused_and_a_larger_one_kept(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"--model\.architecture\.vocab_size 100 .* 262"):
        from_architecture({**LLAMA, "vocab_size": 100}, tokenizer, "float32")
    model = from_architecture({**LLAMA, "vocab_size": 512}, tokenizer, "float32")
    assert model.get_input_embeddings().weight.shape[0] == 512


def test_the_dtype_is_that_of_the_weights() -> None:
    assert {p.dtype for p in from_architecture(LLAMA, None, "bfloat16").parameters()} == {torch.bfloat16}
    assert {p.dtype for p in from_architecture(LLAMA, None, "float32").parameters()} == {torch.float32}


def test_the_attention_implementation_is_the_one_asked_for() -> None:
    assert from_architecture(LLAMA, None, "float32", "eager").config._attn_implementation == "eager"
    assert from_architecture(LLAMA, None, "float32", "sdpa").config._attn_implementation == "sdpa"


def test_an_unknown_attention_implementation_is_one_line() -> None:
    with pytest.raises(UserError) as caught:
        from_architecture(LLAMA, None, "float32", "flesh_attention")
    one_line(caught)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_data_the_model_has_no_embedding_for_is_refused(tokenizer: Any, kind: str) -> None:
    model = build(architecture(kind))
    with pytest.raises(UserError, match="vocabulary of 61 is smaller than the tokenizer's of 262"):
        check_fits(model, tokenizer, 10)
    with pytest.raises(UserError, match=r"65 tokens, the model 64 positions.*--data\.max_length 64"):
        check_fits(model, None, 65)
    check_fits(model, None, 64)


@pytest.mark.filterwarnings("error")
def test_activations_are_recomputed_without_a_warning() -> None:
    model = build(LLAMA).train()
    recompute_activations(model)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_activations_are_recomputed_where_only_the_older_name_is_known() -> None:
    asked: list[dict[str, bool]] = []
    recompute_activations(types.SimpleNamespace(gradient_checkpointing_enable=asked.append))
    assert asked == [{"use_reentrant": False}]


# --- load_pretrained and ready --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing-here", "a/b/c", " "])
def test_a_missing_model_folder_is_one_line(name: str) -> None:
    for refuse in (check_pretrained, lambda n: load_pretrained(n, "float32")):
        with pytest.raises(UserError, match=r"no such model folder \(--model\.pretrained\)") as caught:
            refuse(name)
        one_line(caught)


def test_a_folder_without_a_config_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json.*--model\.pretrained") as caught:
        load_pretrained(str(tmp_path), "float32")
    one_line(caught)


@pytest.mark.parametrize("config", ["{}", '{"model_type": "nonsense"}', "not json", '{"model_type": "llama"}'])
def test_a_folder_that_cannot_be_loaded_is_one_line(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"--model\.pretrained") as caught:
        load_pretrained(str(tmp_path), "float32")
    one_line(caught)


def test_a_broken_weight_file_is_one_line(tmp_path: Path) -> None:
    build(LLAMA).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"--model\.pretrained") as caught:
        load_pretrained(str(tmp_path), "float32")
    one_line(caught)


def test_a_loaded_model_trains_without_a_cache_and_with_dropout(tmp_path: Path) -> None:
    build({**LLAMA, "attention_dropout": 0.5}).save_pretrained(tmp_path)
    model = load_pretrained(str(tmp_path), "float32")
    assert model.training and all(module.training for module in model.modules())
    assert model.config.use_cache is False
    ids = torch.arange(3, 20).unsqueeze(0)
    assert not torch.equal(model(ids).logits, model(ids).logits), "dropout is active"
    assert model(ids).past_key_values is None


def test_a_loaded_model_has_the_weights_of_the_folder_in_the_dtype_asked_for(tmp_path: Path) -> None:
    original = build(LLAMA)
    original.save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        loaded = load_pretrained(str(tmp_path), dtype).state_dict()
        for name, value in original.state_dict().items():
            assert torch.equal(loaded[name], value.to(getattr(torch, dtype))), name


# --- rotary frequencies ---------------------------------------------------------------------------------------------


def frequencies(model: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]


def test_rotary_frequencies_stay_float32_to_the_last_bit_through_bfloat16_and_copies() -> None:
    model = build({**LLAMA, "head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    expected = 1.0 / (5e5 ** (torch.arange(0, 64, 2).float() / 64))
    assert not torch.equal(expected.bfloat16().float(), expected), "rounding would show"
    copied = copy.deepcopy(model)
    variants = {
        "built": model,
        "copied": copied,
        "copy of bf16": copy.deepcopy(copy.deepcopy(model).to(torch.bfloat16)),
        "copied, bf16": copy.deepcopy(model).to(torch.bfloat16),
        "half and back": copy.deepcopy(model).half().float(),
        "bf16 twice": copy.deepcopy(model).bfloat16().bfloat16(),
        "inside a module": nn.Sequential(copy.deepcopy(model)).to(torch.bfloat16),
    }
    for name, variant in variants.items():
        found = frequencies(variant)
        assert found, name
        for buffer in found:
            assert buffer.dtype == torch.float32 and torch.equal(buffer, expected), name
    assert copied.get_input_embeddings().weight.dtype == torch.float32, "the copy is not the one that was cast"
    assert variants["copied, bf16"].get_input_embeddings().weight.dtype == torch.bfloat16


def test_without_the_guard_rotary_frequencies_are_rounded() -> None:
    """Shows that the test above can fail."""
    bare = AutoModelForCausalLM.from_config(build(LLAMA).config).to(torch.bfloat16)
    assert frequencies(bare)[0].dtype == torch.bfloat16
    guarded = AutoModelForCausalLM.from_config(build(LLAMA).config)
    keep_rotary_fp32(guarded)
    assert frequencies(guarded.to(torch.bfloat16))[0].dtype == torch.float32


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_neox", "phi3", "qwen3"])
def test_rotary_frequencies_of_other_families_stay_float32(kind: str) -> None:
    model = build(architecture(kind))
    before = [buffer.clone() for buffer in frequencies(model)]
    after = frequencies(model.to(torch.bfloat16))
    assert before and [b.dtype for b in after] == [torch.float32] * len(before)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


# --- the head -------------------------------------------------------------------------------------------------------


def dense_loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss through the model's own forward, attention mask included."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    keep = targets != -100
    return deft_by_hand(logits[keep], targets[keep])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_fused_deft_and_its_gradients_equal_the_dense_ones(kind: str, batch: dict[str, Tensor]) -> None:
    module = prepare(architecture(kind))
    seam = find_head(module.model)
    check_head(module.model, seam, batch["input_ids"], DEFT())
    module.double()
    wanted = dense_loss_of(module.model, batch)
    wanted.backward()
    wanted_gradients = gradients(module.model)
    found, stats, keep = module.loss_and_stats(batch)
    found.backward()
    assert stats.log_prob.numel() == int(keep.sum()) == int((batch["labels"][:, 1:] != -100).sum())
    # Norms and rotary embeddings compute in float32 even in a float64 model.
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert_same_gradients(gradients(module.model), wanted_gradients, 2e-6)
    with torch.no_grad():  # validation takes another way through the head
        assert module.loss_and_stats(batch)[0].item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_fused_gradients_equal_the_dense_ones_whether_or_not_the_embedding_is_tied(
    kind: str, tied: bool, batch: dict[str, Tensor]
) -> None:
    module = prepare(architecture(kind, tie_word_embeddings=tied)).double()
    head, embedding = module.model.get_output_embeddings().weight, module.model.get_input_embeddings().weight
    assert (head is embedding) is tied
    dense_loss_of(module.model, batch).backward()
    wanted = gradients(module.model)
    module.loss_and_stats(batch)[0].backward()
    assert_same_gradients(gradients(module.model), wanted, 2e-6)


@pytest.mark.parametrize(
    ("kind", "softcap", "scale"),
    [("llama", None, 1.0), ("gemma2", 2.0, 1.0), ("granite", None, 1 / 3), ("cohere", None, 0.25)],
)
def test_what_a_head_does_beside_the_product_is_found(kind: str, softcap: float | None, scale: float) -> None:
    seam = find_head(build(architecture(kind)))
    assert seam.softcap == softcap and seam.logit_scale == pytest.approx(scale)


def scaled(forward: Callable[..., Any], factor: float) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits * factor
        return out

    return wrapped


def suppressed_logits(forward: Callable[..., Any], token: int) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits[..., token] = -torch.inf
        return out

    return wrapped


@pytest.mark.parametrize(
    "change", [lambda f: scaled(f, 1.1), lambda f: scaled(f, 0.99), lambda f: suppressed_logits(f, 5)]
)
def test_a_head_that_does_something_unknown_is_refused(change: Any, batch: dict[str, Tensor]) -> None:
    module = prepare(LLAMA)
    module.model.forward = types.MethodType(change(module.model.forward), module.model)
    with pytest.raises(UserError, match=r"use --model\.head dense") as caught:
        module.loss_and_stats(batch)
    one_line(caught, "LlamaForCausalLM")
    module = prepare(LLAMA, head="dense")
    module.model.forward = types.MethodType(change(module.model.forward), module.model)
    assert module.loss_and_stats(batch)[0].isfinite()


def test_check_head_leaves_the_mode_and_the_gradients_alone(batch: dict[str, Tensor]) -> None:
    model = build({**LLAMA, "attention_dropout": 0.5})
    for training in (True, False):
        model.train(training)
        check_head(model, find_head(model), batch["input_ids"], DEFT())
        assert model.training is training and not gradients(model)


class NormedLinear(nn.Linear):
    """A head that is more than a product."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / x.norm(dim=-1, keepdim=True))


def test_a_head_that_is_not_a_plain_linear_is_refused_at_once() -> None:
    model = build(LLAMA)
    model.lm_head = NormedLinear(16, VOCAB, bias=False)
    with pytest.raises(UserError, match=r"NormedLinear.*use --model\.head dense") as caught:
        find_head(model)
    one_line(caught)


# --- LoRA -----------------------------------------------------------------------------------------------------------


def with_adapters(seed: int = 0, **options: Any) -> Any:
    """A tiny Llama whose adapters have moved away from zero."""
    model = add_adapters(build({**LLAMA, **options.pop("llama", {})}, seed), LoRA(r=4, **options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def test_only_adapters_require_gradients_and_each_linear_but_the_head_has_one() -> None:
    model = add_adapters(build(LLAMA), LoRA(r=4))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    adapted = {name.split(".")[-4] for name in trained}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(p.shape[0] == 4 or p.shape[1] == 4 for n, p in model.named_parameters() if n in trained)


def test_adapters_start_as_the_model_they_adapt(batch: dict[str, Tensor]) -> None:
    base, adapted = build(LLAMA), add_adapters(build(LLAMA), LoRA(r=4))
    assert torch.equal(base(batch["input_ids"]).logits, adapted(batch["input_ids"]).logits)


@pytest.mark.parametrize(("alpha", "factor"), [(None, 2.0), (4.0, 1.0), (2.0, 0.5)])
def test_the_scale_of_an_adapter_is_alpha_over_r_with_alpha_twice_r_by_default(
    alpha: float | None, factor: float
) -> None:
    model = with_adapters(alpha=alpha, target_modules=["q_proj"])
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, 16)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), layer.base_layer(x) + factor * (x @ a.T) @ b.T)


def test_fused_equals_dense_through_adapters(batch: dict[str, Tensor]) -> None:
    module = prepare(LLAMA, lora=LoRA(r=4)).double()
    for name, parameter in module.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    wanted = dense_loss_of(module.model, batch)
    wanted.backward()
    wanted_gradients = gradients(module.model)
    found = module.loss_and_stats(batch)[0]
    found.backward()
    assert all(".lora_" in name for name in wanted_gradients) and len(wanted_gradients) == 14
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert_same_gradients(gradients(module.model), wanted_gradients, 2e-6)


@pytest.mark.parametrize("names", ["no_such_module", ["q_projj", "v_projj"]])
def test_an_unknown_target_module_is_one_line(names: Any) -> None:
    with pytest.raises(UserError, match=r"--model\.lora\.target_modules") as caught:
        add_adapters(build(LLAMA), LoRA(r=4, target_modules=names))
    one_line(caught)


def test_one_unknown_name_among_the_target_modules_is_not_passed_over() -> None:
    with pytest.raises(UserError, match="v_projj"):
        add_adapters(build(LLAMA), LoRA(r=4, target_modules=["q_proj", "v_projj"]))


@pytest.mark.parametrize("settings", [{"r": 0}, {"dropout": 1.0}, {"dropout": -0.1}], ids=str)
def test_ranks_and_dropouts_that_mean_nothing_are_one_line(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"--model\.lora\.{next(iter(settings))}") as caught:
        LoRA(**settings)
    one_line(caught)


# --- export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_folder_gives_transformers_the_same_logits(
    kind: str, tied: bool, tmp_path: Path, batch: dict[str, Tensor]
) -> None:
    model = build(architecture(kind, tie_word_embeddings=tied))
    expected = logits_of(model, batch["input_ids"])
    folder = save_hugging_face(model, None, [], tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(loaded, batch["input_ids"]), expected)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied
    assert loaded.config.use_cache is True, "who serves it wants the cache that training turned off"
    assert model.config.use_cache is False, "training goes on without it"
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())}
    assert all(mode & 0o444 == 0o444 for mode in modes.values()), modes


def test_a_bfloat16_model_is_exported_in_bfloat16(tmp_path: Path, batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = from_architecture(LLAMA, None, "bfloat16")
    expected = logits_of(model, batch["input_ids"])
    loaded = AutoModelForCausalLM.from_pretrained(save_hugging_face(model, None, [], tmp_path / "out"), dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits_of(loaded, batch["input_ids"]), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_merged_adapters_are_an_ordinary_model_and_training_can_go_on(
    tied: bool, tmp_path: Path, batch: dict[str, Tensor]
) -> None:
    model = with_adapters(llama={"tie_word_embeddings": tied})
    expected = logits_of(model, batch["input_ids"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folder = save_hugging_face(model, None, [], tmp_path / "out")
    assert not list(folder.glob("adapter*"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert not any("lora" in name for name in loaded.state_dict())
    torch.testing.assert_close(logits_of(loaded, batch["input_ids"]), expected, rtol=1e-5, atol=1e-5)
    # Exactly what peft's own merge gives.
    own = logits_of(with_adapters(llama={"tie_word_embeddings": tied}).merge_and_unload(), batch["input_ids"])
    assert torch.equal(logits_of(loaded, batch["input_ids"]), own)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits_of(model, batch["input_ids"]), expected)


def test_an_adapter_folder_gives_peft_the_same_logits(tmp_path: Path, batch: dict[str, Tensor]) -> None:
    from peft import PeftModel

    build(LLAMA).save_pretrained(tmp_path / "base")
    model = add_adapters(load_pretrained(str(tmp_path / "base"), "float32"), LoRA(r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    expected = logits_of(model, batch["input_ids"])
    folder = save_hugging_face(model, None, [], tmp_path / "adapter", merge=False)
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, folder), batch["input_ids"]), expected)
    # transformers finds the base through the adapter's own config.
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder), batch["input_ids"]), expected)


def test_generation_config_names_where_to_stop_and_what_pads(tmp_path: Path, tokenizer: Any) -> None:
    model = from_architecture({**LLAMA, "vocab_size": 262}, tokenizer, "float32")
    for merge, candidate in ((True, model), (False, add_adapters(copy.deepcopy(model), LoRA(r=2)))):
        folder = save_hugging_face(candidate, tokenizer, [1, 5], tmp_path / f"out-{merge}", merge=merge)
        settings = json.loads((folder / "generation_config.json").read_text())
        assert settings["eos_token_id"] == [1, 5]
        assert settings["pad_token_id"] == tokenizer.pad_token_id


def test_generation_of_the_exported_folder_stops_where_it_should(tmp_path: Path, tokenizer: Any) -> None:
    model = from_architecture({**LLAMA, "vocab_size": 262}, tokenizer, "float32").eval()
    ids = torch.tensor([[10, 11, 12]])
    free = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=1)
    stop = int(free[0, 4])
    folder = save_hugging_face(model, tokenizer, [stop], tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    first = free[0, 3:].tolist().index(stop)
    assert found[0, 3:].tolist() == free[0, 3 : 3 + first + 1].tolist()


def test_the_chat_template_travels_with_the_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    model = from_architecture({**LLAMA, "vocab_size": 262}, tokenizer, "float32")
    folder = save_hugging_face(model, tokenizer, tokenizer.all_special_ids[:1], tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Grüße\n"}, {"role": "assistant", "content": "ok <|end|>"}]
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.apply_chat_template(chat).input_ids == tokenizer.apply_chat_template(chat).input_ids
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


@pytest.mark.parametrize("failing", ["model", "tokenizer"])
def test_a_failing_export_leaves_nothing_behind(
    failing: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = from_architecture({**LLAMA, "vocab_size": 262}, tokenizer, "float32")
    tokenizer = copy.deepcopy(tokenizer)
    victim = model if failing == "model" else tokenizer
    written = victim.save_pretrained

    def fails_at_the_end(folder: Path, *args: Any, **kwargs: Any) -> None:
        written(folder, *args, **kwargs)
        raise OSError("no space left on device")

    monkeypatch.setattr(victim, "save_pretrained", fails_at_the_end)
    with pytest.raises(UserError, match=r"deep/out: cannot be written: no space left.*--output"):
        save_hugging_face(model, tokenizer, [1], tmp_path / "deep" / "out")
    assert not list((tmp_path / "deep").iterdir())
    assert model.config.use_cache is False
    monkeypatch.undo()
    assert (save_hugging_face(model, tokenizer, [1], tmp_path / "deep" / "out") / "model.safetensors").is_file()


def test_a_folder_with_something_in_it_is_refused_and_an_empty_one_filled(tmp_path: Path) -> None:
    model = build(LLAMA)
    full, empty, file = tmp_path / "full", tmp_path / "empty", tmp_path / "file"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    empty.mkdir()
    file.write_text("mine")
    for taken in (full, file):
        with pytest.raises(UserError, match=r"exists already; choose another --output") as caught:
            save_hugging_face(model, None, [], taken)
        one_line(caught)
    assert (full / "notes.txt").read_text() == file.read_text() == "mine"
    assert [path.name for path in full.iterdir()] == ["notes.txt"]
    assert (save_hugging_face(model, None, [], empty) / "config.json").is_file()


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_comes_back_from_its_checkpoint_alone(
    kind: str, tied: bool, tmp_path: Path, tokenizer: Any, batch: dict[str, Tensor]
) -> None:
    model = build(architecture(kind, tie_word_embeddings=tied, vocab_size=262))
    path = checkpoint_of(model, tokenizer, None, tmp_path / "a.ckpt")
    again, words, stops = model_from_checkpoint(load_checkpoint(path))
    assert torch.equal(logits_of(again, batch["input_ids"]), logits_of(model, batch["input_ids"]))
    assert stops == [1, 4]
    assert words.chat_template == tokenizer.chat_template
    assert words("some text").input_ids == tokenizer("some text").input_ids


def test_adapters_come_back_from_their_checkpoint(tmp_path: Path, batch: dict[str, Tensor]) -> None:
    lora = LoRA(r=4, alpha=3.0, target_modules=["q_proj", "down_proj"])
    model = with_adapters(alpha=3.0, target_modules=["q_proj", "down_proj"])
    path = checkpoint_of(model, None, lora, tmp_path / "a.ckpt")
    again, words, _ = model_from_checkpoint(load_checkpoint(path))
    assert words is None
    assert torch.equal(logits_of(again, batch["input_ids"]), logits_of(model, batch["input_ids"]))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_a_bfloat16_checkpoint_keeps_its_dtype_and_float32_frequencies(
    tmp_path: Path, batch: dict[str, Tensor]
) -> None:
    torch.manual_seed(0)
    model = from_architecture(LLAMA, None, "bfloat16")
    again = model_from_checkpoint(load_checkpoint(checkpoint_of(model, None, None, tmp_path / "a.ckpt")))[0]
    assert again.dtype == torch.bfloat16 and frequencies(again)[0].dtype == torch.float32
    assert torch.equal(logits_of(again, batch["input_ids"]), logits_of(model, batch["input_ids"]))


def test_a_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "none.ckpt", "no such checkpoint"), (tmp_path, "is not a complete checkpoint")):
        with pytest.raises(UserError, match=rf"{what} \(--ckpt_path\)") as caught:
            load_checkpoint(path)
        one_line(caught, str(path))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_checkpoint_is_one_line(share: float, tmp_path: Path) -> None:
    path = checkpoint_of(build(LLAMA), None, None, tmp_path / "a.ckpt")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"not a complete checkpoint \(--ckpt_path\)") as caught:
        load_checkpoint(path)
    one_line(caught)


class Foreign:
    """Something a checkpoint of another program may hold."""


def _torch_file(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def _zip_file(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")


FOREIGN: dict[str, Callable[[Path], None]] = {
    "text": lambda path: path.write_text("hello"),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"state_dict": {}})),
    "weights": _torch_file({"state_dict": {"model.weight": torch.ones(2)}}),
    "no weights": _torch_file({"deft_lightning": {}}),
    "tensor": _torch_file(torch.ones(2)),
    "list": _torch_file([1, 2]),
    "objects": _torch_file({"state_dict": {}, "hyper_parameters": Foreign()}),
    "archive": _zip_file,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "foreign.ckpt"
    FOREIGN[kind](path)
    with pytest.raises(UserError, match=r"--ckpt_path") as caught:
        load_checkpoint(path)
    one_line(caught, str(path))
