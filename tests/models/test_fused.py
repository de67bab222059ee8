"""The fused head inside real models: what it computes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import csv
import json
import shutil
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
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
    move_adapters,
    one_line,
    prepare,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from deft_lightning import SFTModule, Trainer
from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.models import (
    LoRA,
    add_adapters,
    base_causal_lm,
    check_causal,
    check_head,
    find_head,
    from_architecture,
    fused_forward,
    load_checkpoint,
    model_from_checkpoint,
    router_loss_factor,
    save_hugging_face,
)
from deft_lightning.objectives import DEFT, EAFT, Cayley, Objective
from deft_lightning.ops.torch_rows import TorchRows

DENSE = "use --model.head dense"
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


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Two right-padded rows with scattered labels."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
    labels = ids.clone()
    labels[:, :2] = labels[0, 6] = labels[1, 6:] = -100
    ids[1, 6:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": (torch.tensor([[9], [6]]) > torch.arange(9)).long()}


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


# --- families -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FAMILIES, *QUIET_MIXTURES])
def test_of_many_families_fused_loss_statistics_and_every_gradient_equal_the_dense_ones(kind: str) -> None:
    model = build(options_of(kind))
    ids, _ = tokens()
    check_causal(model, ids)
    check_head(model, find_head(model), ids, DEFT())
    found = assert_fused_is_dense(to_double(model))
    seam = find_head(model)
    assert seam.projection.weight.grad is None and found
    assert (seam.projection.bias is not None) == (kind in BIASED)
    assert (seam.softcap == 2.0) == (kind in SOFTCAPPED)
    assert seam.logit_scale == pytest.approx(SCALED.get(kind, 1.0))


@pytest.mark.parametrize("kind", ["phi", "gptj", "codegen", "phimoe"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_bias_of_a_head_is_added_and_trained_tied_or_not(kind: str, tied: bool) -> None:
    model = to_double(build(options_of(kind, tie_word_embeddings=tied)))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) is tied
    found = assert_fused_is_dense(model)
    assert float(found["lm_head.bias"].abs().max()) > 0.1
    ids, targets = tokens()
    with torch.no_grad():
        before = fused(model, ids, targets).loss.item()
        head.bias.zero_()
        assert abs(fused(model, ids, targets).loss.item() - before) > 0.1, "the bias is not small"


@pytest.mark.parametrize("kind", ["gemma2", "gemma3n_text", "nanochat", "granite", "cohere", "cohere2"])
@pytest.mark.parametrize("tied", [True, False])
def test_softcapping_and_scale_tied_or_not(kind: str, tied: bool) -> None:
    model = to_double(build(options_of(kind, tie_word_embeddings=tied)))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert_fused_is_dense(model)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("falcon_h1", {"lm_head_multiplier": 0.5}),
        ("hyperclovax", {"logits_scaling": 3.0}),  # multiplies where Granite divides
        ("minicpm3", {}),  # divides the hidden states
        ("mpt", {"logit_scale": 0.5}),  # has the option and ignores it
        ("recurrent_gemma", {}),  # caps under another name
        ("prophetnet", {}),  # predicts several tokens a position
    ],
)
def test_a_family_whose_head_does_something_else_is_refused(kind: str, more: dict[str, Any]) -> None:
    model = build(options_of(kind, **more))
    with pytest.raises(UserError) as caught:
        check_head(model, find_head(model), tokens()[0], DEFT())
    one_line(caught, DENSE)


@pytest.mark.parametrize("objective", [EAFT(k=5), Cayley(floor=0.5)], ids=repr)
def test_objectives_that_ask_for_more_get_it_with_and_without_a_graph(objective: Objective) -> None:
    model = build(options_of("gemma2")).double()
    ids, targets = tokens()
    logits, wanted_targets = supervised(model, ids, targets)
    log_prob, collision, entropy, correct = statistics_by_hand(logits, wanted_targets)
    top = logits.topk(5, dim=-1).values.softmax(-1)
    stats = TokenStats(log_prob, *(t.detach() for t in (collision, entropy, correct, -(top * top.log()).sum(-1))))
    wanted = objective(stats).sum()
    wanted.backward()
    expected = gradients(model)
    found = fused(model, ids, targets, objective)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-9)
    assert_same_gradients(gradients(model), expected, 1e-9)
    with torch.no_grad():
        assert fused(model, ids, targets, objective).loss.item() == pytest.approx(wanted.item(), rel=1e-9)


# --- mixtures of experts --------------------------------------------------------------------------------------------


COEFFICIENT = 0.5  # transformers' own 0.001 would leave the gradient of the router loss in the rounding


def mixture(kind: str, routed: bool = True, **more: Any) -> dict[str, Any]:
    name = "aux_loss_coef" if kind == "jetmoe" else "router_aux_loss_coef"
    return options_of(kind, output_router_logits=routed, **{name: COEFFICIENT}, **more)


def padded(batch: dict[str, Tensor], columns: int) -> dict[str, Tensor]:
    """The same batch with more right padding."""
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {name: nn.functional.pad(value, (0, columns), value=fill[name]) for name, value in batch.items()}


def routed_by_hand(model: Any, batch: dict[str, Tensor], coefficient: float) -> Tensor:
    """DEFT and the router loss for each supervised token, from the model's own output."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"))
    targets = batch["labels"][:, 1:]
    keep = targets != -100
    loss = deft_by_hand(output.logits[:, :-1][keep], targets[keep])
    return loss + coefficient * int(keep.sum()) * output.aux_loss if coefficient else loss


