"""Hugging Face causal language models: build, load, adapt, read the head, export."""

from deft_lightning.models.adapters import adapter_folder
from deft_lightning.models.base import BASE
from deft_lightning.models.checkpoint import (
    check_shapes,
    check_state,
    describe,
    is_complete,
    load_checkpoint,
    model_from_checkpoint,
    read_checkpoint,
    tokenizer_from_checkpoint,
    vocabulary_digest,
)
from deft_lightning.models.checks import check_causal, check_head, check_packing
from deft_lightning.models.export import save_hugging_face
from deft_lightning.models.fused import FusedOutput, fused_forward
from deft_lightning.models.head import HeadSeam, base_causal_lm, find_head, router_loss_factor
from deft_lightning.models.load import check_fits, check_pretrained, compile_body, from_architecture, load_pretrained
from deft_lightning.models.lora import LoRA, add_adapters, lora_of
from deft_lightning.models.reference import Reference, make_reference
from deft_lightning.models.shard import (
    Sharding,
    build_sharded,
    gathered,
    is_sharded,
    layers_of,
    shapes_of,
    sharded_copy,
)
from deft_lightning.models.vocabulary import fit_vocabulary

__all__ = [
    "BASE",
    "FusedOutput",
    "HeadSeam",
    "LoRA",
    "Reference",
    "Sharding",
    "adapter_folder",
    "add_adapters",
    "base_causal_lm",
    "build_sharded",
    "check_causal",
    "check_fits",
    "check_head",
    "check_packing",
    "check_pretrained",
    "check_shapes",
    "check_state",
    "compile_body",
    "describe",
    "find_head",
    "fit_vocabulary",
    "from_architecture",
    "fused_forward",
    "gathered",
    "is_complete",
    "is_sharded",
    "layers_of",
    "load_checkpoint",
    "load_pretrained",
    "lora_of",
    "make_reference",
    "model_from_checkpoint",
    "read_checkpoint",
    "router_loss_factor",
    "save_hugging_face",
    "shapes_of",
    "sharded_copy",
    "tokenizer_from_checkpoint",
    "vocabulary_digest",
]
