"""Tokens that a model gets for a run: read as one, trained, kept in checkpoint, export and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import (
    adam,
    bare_trainer,
    byte_tokenizer,
    constant,
    largest_difference,
    save_tiny_llama,
    weights,
    write_rows,
)

from deft_lightning import InstructionDataModule, SFTModule
from deft_lightning.callbacks import Checkpoint
from deft_lightning.errors import UserError
from deft_lightning.models import LoRA, load_pretrained

TOOLS = ["<tool>", "</tool>"]
ROWS = [{"question": f"{i} + {i}?", "answer": f"<tool>{i} {i}</tool> it is {2 * i}"} for i in range(16)]
OLD = len(byte_tokenizer())


def base(folder: Path, **shape: Any) -> str:
    return save_tiny_llama(folder / "base", 0.3, **shape)


def data_of(folder: Path, **options: Any) -> InstructionDataModule:
    source = write_rows(folder / "rows.jsonl", ROWS)
    options = {"cache_dir": str(folder / "cache"), "batch_size": 4, "validation_fraction": 0.0, **options}
    return InstructionDataModule(source, **options)


def module_of(pretrained: str, **options: Any) -> SFTModule:
    options = {"add_tokens": TOOLS, "lora": LoRA(r=2), **options}
    return SFTModule(pretrained=pretrained, optimizer=lambda p: adam(p, lr=1e-2), scheduler=constant, **options)


def fitted(folder: Path, module: SFTModule, steps: int, resume: str | None = None) -> Any:
    torch.manual_seed(0)
    checkpoint = Checkpoint(every_n_train_steps=1, save_top_k=-1, dirpath=str(folder / "checkpoints"))
    trainer = bare_trainer(folder, checkpoint, max_epochs=-1, max_steps=steps)
    trainer.fit(module, data_of(folder), ckpt_path=resume)
    return trainer


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = torch.tensor([tokenizer("<tool>3 3</tool> it is 6").input_ids])
    assert ids[0, 0] == OLD and OLD + 1 in ids[0]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [LoRA(r=2), None], ids=["lora", "full"])
@pytest.mark.parametrize("head", ["fused", "dense"])
def test_added_tokens_are_trained_and_exported(tied: bool, lora: LoRA | None, head: Any, tmp_path: Path) -> None:
    pretrained = base(tmp_path, tie_word_embeddings=tied)
    start = load_pretrained(pretrained, "float32")
    module = module_of(pretrained, lora=lora, head=head)
    trainer = fitted(tmp_path, module, 3)
    data = trainer.datamodule
    ids = data.example("train", 0).input_ids
    assert OLD in ids and OLD + 1 in ids
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        now, then = getattr(module.model, layer)().weight, getattr(start, layer)().weight
        assert now.shape == (OLD + 2, 16)
        mean = then.detach().mean(0)
        moved = (now[OLD:] - mean).abs()
        assert 1e-4 < moved.max().item() < 0.1, "from the mean of the old rows, three steps of 0.01 away"
        assert not torch.equal(now[:OLD], then), "the old ones are trained beside"
    expected = logits(module.model, data.tokenizer)
    for number, how in enumerate(({"ckpt_path": str(tmp_path / "checkpoints" / "step=3.ckpt")}, {"datamodule": data})):
        folder = trainer.export(module, output=str(tmp_path / f"out{number}"), **how)
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(model, tokenizer), expected, rtol=1e-4, atol=1e-4)
        assert model.config.vocab_size == len(tokenizer) == OLD + 2
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied is model.config.tie_word_embeddings
        prompt = torch.tensor([tokenizer("<tool>").input_ids])
        assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape[1] > 1
        assert tokenizer.decode([OLD, 70, OLD + 1], skip_special_tokens=True).startswith("<tool>")


@pytest.mark.parametrize("tied", [True, False])
def test_a_resumed_run_is_the_one_that_was_not_cut(tied: bool, tmp_path: Path) -> None:
    pretrained = base(tmp_path, tie_word_embeddings=tied)
    whole = module_of(pretrained)
    fitted(tmp_path, whole, 4)
    half = str(tmp_path / "checkpoints" / "step=2.ckpt")
    again = module_of(pretrained)
    fitted(tmp_path / "again", again, 4, half)
    assert len(weights(whole.model)) > 2
    assert largest_difference(weights(again.model), weights(whole.model)) == 0
    restored = SFTModule.load_from_checkpoint(half)
    assert restored.lora is not None and restored.lora.embeddings
    assert restored.model.get_input_embeddings().weight.shape[0] == OLD + 2


def test_a_resume_with_other_tokens_is_one_line(tmp_path: Path) -> None:
    pretrained = base(tmp_path)
    fitted(tmp_path, module_of(pretrained), 1)
    for tokens in (["<other>"], None):
        with pytest.raises(UserError, match=r"--model\.(add_tokens|lora)") as caught:
            fitted(tmp_path, module_of(pretrained, add_tokens=tokens), 2, str(tmp_path / "checkpoints" / "step=1.ckpt"))
        assert "\n" not in str(caught.value) and "step=1.ckpt" in str(caught.value)


@pytest.mark.parametrize("lora", [LoRA(r=2), None], ids=["lora", "full"])
def test_a_tokenizer_with_more_tokens_than_the_model_names_the_option_that_resizes(
    lora: LoRA | None, tmp_path: Path
) -> None:
    pretrained = base(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(TOOLS)
    tokenizer.save_pretrained(pretrained)
    with pytest.raises(UserError, match=rf"{OLD}.*{OLD + 2}.*--model\.resize_vocabulary true") as caught:
        fitted(tmp_path, module_of(pretrained, lora=lora, add_tokens=None), 1)
    assert "\n" not in str(caught.value)
    module = module_of(pretrained, lora=lora, add_tokens=None, resize_vocabulary=True)
    trainer = fitted(tmp_path, module, 3)
    expected = logits(module.model, trainer.datamodule.tokenizer)
    folder = trainer.export(module, output=str(tmp_path / "out"), datamodule=trainer.datamodule)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(model, AutoTokenizer.from_pretrained(folder)), expected, rtol=1e-4, atol=1e-4)
    # It fits now, and is not begun anew.
    again = module_of(str(folder), lora=None, add_tokens=TOOLS)
    fitted(tmp_path, again, 0)
    assert torch.equal(again.model.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_rows_that_a_padded_vocabulary_has_are_begun_at_the_mean(tmp_path: Path) -> None:
    pretrained = base(tmp_path)
    model = load_pretrained(pretrained, "float32")
    model.resize_token_embeddings(OLD + 10, mean_resizing=False)
    model.save_pretrained(pretrained)
    module = module_of(pretrained)
    fitted(tmp_path, module, 0)
    now = module.model.get_output_embeddings().weight
    then = model.get_output_embeddings().weight
    assert now.shape == then.shape
    torch.testing.assert_close(now[OLD : OLD + 2], then[:OLD].mean(0).expand(2, -1))
    assert torch.equal(now[OLD + 2 :], then[OLD + 2 :])


def test_prepared_data_is_another_with_other_tokens(tmp_path: Path) -> None:
    pretrained = base(tmp_path)
    for tokens, folders in ((None, 1), (TOOLS, 2), (TOOLS, 2), (["<tool>"], 3)):
        fitted(tmp_path, module_of(pretrained, add_tokens=tokens), 0)
        assert len(list((tmp_path / "cache").rglob("train.arrow"))) == folders


def test_a_data_module_follows_the_module_it_is_used_with(tmp_path: Path) -> None:
    pretrained, data = base(tmp_path), data_of(tmp_path)
    for tokens, size in ((None, OLD), (TOOLS, OLD + 2), (None, OLD)):
        bare_trainer(tmp_path, max_steps=1, max_epochs=-1).fit(module_of(pretrained, add_tokens=tokens), data)
        assert len(data.tokenizer) == size


def test_a_model_and_a_tokenizer_that_are_given_get_the_tokens(tmp_path: Path) -> None:
    model = load_pretrained(base(tmp_path), "float32")
    data = data_of(tmp_path)
    data.use_tokenizer(byte_tokenizer())
    module = module_of(model, lora=None)
    bare_trainer(tmp_path, max_steps=1, max_epochs=-1).fit(module, data)
    assert model.get_input_embeddings().weight.shape[0] == len(data.tokenizer) == OLD + 2


def test_tokens_for_a_tokenizer_that_is_built_are_refused(tmp_path: Path) -> None:
    module = SFTModule(architecture={"hidden_size": 16}, add_tokens=TOOLS)
    with pytest.raises(UserError, match=r"--model\.add_tokens.*--data\.tokenizer"):
        fitted(tmp_path, module, 1)


@pytest.mark.parametrize("tokens", ["<tool>", [""], [3]], ids=str)
def test_what_is_no_list_of_spellings_is_refused(tokens: Any) -> None:
    with pytest.raises(UserError, match=r"--model\.add_tokens must be a list"):
        SFTModule(architecture={}, add_tokens=tokens)


def test_adapters_on_what_is_trained_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model\.lora\.target_modules: lm_head is trained in full"):
        fitted(tmp_path, module_of(base(tmp_path), lora=LoRA(r=2, target_modules=["q_proj", "lm_head"])), 1)