@pytest.mark.parametrize("head", ["fused", "dense"])
@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_trains_by_its_objective_and_its_router_loss(
    kind: str, routed: bool, head: Any, batch: dict[str, Tensor]
) -> None:
    module = prepare(mixture(kind, routed), head=head)
    module.loss_and_stats(batch)  # checks the head, in float32
    to_double(module.model)
    wanted = routed_by_hand(module.model, batch, COEFFICIENT if routed else 0.0)
    wanted.backward()
    expected = gradients(module.model)
    loss, stats, keep = module.loss_and_stats(batch)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert len(stats.log_prob) == int(keep.sum())
    loss.backward()
    assert_same_gradients(gradients(module.model), expected, 2e-6)


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_factor_of_the_router_loss_is_the_one_transformers_applies_to_labels(
    kind: str, batch: dict[str, Tensor]
) -> None:
    model = to_double(build(mixture(kind)))
    output = model(**batch)
    logits, targets = output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    added = output.loss - nn.functional.cross_entropy(logits, targets, ignore_index=-100)
    assert float(output.aux_loss) > 1
    assert added.item() == pytest.approx(COEFFICIENT * output.aux_loss.item(), rel=1e-5)
    assert router_loss_factor(model) == COEFFICIENT
    assert router_loss_factor(build(mixture(kind, routed=False))) is None
    assert router_loss_factor(add_adapters(model, LoRA(r=2, target_modules=["lm_head"]))) == COEFFICIENT


