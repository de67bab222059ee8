"""Answers behind others that are read once: the same as when everything is read anew, in every kind of body."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deft_lightning import SFTModule
from deft_lightning.annotations import Batch
from deft_lightning.models.unprompted import UnpromptedReader

VOCABULARY = 50
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "num_key_value_heads": 2},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2},
    "opt": {"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32,
            "init_std": 0.5},
    "gpt_neox": {**LLAMA, "model_type": "gpt_neox"},
    "bloom": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gemma2": {**LLAMA, "model_type": "gemma2", "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 8},
    "mixtral": {**LLAMA, "model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4},
    "qwen2, sliding": {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6,
                       "max_window_layers": 1, "num_key_value_heads": 2},
}  # fmt: skip


def batch_of(examples: int, longest: int, ahead: int, frame: int) -> Batch:
    """Return answers of one to ``longest`` labels behind one of two rows."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (examples, longest), generator=draw)
    labels = torch.where(torch.arange(longest) < 2, -100, ids)  # a header of two
    for row in range(examples):
        ids[row, 3 + row :], labels[row, 3 + row :] = 0, -100
    return {
        "unprompted_ids": ids, "unprompted_labels": labels, "frame": frame,
        "ahead_ids": torch.randint(1, VOCABULARY, (2, ahead), generator=draw),
        "ahead": torch.arange(examples) % 2, "has_prompt": torch.ones(examples, dtype=torch.bool),
    }  # fmt: skip


def reader_of(architecture: dict[str, Any], head: Any = "fused", **options: Any) -> UnpromptedReader:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "vocab_size": VOCABULARY, **architecture}
    if architecture["model_type"] != "opt":
        shape["initializer_range"] = 0.5
    if architecture["model_type"] in ("gpt2", "bloom"):
        del shape["num_hidden_layers"]
    module = SFTModule(architecture=shape, head=head, **options)
    module.configure_model()
    reader: UnpromptedReader = module.batch_loss.unprompted
    return reader


@pytest.mark.parametrize("head", ["fused", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_reading_once_is_reading_everything_anew(kind: str, head: str) -> None:
    reader, batch = reader_of(KINDS[kind], head), batch_of(6, 9, 16, 3)
    for alone in (True, False):
        kept, anew = (reader.read(batch, alone, once) for once in (True, False))
        assert kept.shape == ((batch["unprompted_labels"] != -100).sum(),) and bool((kept < 0).all())
        assert torch.allclose(kept, anew, atol=2e-5)
    with_others, without = (reader.read(batch, alone, True) for alone in (False, True))
    assert float((with_others - without).abs().max()) > 0.1, "what stands in front matters"
    reader.settle([batch])
    assert reader.once is True


def test_the_labels_are_those_of_the_model_s_own_logits() -> None:
    reader, batch = reader_of(KINDS["llama"]), batch_of(4, 6, 5, 5)
    found, expected = reader.read(batch, False, True), list[Tensor]()
    for ids, labels, place in zip(batch["unprompted_ids"], batch["unprompted_labels"], batch["ahead"], strict=True):
        own = ids[: int((labels != -100).nonzero().max()) + 1]
        row = torch.cat([batch["ahead_ids"][place], own])
        with torch.no_grad():
            log_pi = reader.model(row[None]).logits[0].double().log_softmax(-1)
        expected += [log_pi[5 + at - 1, own[at]] for at in range(2, len(own))]
    assert torch.allclose(found.double(), torch.stack(expected), atol=1e-5)


def test_modes_and_gradients_are_left_as_they_were() -> None:
    reader, batch = reader_of(LLAMA), batch_of(3, 6, 5, 2)
    part = reader.model.model.layers[0]
    part.eval()
    found = reader.read(batch, False, True)
    assert reader.model.training and not part.training and not found.requires_grad
    assert torch.is_grad_enabled()


def test_gradient_checkpointing_does_not_take_the_cache_away() -> None:
    reader, batch = reader_of(LLAMA, gradient_checkpointing=True), batch_of(3, 6, 5, 2)
    reader.settle([batch])
    assert reader.once is True


def test_with_nothing_in_front_answers_stand_alone() -> None:
    reader, batch = reader_of(LLAMA), batch_of(3, 6, 0, 0)
    reader.settle([batch])
    assert reader.alone is True and reader.once is True and len(reader(batch))


def test_what_is_known_is_not_asked_again() -> None:
    reader, batch = reader_of(LLAMA), batch_of(3, 6, 5, 2)
    reader.alone = False
    reader.settle([batch])
    assert reader.alone is False
    other = reader_of(LLAMA)
    other.settle([batch], agreed=lambda verdict: False)
    assert other.alone is False and other.once is False, "another rank has said so"


def test_a_batch_without_labels_is_read() -> None:
    reader, batch = reader_of(LLAMA), batch_of(3, 6, 5, 2)
    batch["unprompted_labels"] = torch.full_like(batch["unprompted_labels"], -100)
    assert reader.read(batch, False, True).shape == (0,)
