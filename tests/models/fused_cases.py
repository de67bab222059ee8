"""Models, batches and comparisons that the tests of the fused head share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import (
    LoraConfig,
    get_peft_model,
)
from tiny import (
    LLAMA,
    VOCAB,
    architecture,
    assert_same_gradients,
    build,
    deft_by_hand,
    gradients,
    move_adapters,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from deft_lightning import SFTModule
from deft_lightning.models import base_causal_lm, find_head, fused_forward
from deft_lightning.objectives import DEFT, Objective

DENSE = "use --model.head dense"
TRANSFORMERS = Version(transformers.__version__)
# What older versions of transformers lack: the family, a config of one layer, or the router's loss of a mixture.
SINCE = {
    "granitemoe": "5.18", "granitemoeshared": "5.18", "internlm3": "5.20", "jetmoe": "5.20",
    "modernbert-decoder": "5.17",
}  # fmt: skip
LACKING = {kind for kind, version in SINCE.items() if Version(version) > TRANSFORMERS}
# Families beside ARCHITECTURES: the options that a generic tiny config of them needs, and heads that do more.
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"n_embd": 32, "n_head": 4},
    "cohere2": {"logit_scale": 0.25},
    "cwm": {},
    "diffllama": {},
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {},
    "falcon_h1": {"mamba_d_ssm": 16, "mamba_d_head": 8},
    "gemma": {},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention"],
        "activation_sparsity_pattern": [0.0],
        "final_logit_softcapping": 2.0,
    },
    "gemma4_text": {"final_logit_softcapping": 2.0},
    "glm": {},
    "glm4": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global"], 1]]},
    "gptj": {},
    "granite_swa": {"logits_scaling": 3.0},
    "helium": {},
    "hunyuan_v1_dense": {},
    "internlm3": {},
    "jais2": {},
    "lfm2": {"layer_types": ["full_attention"]},
    "mamba": {},
    "mamba2": {"num_heads": 4, "chunk_size": 4},
    "ministral": {},
    "ministral3": {},
    "modernbert-decoder": {"layer_types": ["full_attention"]},
    "mpt": {},
    "nanochat": {"final_logit_softcapping": 2.0},
    "nemotron": {},
    "olmo": {},
    "olmo3": {},
    "openai-gpt": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "qwen3_5_text": {"layer_types": ["full_attention"]},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {"final_logit_softcapping": 2.0},
}
# Mixtures of experts that transformers computes a router loss for.
MIXTURES: dict[str, dict[str, Any]] = {
    "ernie4_5_moe": {"moe_layer_start_index": 0},
    "flex_olmo": {},
    "gpt_oss": {"layer_types": ["full_attention"]},
    "granitemoe": {"logits_scaling": 3.0},
    "granitemoeshared": {"logits_scaling": 3.0},
    "jamba": {"attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0},
    "jetmoe": {"kv_channels": 8},
    "minimax": {"layer_types": ["full_attention"]},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {"lm_head_bias": True},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {"layer_types": ["full_attention"]},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": ["full_attention"]},
}
# Mixtures that are balanced without one.
QUIET_MIXTURES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"head_dim": 4},
    "deepseek_v3": {"head_dim": 4},
    "dots1": {},
    "glm4_moe": {},
    "hunyuan_v1_moe": {},
    "lfm2_moe": {"layer_types": ["full_attention"], "num_dense_layers": 0},
    "llama4_text": {},
}
BIASED = {"codegen", "gptj", "modernbert-decoder", "phi", "phimoe"}
SOFTCAPPED = {"gemma2", "gemma3n_text", "gemma4_text", "nanochat", "vaultgemma"}
SCALED = {"granite": 1 / 3, "cohere": 0.25, "cohere2": 0.25, "granite_swa": 1 / 3, "granitemoe": 1 / 3}


def options_of(kind: str, **more: Any) -> dict[str, Any]:
    known = {**FAMILIES, **MIXTURES, **QUIET_MIXTURES}
    return architecture(kind, **{**known.get(kind, {}), **more})


def to_double(model: Any) -> Any:
    """Float64; grouped products of experts know no float64, the plain loop over experts does."""
    causal = base_causal_lm(model)
    if causal._can_set_experts_implementation():
        causal.set_experts_implementation("eager")
    return model.double()


def tokens(rows: int = 2, length: int = 17, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens, and targets at scattered positions that have nothing to do with them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    targets = torch.randint(3, VOCAB, (rows, length), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = -100
    return ids, targets


def fused(model: Any, ids: Tensor, targets: Tensor, objective: Objective = DEFT()) -> Any:  # noqa: B008 - frozen
    return fused_forward(model, find_head(model), {"input_ids": ids, "use_cache": False}, targets, objective)


def supervised(model: Any, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own logits of the supervised positions, row after row, and their targets."""
    logits = model(input_ids=ids, use_cache=False).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits[targets != -100], targets[targets != -100]


