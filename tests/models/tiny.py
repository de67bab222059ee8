"""Tiny models of many families, and what their tests measure with: nothing here comes from the code under test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from deft_lightning.models import LoRA, describe, from_architecture
from deft_lightning.objectives import DEFT
from deft_lightning.training.module import SFTModule

VOCAB = 61
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {"model_type": "llama", **TINY}
# The options that make a kind tiny, or that turn on what its head does beside the product.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 4},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 8},
    "phi3": {"num_key_value_heads": 1},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {},
    "granite": {"num_key_value_heads": 1, "logits_scaling": 3.0},
    "cohere": {"num_key_value_heads": 1, "logit_scale": 0.25},
    "olmo2": {"num_key_value_heads": 1},
}
# What the sizes are called in all the other kinds; a kind takes those that its config has.
SIZES: dict[str, Any] = {
    **TINY,
    "num_key_value_heads": 2, "head_dim": 8, "num_heads": 2, "n_heads": 2, "n_head": 2, "num_attention_groups": 2,
    "num_layers": 1, "n_layers": 1, "n_layer": 1, "d_model": 16, "n_embd": 16, "n_positions": 64, "ffn_dim": 24,
    "word_embed_proj_dim": 16, "rotary_dim": 4, "state_size": 8, "time_step_rank": 4, "n_groups": 1,
    "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCAB,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_d_state": 8, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_n_groups": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "hidden_dropout": 0.0, "resid_dropout": 0.0, "embd_dropout": 0.0,
    "embedding_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "residual_dropout": 0.0, "router_jitter_noise": 0.0,
}  # fmt: skip


def architecture(kind: str, **more: Any) -> dict[str, Any]:
    """Options of a tiny model of a kind in ARCHITECTURES, or of any other that knows the usual names."""
    if kind in ARCHITECTURES:
        options = {"model_type": kind, **TINY, **ARCHITECTURES[kind], **more}
        if kind == "gpt2":
            del options["intermediate_size"]  # its own name is n_inner, four times the width by default
        return options
    config = AutoConfig.for_model(kind)
    options = {name: value for name, value in SIZES.items() if name in config.to_dict() or name in config.attribute_map}
    for alias, name in config.attribute_map.items():
        if alias in options and name in options:
            del options[alias]
    return {"model_type": kind, **options, **more}


def build(options: dict[str, Any], seed: int = 0, dtype: Any = "float32") -> Any:
    torch.manual_seed(seed)
    model = from_architecture(options, None, dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # a bias of zero would hide that nobody adds it
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def prepare(options: dict[str, Any], **settings: Any) -> SFTModule:
    torch.manual_seed(0)
    module = SFTModule(DEFT(), architecture=options, **settings)
    module.configure_model()
    return module


def move_adapters(model: nn.Module, seed: int = 0, std: float = 0.3) -> Any:
    """Move low-rank adapters away from zero, where they start."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            parameter.data = std * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def deft_by_hand(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed DEFT loss (1 - p^C) / C from dense logits, C detached."""
    log_pi = torch.log_softmax(logits, dim=-1)
    collision = log_pi.detach().exp().square().sum(-1)
    log_prob = log_pi.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return ((1 - (collision * log_prob).exp()) / collision).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Each gradient by its own largest entry, or by a thousandth of the largest of all where that is more."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    scale = max(float(grad.abs().max()) for grad in wanted.values())
    assert scale > 0
    worst = {
        name: float((found[name] - grad).abs().max()) / max(float(grad.abs().max()), 1e-3 * scale)
        for name, grad in wanted.items()
    }
    assert all(share <= tolerance for share in worst.values()), {k: v for k, v in worst.items() if not v <= tolerance}


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def checkpoint_of(model: Any, tokenizer: Any | None, lora: LoRA | None, path: Path) -> Path:
    """A checkpoint as the module writes it."""
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "deft_lightning": describe(model, tokenizer, lora, [1, 4])}, path)
    return path


def one_line(error: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text
