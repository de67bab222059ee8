"""A Llama with random weights, small enough for a test, and a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from deft_lightning.data.encoding.tokenizer import build_tokenizer


def tiny_llama(spread: float, seed: int = 0, **shape: Any) -> tuple[Any, Any]:
    """Return model and tokenizer.

    Args:
        spread: Standard deviation of the weights: the larger, the surer is the model, of anything.
        seed: Of the weights.
        shape: Options of the config that differ from two layers of 16, two heads and 128 positions.
    """
    tokenizer = build_tokenizer(["hello"], 0)
    torch.manual_seed(seed)
    options = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 128, **shape,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tokenizer), initializer_range=spread, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, **options,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config), tokenizer


def save_tiny_llama(folder: Path, spread: float, **shape: Any) -> str:
    """Write both as a Hugging Face folder and return its path."""
    for part in tiny_llama(spread, **shape):
        part.save_pretrained(folder)
    return str(folder)