def statistics_by_hand(logits: Tensor, targets: Tensor) -> list[Tensor]:
    log_pi = torch.log_softmax(logits, dim=-1)
    pi = log_pi.exp()
    log_prob = log_pi.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return [log_prob, pi.square().sum(-1), -(pi * log_pi).sum(-1), logits.argmax(-1) == targets]


def assert_fused_is_dense(model: Any, tolerance: float = 2e-6, gradient: bool = True) -> dict[str, Tensor]:
    """Loss, statistics and every gradient against the model's own logits, with and without a graph."""
    ids, targets = tokens()
    model.zero_grad()
    logits, wanted_targets = supervised(model, ids, targets)
    wanted = deft_by_hand(logits, wanted_targets)
    expected: dict[str, Tensor] = {}
    if gradient:
        wanted.backward()
        expected = gradients(model)
    found = fused(model, ids, targets)
    assert found.loss.item() == pytest.approx(wanted.item(), rel=tolerance)
    for field, by_hand in zip(found.stats, statistics_by_hand(logits.detach(), wanted_targets), strict=False):
        assert not field.requires_grad
        # Some families widen their logits to float32 whatever the dtype of the weights.
        torch.testing.assert_close(field, by_hand.to(field.dtype), rtol=10 * tolerance, atol=10 * tolerance)
    if gradient:
        found.loss.backward()
        assert_same_gradients(gradients(model), expected, tolerance)
    with torch.no_grad():  # evaluation takes another way through the head
        assert fused(model, ids, targets).loss.item() == pytest.approx(wanted.item(), rel=tolerance)
    return expected


COEFFICIENT = 0.5  # transformers' own 0.001 would leave the gradient of the router loss in the rounding


def mixture(kind: str, routed: bool = True, **more: Any) -> dict[str, Any]:
    name = "aux_loss_coef" if kind == "jetmoe" else "router_aux_loss_coef"
    return options_of(kind, output_router_logits=routed, **{name: COEFFICIENT}, **more)


def loader(batches: list[dict[str, Tensor]]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def uneven_batches() -> list[dict[str, Tensor]]:
    """Six right-padded micro-batches with from 3 to 17 supervised tokens."""
    found = []
    for seed in range(6):
        ids, labels = tokens(2, 12, seed=30 + seed)
        labels[:, : 2 + seed] = -100
        lengths = torch.tensor([[12], [11 - seed // 2]])
        mask = (lengths > torch.arange(12)).long()
        found.append(
            {
                "input_ids": ids.masked_fill(mask == 0, 0),
                "labels": labels.masked_fill(mask == 0, -100),
                "attention_mask": mask,
            }
        )
    return found


def adapted(tied: bool = False, *, dtype: Any = "float32", seed: int = 0, model: Any = None, **settings: Any) -> Any:
    """A tiny Llama with adapters of peft on attention and head that have moved away from zero."""
    model = build({**LLAMA, "tie_word_embeddings": tied, **(model or {})}, seed, dtype)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM", **settings}
    )
    return move_adapters(get_peft_model(model, config), seed)


def head_of(model: Any) -> Any:
    return base_causal_lm(model).get_output_embeddings()


def lent_forwards(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def trained(module: SFTModule, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    loss = module.loss_and_stats(batch)[0]
    loss.backward()
    return loss.item(), gradients(module.model)
