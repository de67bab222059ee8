"""Hugging Face causal language models: build, load, adapt, read the head, export."""

from deft_lightning.models.build import check_fits, check_pretrained, from_architecture, load_pretrained
from deft_lightning.models.export import (
    check_state,
    describe,
    load_checkpoint,
    model_from_checkpoint,
    save_hugging_face,
    tokenizer_from_checkpoint,
    vocabulary_digest,
)
from deft_lightning.models.head import HeadSeam, check_causal, check_head, find_head
from deft_lightning.models.lora import LoRA, add_adapters

__all__ = [
    "HeadSeam",
    "LoRA",
    "add_adapters",
    "check_causal",
    "check_fits",
    "check_head",
    "check_pretrained",
    "check_state",
    "describe",
    "find_head",
    "from_architecture",
    "load_checkpoint",
    "load_pretrained",
    "model_from_checkpoint",
    "save_hugging_face",
    "tokenizer_from_checkpoint",
    "vocabulary_digest",
]