@pytest.mark.parametrize("head", ["fused", "dense"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_the_router_loss_leaves_padding_out_where_there_is_a_mask(
    kind: str, head: Any, batch: dict[str, Tensor]
) -> None:
    module = prepare(mixture(kind), head=head)
    loss = module.loss_and_stats(batch)[0].item()
    assert module.loss_and_stats(padded(batch, 5))[0].item() == pytest.approx(loss, rel=1e-5)
    del batch["attention_mask"]  # of a loader of the user's own: every position counts, as in transformers
    every = module.loss_and_stats(batch)[0].item()
    assert every == pytest.approx(routed_by_hand(module.model, batch, COEFFICIENT).item(), rel=1e-5)
    assert abs(every - loss) > 1e-3, "the padding would have been noticed"


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_grouped_experts_in_float32_give_the_same_as_dense(kind: str, batch: dict[str, Tensor]) -> None:
    found = []
    for head in ("fused", "dense"):
        module = prepare(mixture(kind), head=head)
        assert module.model.config._experts_implementation != "eager"
        loss = module.loss_and_stats(batch)[0]
        loss.backward()
        found.append((loss.item(), gradients(module.model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert_same_gradients(found[0][1], found[1][1], 1e-4)


@pytest.mark.parametrize("head", ["fused", "dense"])
@pytest.mark.parametrize("kind", ["llama4_text", "deepseek_v3", "glm4_moe"])
def test_a_mixture_without_the_router_loss_its_config_asks_for_is_refused(
    kind: str, head: Any, batch: dict[str, Tensor]
) -> None:
    with pytest.raises(UserError) as caught:
        prepare(options_of(kind, output_router_logits=True), head=head).loss_and_stats(batch)
    one_line(caught, "ForCausalLM", "no auxiliary loss", "--model.architecture.output_router_logits")


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def constant(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def trainer_in(root: Path, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", devices=1, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1, default_root_dir=str(root),
        **{"logger": False, "max_epochs": 1, **options},
    )  # fmt: skip


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


@pytest.mark.parametrize("lora", [None, LoRA(r=2, target_modules=["q_proj", "lm_head"])], ids=["full", "lora"])
def test_three_steps_of_a_mixture_follow_both_losses_and_log_the_routers(lora: LoRA | None, tmp_path: Path) -> None:
    """Both heads against SGD by hand on the mean over the tokens of two micro-batches."""
    from lightning.pytorch.loggers import CSVLogger

    batches, trained, logged = uneven_batches(), [], []
    for head in ("fused", "dense"):
        module = prepare(mixture("mixtral"), head=head, lora=lora, optimizer=sgd, scheduler=constant)
        move_adapters(module.model)
        start = copy.deepcopy(module.model)
        logger = CSVLogger(str(tmp_path), name=head)
        trainer_in(tmp_path, logger=logger, accumulate_grad_batches=2).fit(module, loader(batches))
        trained.append({name: p.detach() for name, p in module.model.named_parameters() if p.requires_grad})
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            logged.append([float(row["train/router_loss"]) for row in csv.DictReader(file) if row["train/router_loss"]])
    by_hand = []
    for first in (0, 2, 4):
        total, weighted, count = 0.0, 0.0, 0
        for micro in batches[first : first + 2]:
            n = int((micro["labels"][:, 1:] != -100).sum())
            loss = routed_by_hand(start, micro, COEFFICIENT)
            loss.backward()
            with torch.no_grad():
                plain = routed_by_hand(start, micro, 0.0)
            total, count = total + float(loss), count + n
            weighted += float(loss.detach() - plain) / COEFFICIENT
        by_hand.append(weighted / count)
        with torch.no_grad():
            for parameter in start.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad / count
        start.zero_grad()
    for values in logged:
        assert values == pytest.approx(by_hand, rel=1e-4)
    initial = dict(prepare(mixture("mixtral"), lora=lora).model.named_parameters())
    for name, parameter in start.named_parameters():
        if parameter.requires_grad:
            moved = float((parameter - initial[name]).abs().max())
            for weights in trained:
                assert float((weights[name] - parameter).abs().max()) <= 1e-3 * moved + 1e-7, name
    assert_same_gradients(trained[0], trained[1], 1e-5)


# --- LoRA on the head -----------------------------------------------------------------------------------------------


def adapted(tied: bool = False, *, dtype: Any = "float32", seed: int = 0, model: Any = None, **settings: Any) -> Any:
    """A tiny Llama with adapters of peft on attention and head that have moved away from zero."""
    model = build({**LLAMA, "tie_word_embeddings": tied, **(model or {})}, seed, dtype)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM", **settings}
    )
    return move_adapters(get_peft_model(model, config), seed)


def head_of(model: Any) -> Any:
    return base_causal_lm(model).get_output_embeddings()


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


# --- export of adapted heads ----------------------------------------------------------------------------------------


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


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


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_head_with_adapters_goes_from_its_checkpoint_to_a_folder(tied: bool, tmp_path: Path) -> None:
    lora = LoRA(r=4, target_modules=["q_proj", "lm_head"])
    module = prepare({**LLAMA, "tie_word_embeddings": tied}, lora=lora, optimizer=sgd, scheduler=constant)
    trainer = trainer_in(tmp_path, max_epochs=3)
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


# --- the model outside the call -------------------------------------------------------------------------------------


def lent_forwards(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def generated(model: Any, ids: Tensor) -> list[list[int]]:
    training = model.training
    model.eval()
    mask = torch.ones_like(ids)
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=True)
    model.train(training)
    return found.tolist()


class Broken(RuntimeError):
    pass


def broken(*_: Any) -> Any:
    raise Broken


@pytest.mark.parametrize(
    "make", [partial(build, LLAMA), partial(build, options_of("gemma2")), adapted], ids=["llama", "gemma2", "lora"]
)
def test_logits_and_generation_are_real_before_after_and_after_an_error(make: Callable[[], Any]) -> None:
    model = make()
    untouched = copy.deepcopy(model)
    ids, targets = tokens()
    expected, words = untouched(input_ids=ids).logits, generated(untouched, ids[:, :5])
    assert expected.shape == (2, 17, VOCAB)

    def assert_real() -> None:
        assert not lent_forwards(model)
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert generated(model, ids[:, :5]) == words

    fused(model, ids, targets).loss.backward()
    assert_real()
    with pytest.raises(Broken):
        fused(model, ids, targets, broken)
    assert_real()
    handle = base_causal_lm(model).model.norm.register_forward_hook(broken)  # before the head is reached
    with pytest.raises(Broken):
        fused(model, ids, targets)
    handle.remove()
    assert_real()
    with torch.no_grad():
        fused(model, ids, targets)
    assert_real()


def test_hooks_on_the_head_run_and_what_they_do_to_the_hidden_states_counts() -> None:
    model, seen = build(LLAMA).double(), []

    def double(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        seen.append("pre")
        return (2 * args[0],)

    handles = [
        model.lm_head.register_forward_pre_hook(double),
        model.lm_head.register_forward_hook(lambda module, args, output: seen.append("post")),
        model.register_forward_hook(lambda module, args, output: seen.append("model")),
        model.model.register_forward_hook(lambda module, args, output: seen.append("body")),
    ]
    assert_fused_is_dense(model)
    assert seen == ["body", "pre", "post", "model"] * 3, "dense, fused, and fused without a graph"
    ids, targets = tokens()
    hooked = fused(model, ids, targets).loss.item()
    for handle in handles:
        handle.remove()
    assert abs(fused(model, ids, targets).loss.item() - hooked) > 0.1


def test_hooks_that_accelerate_hangs_on_a_forward_run_and_are_still_there() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counts(ModelHook):
        count = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return args, kwargs

    model, counts = build(LLAMA).double(), Counts()
    add_hook_to_module(model, counts)
    add_hook_to_module(model.lm_head, Counts())
    before = {name: module.__dict__["forward"] for name, module in model.named_modules() if name in ("", "lm_head")}
    assert lent_forwards(model) == ["", "lm_head"]
    assert_fused_is_dense(model)
    assert counts.count == 3
    for name, forward in before.items():
        assert model.get_submodule(name).__dict__["forward"] is forward
    with pytest.raises(Broken):
        fused(model, *tokens(), broken)
    assert all(model.get_submodule(name).__dict__["forward"] is forward for name, forward in before.items())


class Odd(LlamaForCausalLM):
    """A Llama whose forward turns hidden states into logits in a way of its own."""

    way: Callable[[Any, Tensor], Tensor]

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutput:  # type: ignore[override]
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return CausalLMOutput(logits=type(self).way(self, hidden))


def odd(way: Callable[[Any, Tensor], Tensor]) -> Any:
    torch.manual_seed(0)
    model = type("OddForCausalLM", (Odd,), {"way": way})(LlamaConfig(**TINY))
    return model.train()


def suppressed(self: Any, hidden: Tensor) -> Tensor:
    logits = self.lm_head(hidden)
    logits[..., 5] = -torch.inf
    return logits


WRONG_CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "twice": lambda self, hidden: self.lm_head(hidden) + self.lm_head(hidden.detach()),
    "not at all": lambda self, hidden: nn.functional.linear(hidden, self.lm_head.weight),
    "a slice": lambda self, hidden: nn.functional.pad(self.lm_head(hidden[:, 1:]), (0, 0, 1, 0)),
    "the last position": lambda self, hidden: self.lm_head(hidden[:, -1:]).expand(-1, hidden.shape[1], -1),
    "flat": lambda self, hidden: self.lm_head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]),
    "transposed": lambda self, hidden: self.lm_head(hidden.transpose(0, 1)).transpose(0, 1),
}


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_a_model_that_runs_its_head_otherwise_is_refused(call: str) -> None:
    model = odd(WRONG_CALLS[call])
    ids, targets = tokens()
    with pytest.raises(UserError) as caught:
        fused(model, ids, targets)
    one_line(caught, DENSE, "OddForCausalLM", "head")
    assert not lent_forwards(model)
    assert model(ids).logits.shape == (2, 17, VOCAB)


@pytest.mark.parametrize("call", ["twice", "not at all", "a slice"])
def test_the_check_of_the_first_batch_names_the_way_out_of_a_head_run_otherwise(call: str) -> None:
    model = odd(WRONG_CALLS[call])
    with pytest.raises(UserError) as caught:
        check_head(model, find_head(model), tokens()[0], DEFT())
    one_line(caught, DENSE, "OddForCausalLM")


def test_an_odd_model_that_runs_its_head_once_is_none_of_these() -> None:
    """Shows that the models above are refused for their calls."""
    model = odd(lambda self, hidden: self.lm_head(hidden))
    check_head(model, find_head(model), tokens()[0], DEFT())
    assert_fused_is_dense(model.double())


@pytest.mark.parametrize(
    "way",
    [
        suppressed,
        lambda self, hidden: self.lm_head(hidden) - self.lm_head.weight.new_ones(VOCAB),
        lambda self, hidden: self.lm_head(hidden)[..., torch.arange(VOCAB)],
        lambda self, hidden: self.lm_head(hidden).masked_fill(torch.arange(VOCAB) == 5, -1e4),
        lambda self, hidden: self.lm_head(hidden) / self.lm_head(hidden).max(),
        lambda self, hidden: (z := self.lm_head(hidden)) / z.abs().amax(-1, keepdim=True),
    ],
    ids=["suppressed", "shifted", "indexed", "filled", "twice", "normalised"],
)
def test_a_model_that_needs_its_logits_is_refused_on_the_first_batch(way: Any) -> None:
    """There are none while the fused head runs: whatever the model raises becomes one line."""
    model = odd(way)
    with pytest.raises(UserError) as caught:
        check_head(model, find_head(model), tokens()[0], DEFT())
    one_line(caught, DENSE, "OddForCausalLM")
    assert not lent_forwards(model) and model.training


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["fused", "dense"])
@pytest.mark.parametrize(
    ("options", "lora"),
    [
        (LLAMA, None),
        (options_of("gemma2"), None),
        (options_of("phi"), None),
        (mixture("mixtral"), None),
        (LLAMA, LoRA(r=2, target_modules=["q_proj", "lm_head"])),
    ],
    ids=["llama", "gemma2", "phi", "mixtral", "lora"],
)
def test_a_batch_without_supervised_tokens_is_a_zero_that_reaches_every_parameter(
    options: dict[str, Any], lora: LoRA | None, head: Any, batch: dict[str, Tensor]
) -> None:
    module = prepare(options, head=head, lora=lora)
    module.loss_and_stats(batch)[0].backward()
    reached = gradients(module.model).keys()
    loss, stats, keep = module.loss_and_stats({**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert loss.item() == 0 and loss.requires_grad
    assert len(stats.log_prob) == 0 and not keep.any()
    loss.backward()
    found = gradients(module.model)
    assert found.keys() == reached and reached
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in found.values())


@pytest.mark.parametrize("head", ["fused", "dense"])
def test_statistics_come_in_the_order_of_the_batch(head: Any, batch: dict[str, Tensor]) -> None:
    module = prepare(LLAMA, head=head)
    _, stats, keep = module.loss_and_stats(batch)
    logits = module.model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    places = [(row, t) for row in range(2) for t in range(8) if batch["labels"][row, t + 1] != -100]
    assert keep.nonzero().tolist() == [list(place) for place in places]
    by_hand = [float(logits[row, t, batch["labels"][row, t + 1]]) for row, t in places]
    assert stats.log_prob.tolist() == pytest.approx(by_hand, rel=1e-5)
    assert len(set(by_hand)) == len(by_hand)


# --- precision ------------------------------------------------------------------------------------------------------


def all_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Distance of all gradients together, as a share of their length."""
    assert found.keys() == wanted.keys()
    gap = sum(float((found[name].double() - value).square().sum()) for name, value in wanted.items())
    return (gap / sum(float(value.square().sum()) for value in wanted.values())) ** 0.5


def small(kind: str) -> dict[str, Any]:
    more = {"vocab_size": 401, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.1}
    return options_of(kind, tie_word_embeddings=False, **more)


@pytest.mark.parametrize("mode", ["bf16 weights", "autocast"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi", "granite", "lora", "lora in bf16"])
def test_in_bfloat16_gradients_are_as_close_to_float64_as_the_dense_ones(kind: str, mode: str) -> None:
    def make(dtype: str) -> Any:
        if not kind.startswith("lora"):
            return build(small(kind), dtype=dtype)
        model = build(small("llama"), dtype=dtype)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        return move_adapters(get_peft_model(model, config, autocast_adapter_dtype=kind == "lora"), std=0.1)

    low = mode == "bf16 weights"
    if kind == "lora in bf16" and not low:
        pytest.skip("the adapters have the dtype of the weights there")
    model = make("bfloat16" if low else "float32")
    exact = make("bfloat16").double() if low else make("float32").double()  # the very weights the other has
    ids, targets = tokens(4, 33)
    deft_by_hand(*supervised(exact, ids, targets)).backward()
    wanted = gradients(exact)

    def cast() -> AbstractContextManager[Any]:
        return nullcontext() if low else torch.autocast("cpu", torch.bfloat16)

    with cast():
        own = deft_by_hand(*supervised(model, ids, targets))
    own.backward()
    dense_error = all_gradients(gradients(model), wanted)
    with cast():
        loss = fused(model, ids, targets).loss
    assert loss.dtype == torch.float32
    loss.backward()
    found = gradients(model)
    assert {name: g.dtype for name, g in found.items()} == {
        name: p.dtype for name, p in model.named_parameters() if name in found
    }
    fused_error = all_gradients(found, wanted)
    assert 1e-3 < dense_error < 0.2
    assert fused_error <= 2 * dense_error, (fused_error, dense_error)
    assert loss.item() == pytest.approx(own.item(), rel=1e-2)


# --- checkpointed and compiled bodies -------------------------------------------------------------------------------


BODIES: dict[str, dict[str, Any]] = {
    "llama": {"architecture": {**LLAMA, "num_hidden_layers": 2}},
    "gemma2": {"architecture": options_of("gemma2", num_hidden_layers=2)},
    "gpt2": {"architecture": architecture("gpt2", num_hidden_layers=2)},
    "lora": {
        "architecture": {**LLAMA, "num_hidden_layers": 2},
        "lora": LoRA(r=4, target_modules=["q_proj", "lm_head"]),
    },
    "mixtral": {"architecture": mixture("mixtral", num_hidden_layers=2)},
}


def body(name: str, **settings: Any) -> SFTModule:
    options = BODIES[name]
    module = prepare(options["architecture"], lora=options.get("lora"), **settings)
    move_adapters(module.model)
    return module


def trained(module: SFTModule, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    loss = module.loss_and_stats(batch)[0]
    loss.backward()
    return loss.item(), gradients(module.model)


def assert_trains_the_same(module: SFTModule, name: str, batch: dict[str, Tensor], tolerance: float) -> None:
    loss, wanted = trained(body(name, head="dense"), batch)
    for _ in range(2):
        found_loss, found = trained(module, batch)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(found, wanted, tolerance)


@pytest.mark.parametrize("name", BODIES)
def test_a_checkpointed_body_is_recomputed_and_gives_the_same(name: str, batch: dict[str, Tensor]) -> None:
    module = body(name, gradient_checkpointing=True)
    calls: list[int] = []
    causal = base_causal_lm(module.model)
    stack = next(m for m in causal.base_model.modules() if isinstance(m, nn.ModuleList))
    first = next(m for n, m in stack[0].named_modules() if "norm" in n or "ln_" in n)
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    heads: list[int] = []
    head_of(module.model).register_forward_pre_hook(lambda *_: heads.append(1))
    module.loss_and_stats(batch)  # with the checks of the first batch
    calls.clear()
    heads.clear()
    module.loss_and_stats(batch)[0].backward()
    assert len(calls) == 2 and len(heads) == 1, "the body runs again in backward, the head does not"
    module.model.zero_grad()
    assert_trains_the_same(module, name, batch, 1e-4)


@pytest.fixture
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo and AOTAutograd without the minute that Inductor takes."""
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled(self, backend="aot_eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("eager_backend")
@pytest.mark.parametrize(
    ("name", "checkpointing"), [("llama", True), ("gemma2", False), ("gpt2", False), ("lora", False), ("mixtral", True)]
)
def test_compiled_layers_give_the_same(name: str, checkpointing: bool, batch: dict[str, Tensor]) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    module = body(name, compile=True, gradient_checkpointing=checkpointing)
    assert list(module.state_dict()) == list(body(name).state_dict())
    assert_trains_the_same(module, name, batch, 1e-4)
    assert counters["stats"]["unique_graphs"] > 0, "something was compiled"


@pytest.mark.usefixtures("eager_backend")
def test_a_compiled_model_is_copied_checkpointed_and_exported(tmp_path: Path, batch: dict[str, Tensor]) -> None:
    for name in ("llama", "lora"):
        module = body(name, compile=True, optimizer=sgd, scheduler=constant)
        trainer = trainer_in(tmp_path)
        trainer.fit(module, loader([batch]))
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        expected = logits_of(module.model, batch["input_ids"])
        copied = copy.deepcopy(module.model)
        torch.testing.assert_close(logits_of(copied, batch["input_ids"]), expected, rtol=1e-5, atol=1e-5)
        module.model.train()
        memory = save_hugging_face(module.model, None, [], tmp_path / f"{name} memory")
        file = trainer.export(ckpt_path=str(tmp_path / f"{name}.ckpt"), output=str(tmp_path / f"{name} file"))
        for folder in (memory, file):
            loaded = AutoModelForCausalLM.from_pretrained(folder)
            torch.testing.assert_close(logits_of(loaded, batch["input_ids"]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_layers_that_inductor_compiles_give_the_same(batch: dict[str, Tensor]) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    module = body("llama", compile=True)
    module.batch_loss.checked = True  # other shapes, which would be compiled too
    assert_trains_the_same(module, "llama", batch, 1e-4)
    assert counters["stats"]["unique_graphs"] == 1, "layers alike share one compilation"
    torch._dynamo.reset()


# --- the check of the first batch -----------------------------------------------------------------------------------


def changed(model: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The model with a change to its logits that nobody knows of."""
    forward = model.forward

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = types.MethodType(wrapped, model)
    return model


def faint() -> Any:
    """A Llama with the weights transformers starts from: its logits are around 0.1."""
    return build({**LLAMA, "initializer_range": 0.02})


@pytest.mark.parametrize(
    "change",
    [
        lambda z: 30 * torch.tanh(z / 30),
        lambda z: 100 * torch.tanh(z / 100),
        lambda z: z.clamp(-20, 20),
        lambda z: 1.02 * z,
        lambda z: z / 1.02,
        lambda z: z + 0.5 * torch.arange(z.shape[-1]).remainder(2) if z.shape[-1] else z,
        lambda z: z * (1 + 0.05 * torch.arange(z.shape[1]).remainder(2)[:, None]) if z.shape[-1] else z,
    ],
    ids=["softcap 30", "softcap 100", "clamp", "scale up", "scale down", "bias", "scale by position"],
)
@pytest.mark.parametrize("lora", [False, True])
def test_what_nobody_knows_of_is_found_whatever_the_weights(change: Any, lora: bool) -> None:
    ids, _ = tokens()
    model = faint()
    if lora:
        model = move_adapters(add_adapters(model, LoRA(r=4, target_modules=["q_proj", "lm_head"])), std=0.02)
    check_head(model, find_head(model), ids, DEFT())
    before = logits_of(model, ids)
    assert float(before.abs().max()) < 0.5
    changed(base_causal_lm(model), change)
    with pytest.raises(UserError) as caught:
        check_head(model, find_head(model), ids, DEFT())
    one_line(caught, DENSE, "LlamaForCausalLM", "logits")


def test_a_hidden_softcap_is_invisible_at_the_logits_themselves() -> None:
    """Why the check makes them larger."""
    ids, _ = tokens()
    before = logits_of(faint(), ids)
    after = logits_of(changed(faint(), lambda z: 30 * torch.tanh(z / 30)), ids)
    assert 0 < float((after - before).abs().max()) < 1e-4


@pytest.mark.parametrize(
    "make",
    [faint, partial(build, options_of("gemma2")), partial(build, options_of("phi")), adapted],
    ids=["llama", "gemma2", "phi", "lora"],
)
def test_a_backend_with_a_wrong_gradient_is_found_and_named(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (ids, _) = make(), tokens()
    check_head(model, find_head(model), ids, DEFT())
    right = TorchRows.gradient_

    def wrong(self: Any, product: Tensor, *args: Any) -> None:
        right(self, product, *args)
        product.mul_(1.01)

    monkeypatch.setattr(TorchRows, "gradient_", wrong)
    with pytest.raises(UserError) as caught:
        check_head(model, find_head(model), ids, DEFT())
    one_line(caught, "gradient", "--model.head_backend", "--model.head dense")


def test_a_backend_with_wrong_statistics_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, _) = faint(), tokens()
    right = TorchRows.statistics
    monkeypatch.setattr(
        TorchRows, "statistics", lambda self, *args: (s := right(self, *args))._replace(entropy=s.entropy + 0.1)
    )
    with pytest.raises(UserError) as caught:
        check_head(model, find_head(model), ids, DEFT())
    one_line(caught, DENSE)


MAKERS: dict[str, Callable[[], Any]] = {
    "llama": faint,
    "gemma2": partial(build, options_of("gemma2")),
    "phi": partial(build, options_of("phi")),
    "mixtral": partial(build, mixture("mixtral")),
    "lora": adapted,
    "lora tied": partial(adapted, True),
    "modules_to_save": partial(adapted, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", MAKERS)
def test_the_check_runs_in_every_grad_mode_and_leaves_the_model_as_it_was(name: str, mode: Any) -> None:
    model, (ids, targets) = MAKERS[name](), tokens()
    seam = find_head(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for training in (True, False):
        model.train(training)
        with mode():
            check_head(model, seam, ids, DEFT())
        assert all(module.training is training for module in model.modules())
    assert not gradients(model)
    assert not lent_forwards(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (seam.linear, seam.projection, seam.causal))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    fused(model, ids, targets).loss.backward()
    assert gradients(model)


def test_the_check_leaves_parts_that_are_in_evaluation_mode_there() -> None:
    """Frozen parts may be evaluated while the rest trains."""
    model = build({**LLAMA, "num_hidden_layers": 2})
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    check_causal(model, tokens()[0])
    check_head(model, find_head(model), tokens()[0], DEFT())
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_hooks_of_others_survive_the_check_even_when_it_refuses() -> None:
    model, (ids, _) = changed(faint(), lambda z: 1.1 * z), tokens()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    own, lent = model.lm_head._forward_hooks.copy(), model.__dict__["forward"]
    with pytest.raises(UserError):
        check_head(model, find_head(model), ids, DEFT())
    assert model.lm_head._forward_hooks == own and not model.lm_head._forward_pre_hooks
    assert model.__dict__["forward"] is lent and seen


@pytest.mark.parametrize("lora", [None, LoRA(r=2, target_modules=["q_proj", "lm_head"])], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_a_run_that_validates_first_is_checked_there_and_then_trains(
    lora: LoRA | None, precision: Any, tmp_path: Path
) -> None:
    module = prepare(LLAMA, lora=lora, optimizer=sgd, scheduler=constant)
    module.objective = EAFT(k=5)
    trainer = trainer_in(tmp_path, precision=precision)
    trainer.validate(module, loader(uneven_batches()[:2]), verbose=False)
    assert module.batch_loss.checked and trainer.callback_metrics["val/nll"] > 0
    trainer.fit(module, loader(uneven_batches()))
    assert trainer.callback_metrics["train/nll"] > 0


def wide(kind: str, seed: int, dtype: str, adapters: Any) -> Any:
    """A model with more tokens, where logits of 40 are rounded by an eighth in bfloat16."""
    options = options_of(kind, hidden_size=64, vocab_size=1000, num_attention_heads=2, tie_word_embeddings=False)
    options.update({"head_dim": 32} if "head_dim" in options else {})
    model = build(options, seed, dtype)
    if adapters is None:
        return model
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    return move_adapters(get_peft_model(model, config, autocast_adapter_dtype=adapters == "float32"), seed, 0.1)


@pytest.mark.parametrize("adapters", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi", "granite"])
def test_what_is_right_is_not_refused_for_its_rounding(kind: str, adapters: str | None) -> None:
    refused = []
    for seed in range(12):
        ids, _ = tokens(1, 20, seed)
        for autocast in (False, True):
            model = wide(kind, seed, "float32" if autocast else "bfloat16", adapters)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                try:
                    check_head(model, find_head(model), ids, DEFT())
                except UserError as error:
                    refused.append((seed, autocast, str(error)))
    assert not refused


@pytest.mark.parametrize("mode", ["bf16", "autocast"])
@pytest.mark.parametrize("change", [lambda z: 30 * torch.tanh(z / 30), lambda z: 1.2 * z], ids=["softcap", "scale"])
def test_rounding_does_not_hide_what_nobody_knows_of(mode: str, change: Any) -> None:
    ids, _ = tokens()
    model = changed(build({**LLAMA, "initializer_range": 0.02}, 0, "bfloat16" if mode == "bf16" else "float32"), change)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"), pytest.raises(UserError) as caught:
        check_head(model, find_head(model), ids, DEFT())
    one_line(caught, DENSE)


def test_rows_too_short_to_predict_anything_pass(batch: dict[str, Tensor]) -> None:
    model = changed(faint(), lambda z: 2 * z)
    check_causal(model, torch.tensor([[5]]))
    check_head(model, find_head(model), torch.tensor([[5]]), DEFT())
    with pytest.raises(UserError):
        check_head(model, find_head(model), torch.tensor([[5, 6]]), DEFT())


def test_a_first_batch_of_one_token_is_no_way_past_the_check() -> None:
    module = prepare(LLAMA)
    changed(module.model, lambda z: 2 * z)
    with pytest.raises(UserError):
        module.loss_and_stats({"input_ids": torch.tensor([[5]]), "labels": torch.tensor([[-100]])})


def test_a_head_of_zeros_is_no_reason_to_refuse() -> None:
    model, (ids, _) = faint(), tokens()
    nn.init.zeros_(model.lm_head.weight)
    check_head(model, find_head(model), ids, DEFT())


def test_float64_is_checked_too() -> None:
    for name in ("llama", "gemma2", "lora"):
        model = MAKERS[name]().double()
        check_head(model, find_head(model), tokens()[0], DEFT())


def test_a_checked_model_of_every_known_architecture_is_not_refused_at_the_weights_it_starts_from() -> None:
    for kind in ARCHITECTURES:
        options = options_of(kind)
        options.pop("initializer_range", None)
        torch.manual_seed(0)
        model = from_architecture(options, None, "float32")
        check_head(model, find_head(model), tokens()[0], DEFT())
