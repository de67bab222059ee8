"""The fused head with adapters on head or embedding: trained, switched off, merged, exported as through peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_cases import (
    DENSE,
    adapted,
    assert_fused_is_dense,
    fused,
    head_of,
    loader,
    options_of,
    supervised,
    tokens,
    uneven_batches,
)
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from tiny import (
    LLAMA,
    TINY,
    architecture,
    build,
    checkpoint_of,
    deft_by_hand,
    logits_of,
    move_adapters,
    one_line,
    prepare,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from worlds import bare_trainer, constant, sgd

from deft_lightning import Trainer
from deft_lightning.errors import UserError
from deft_lightning.models import (
    LoRA,
    add_adapters,
    base_causal_lm,
    check_head,
    find_head,
    load_checkpoint,
    model_from_checkpoint,
    save_hugging_face,
)
from deft_lightning.objectives import DEFT


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"lm_head": 3}}], ids=str)
def test_adapters_on_the_head_train_as_through_pefts_own_forward(tied: bool, settings: dict[str, Any]) -> None:
    model = adapted(tied, **settings).double()
    found = assert_fused_is_dense(model)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in found} == {"q_proj", "lm_head"}
    assert all(float(grad.abs().max()) > 1e-3 for grad in found.values())


@pytest.mark.parametrize("tied", [True, False])
def test_a_weight_that_trains_beside_its_adapters_gets_its_gradient(tied: bool) -> None:
    model = adapted(tied).double()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    found = assert_fused_is_dense(model)
    assert any(".lm_head.base_layer.weight" in name or ".embed_tokens.weight" in name for name in found)


def test_softcapping_scale_and_bias_stand_around_the_adapters() -> None:
    for kind in ("gemma2", "granite", "phi"):
        model = build(options_of(kind))
        config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        assert_fused_is_dense(move_adapters(get_peft_model(model, config)).double())


def test_two_adapters_at_once_and_each_alone() -> None:
    model = adapted()
    second = LoraConfig(r=2, lora_alpha=3, target_modules=["v_proj", "lm_head"], task_type="CAUSAL_LM")
    elsewhere = LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")
    model.add_adapter("second", second)
    model.add_adapter("elsewhere", elsewhere)
    model = move_adapters(model, 5).double()
    seen = {}
    for names in (["default", "second"], ["second", "default"], ["default"], ["second"], ["elsewhere"]):
        model.base_model.set_adapter(names)
        seen[tuple(names)] = assert_fused_is_dense(model)
    assert any("lm_head.lora_B.second" in name for name in seen["default", "second"])
    assert any("lm_head.lora_B.default" in name for name in seen["default", "second"])
    assert not any("default" in name for name in seen[("second",)])
    assert not any("lm_head" in name for name in seen[("elsewhere",)]), "no adapter of the head is active"


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_that_are_switched_off_are_off_in_the_head_and_come_back(tied: bool) -> None:
    model = adapted(tied).double()
    ids, targets = tokens()
    with_adapters = fused(model, ids, targets).loss.item()
    with model.disable_adapter():
        assert_fused_is_dense(model, gradient=False)
        without = fused(model, ids, targets).loss.item()
    assert without == pytest.approx(
        fused(build({**LLAMA, "tie_word_embeddings": tied}).double(), ids, targets).loss.item()
    )
    assert abs(with_adapters - without) > 0.1
    assert fused(model, ids, targets).loss.item() == pytest.approx(with_adapters, rel=1e-12)


def test_adapters_that_are_merged_count_once() -> None:
    model = adapted().double()
    ids, targets = tokens()
    before = fused(model, ids, targets).loss.item()
    model.merge_adapter()
    assert_fused_is_dense(model, gradient=False)
    assert fused(model, ids, targets).loss.item() == pytest.approx(before, rel=1e-9)
    model.unmerge_adapter()
    assert_fused_is_dense(model)


def test_merged_adapters_that_are_switched_off_are_off() -> None:
    """Peft takes them out of the weights in its forward."""
    ids, targets = tokens()
    wanted = deft_by_hand(*supervised(build(LLAMA).double(), ids, targets)).item()
    model = adapted().double()
    model.merge_adapter()
    with model.disable_adapter():
        assert fused(model, ids, targets).loss.item() == pytest.approx(wanted, rel=1e-9)


def test_dropout_on_the_adapters_is_off_in_evaluation() -> None:
    model = adapted(lora_dropout=0.5).double().eval()
    assert_fused_is_dense(model)


def test_dropout_on_the_adapters_is_drawn_for_the_rows_that_count() -> None:
    """The very loss of a mask drawn by hand for the supervised hidden states, scale and all."""
    model = adapted(lora_dropout=0.4, target_modules=["lm_head"]).double()
    ids, targets = tokens()
    head, causal = head_of(model), base_causal_lm(model)
    rows = causal.model(input_ids=ids, use_cache=False).last_hidden_state[targets != -100].detach()
    a, b = head.lora_A["default"].weight, head.lora_B["default"].weight
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        mask = nn.functional.dropout(torch.ones_like(rows), 0.4)
        assert 0.2 < float((mask == 0).double().mean()) < 0.6
        logits = rows @ head.base_layer.weight.T + 2.0 * ((rows * mask) @ a.T) @ b.T
        wanted = deft_by_hand(logits, targets[targets != -100])
        wanted_gradients = torch.autograd.grad(wanted, [a, b])
        torch.manual_seed(seed)
        found = fused(model, ids, targets)
        assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-12)
        for grad, expected in zip(torch.autograd.grad(found.loss, [a, b]), wanted_gradients, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9)
        losses.append(found.loss.item())
    assert len(set(losses)) == 3, "a mask of its own each time"


@pytest.mark.parametrize("tied", [True, False])
def test_modules_to_save_trains_the_copy_of_the_head(tied: bool) -> None:
    model = adapted(tied, target_modules=["q_proj"], modules_to_save=["lm_head"])
    copied = head_of(model).modules_to_save["default"].weight
    copied.data += 0.3 * torch.randn(copied.shape, generator=torch.Generator().manual_seed(3))
    model = model.double()
    check_head(model, find_head(model), tokens()[0], DEFT())
    found = assert_fused_is_dense(model)
    assert any("lm_head.modules_to_save.default.weight" in name for name in found)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "granite"])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_that_are_trained_whole_get_their_gradient(kind: str, tied: bool) -> None:
    model = build(architecture(kind, tie_word_embeddings=tied))
    model.resize_token_embeddings(TINY["vocab_size"] + 3, mean_resizing=False)
    model = move_adapters(add_adapters(model, LoRA(r=2, embeddings=True))).double()
    check_head(model, find_head(model), tokens()[0], DEFT())
    found = assert_fused_is_dense(model)
    whole_names = [name for name in found if ".modules_to_save." in name]
    assert len(whole_names) == (1 if tied else 2) and any("lora_" in name for name in found)
    causal = base_causal_lm(model)
    assert (causal.get_output_embeddings().weight is causal.get_input_embeddings().weight) is tied


def test_a_head_that_modules_to_save_has_copied_is_the_original_while_adapters_are_off() -> None:
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    copied = head_of(model).modules_to_save["default"].weight
    copied.data += 0.3 * torch.randn(copied.shape, generator=torch.Generator().manual_seed(3))
    model = model.double()
    with model.disable_adapter():
        assert_fused_is_dense(model, gradient=False)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_dora_and_a_bias_of_lora_on_the_head_are_refused(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    with pytest.raises(UserError) as caught:
        find_head(model)
    one_line(caught, DENSE, "LlamaForCausalLM")
    find_head(adapted(**settings, target_modules=["q_proj"]))  # elsewhere they are nothing to the head


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM"),
        LoHaConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"),
        VeraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"),
        OFTConfig(target_modules=["lm_head"], oft_block_size=4, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_adapters_on_the_head_are_refused(config: Any) -> None:
    model = get_peft_model(build(LLAMA), config)
    with pytest.raises(UserError) as caught:
        find_head(model)
    one_line(caught, DENSE)


def test_trainable_tokens_of_a_tied_head_are_refused_and_of_an_untied_embedding_trained() -> None:
    tokens_too = {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}
    with pytest.raises(UserError) as caught:
        find_head(adapted(True, **tokens_too))
    one_line(caught, DENSE)
    assert_fused_is_dense(adapted(False, **tokens_too).double())


def test_virtual_tokens_before_the_prompt_are_refused() -> None:
    model = get_peft_model(build(LLAMA), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(UserError) as caught:
        fused(model, *tokens())
    one_line(caught, DENSE)


class WeightSized(TorchDispatchMode):
    """Counts the tensors as large as the head's weight that any operation makes."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape, self.own, self.made = set(map(tuple, (weight.shape, weight.t().shape))), weight.data_ptr(), 0

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tuple(tensor.shape) in self.shape and tensor.data_ptr() != self.own:
                self.made += 1
        return out


@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_weight_has_no_gradient_made_for_it(tied: bool) -> None:
    ids, targets = tokens()
    assert int((targets != -100).sum()) != TINY["hidden_size"], "a chunk of logits has another shape"
    for frozen in (True, False):
        model = adapted(tied)
        weight = head_of(model).base_layer.weight
        weight.requires_grad_(not frozen)
        with WeightSized(weight) as count:
            fused(model, ids, targets).loss.backward()
        assert (count.made == 0) is frozen
        assert (weight.grad is None) is frozen


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", ["q_proj", "lm_head"]),
        ("gemma2", ["q_proj", "lm_head"]),
        ("gpt2", ["c_attn", "lm_head"]),
        ("llama", ["embed_tokens", "lm_head"]),
        ("llama", ["embed_tokens", "q_proj"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_with_merged_adapters_on_head_or_embedding_is_the_trained_model(
    kind: str, targets: list[str], tied: bool, tmp_path: Path
) -> None:
    base = build(architecture(kind, tie_word_embeddings=tied))
    embedding = base.get_input_embeddings().weight.detach().clone()
    model = add_adapters(base, LoRA(r=4, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # peft starts some factors at zero
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    ids, _ = tokens()
    expected = logits_of(model, ids)
    folder = save_hugging_face(model, None, [], tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits_of(loaded, ids), expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name in loaded.state_dict())
    if "lm_head" in targets:
        assert config_of(folder)["tie_word_embeddings"] is False
        assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight
    if "embed_tokens" not in targets:
        assert torch.equal(loaded.get_input_embeddings().weight, embedding)
    # Training goes on with the model as it was.
    assert torch.equal(logits_of(model, ids), expected)
    causal = base_causal_lm(model)
    assert causal.config.tie_word_embeddings is tied
    head, inner = head_of(model), causal.get_input_embeddings()
    assert (getattr(head, "base_layer", head).weight is getattr(inner, "base_layer", inner).weight) is tied


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_of_a_head_that_modules_to_save_has_copied_is_the_trained_model(tied: bool, tmp_path: Path) -> None:
    model = adapted(tied, target_modules=["q_proj"], modules_to_save=["lm_head"])
    copied = head_of(model).modules_to_save["default"].weight
    copied.data += 0.3 * torch.randn(copied.shape, generator=torch.Generator().manual_seed(3))
    ids, _ = tokens()
    expected = logits_of(model, ids)
    loaded = AutoModelForCausalLM.from_pretrained(save_hugging_face(model, None, [], tmp_path / "out"))
    torch.testing.assert_close(logits_of(loaded, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_head_with_adapters_goes_from_its_checkpoint_to_a_folder(tied: bool, tmp_path: Path) -> None:
    lora = LoRA(r=4, target_modules=["q_proj", "lm_head"])
    module = prepare({**LLAMA, "tie_word_embeddings": tied}, lora=lora, optimizer=sgd, scheduler=constant)
    trainer = bare_trainer(tmp_path, max_epochs=3)
    trainer.fit(module, loader(uneven_batches()))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    ids, _ = tokens()
    expected = logits_of(module.model, ids)
    with module.model.disable_adapter():
        assert float((logits_of(module.model, ids) - expected).abs().max()) > 1e-2, "it has trained"
    again, _, _ = model_from_checkpoint(load_checkpoint(tmp_path / "a.ckpt"))
    assert torch.equal(logits_of(again, ids), expected)
    assert_fused_is_dense(again.double())
    folder = Trainer(logger=False).export(ckpt_path=str(tmp_path / "a.ckpt"), output=str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits_of(loaded, ids), expected, rtol=1e-4, atol=1e-4)
    start = prepare({**LLAMA, "tie_word_embeddings": tied}).model.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, start), "nobody trained the embedding"
    assert config_of(folder)["tie_word_embeddings"] is False


def test_a_checkpoint_written_by_hand_comes_back_with_adapters_on_a_tied_head(tmp_path: Path) -> None:
    lora = LoRA(r=4, alpha=3.0, target_modules=["q_proj", "lm_head"])
    model = move_adapters(add_adapters(build({**LLAMA, "tie_word_embeddings": True}), lora))
    ids, _ = tokens()
    expected = logits_of(model, ids)
    again = model_from_checkpoint(load_checkpoint(checkpoint_of(model, None, lora, tmp_path / "a.ckpt")))[0]
    assert head_of(again).base_layer.weight is base_causal_lm(again).get_input_embeddings().weight
    assert torch.equal(logits_of(again, ids), expected)
