"""The reference of an anchored model: loss and gradients against dense logits of both models in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fused_cases import to_double
from peft import LoraConfig, get_peft_model
from tiny import LLAMA, VOCAB, architecture, assert_same_gradients, build, deft_by_hand, gradients
from torch import Tensor

from deft_lightning import SFTModule
from deft_lightning.errors import UserError
from deft_lightning.models import LoRA, base_causal_lm, find_head, make_reference
from deft_lightning.models.fingerprint import fingerprint
from deft_lightning.objectives import DEFT, KLAnchor

WEIGHT = 0.7
HEAD = LoRA(r=2, target_modules=["q_proj", "lm_head"])
WHOLE = LoRA(r=2, embeddings=True)
CASES: dict[str, tuple[dict[str, Any], LoRA | None]] = {
    "llama": (LLAMA, None),
    "tied": ({**LLAMA, "tie_word_embeddings": True}, None),
    "soft-capped": (architecture("gemma2"), None),
    "scaled": (architecture("granite"), None),
    "adapters": (LLAMA, LoRA(r=2)),
    "adapters, tied": ({**LLAMA, "tie_word_embeddings": True}, LoRA(r=2)),
    "adapters, soft-capped": (architecture("gemma2"), LoRA(r=2)),
    "adapters on the head": (LLAMA, HEAD),
    "head trained whole": (LLAMA, WHOLE),
    "head trained whole, tied": ({**LLAMA, "tie_word_embeddings": True}, WHOLE),
}


def module_of(options: dict[str, Any], lora: LoRA | None, **settings: Any) -> SFTModule:
    """A module in float64 whose trained weights have moved away from where they began."""
    torch.manual_seed(0)
    given = {"objective": KLAnchor(base=DEFT(), weight=WEIGHT), "architecture": options, "lora": lora, **settings}
    module = SFTModule(**given)
    module.configure_model()
    to_double(module.model)
    reference = module.batch_loss.reference
    if reference is not None and reference.frozen and reference.model._can_set_experts_implementation():
        reference.model.set_experts_implementation("eager")  # the dtype it follows by itself
    generator = torch.Generator().manual_seed(1)
    for weight in module.model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return module


def base_of(options: dict[str, Any]) -> Any:
    """The same model as it began, without adapters."""
    torch.manual_seed(0)
    module = SFTModule(architecture=options)
    module.configure_model()
    return to_double(module.model).eval()


def batch(packed: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCAB, (3, 15), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -100)
    found: dict[str, Any] = {"input_ids": ids, "labels": labels}
    found["token_weight"] = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
    if packed:
        found["position_ids"] = torch.cat([torch.arange(6), torch.arange(9)]).expand(3, -1)
    return found


def by_hand(module: SFTModule, base: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The sum of the anchored loss, and the KL of each supervised token."""
    inputs = {name: given[name] for name in ("input_ids", "position_ids") if name in given}
    keep = given["labels"][:, 1:] != -100
    logits = module.model(**inputs, use_cache=False).logits[:, :-1][keep]
    with torch.no_grad():
        log_pi0 = base(**inputs, use_cache=False).logits[:, :-1][keep].log_softmax(-1)
    apart = (log_pi0.exp() * (log_pi0 - logits.log_softmax(-1))).sum(-1)
    targets, factor = given["labels"][:, 1:][keep], given["token_weight"][:, 1:][keep]
    losses = torch.stack([deft_by_hand(z[None], y[None]) for z, y in zip(logits, targets, strict=True)])
    return ((losses + WEIGHT * apart) * factor).sum(), apart


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head", ["fused", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_both_models_logits(name: str, head: str, packed: bool) -> None:
    options, lora = CASES[name]
    module, base, given = module_of(options, lora, head=head), base_of(options), batch(packed)
    trained = {n for n, p in module.model.named_parameters() if p.requires_grad}
    total, stats, _ = module.loss_and_stats(given)
    total.backward()
    found = gradients(module.model)
    wanted, apart = by_hand(module, base, given)
    assert apart.min() > 1e-6
    torch.testing.assert_close(total, wanted)
    assert stats.reference_kl is not None
    torch.testing.assert_close(stats.reference_kl, apart.detach(), rtol=1e-6, atol=1e-9)
    wanted.backward()
    assert found.keys() == trained, "what the reference switched off has been switched on again"
    assert_same_gradients(found, gradients(module.model), 1e-6)


def test_gradient_checkpointing_changes_nothing() -> None:
    results = []
    for checkpointing in (False, True):
        module = module_of(LLAMA, HEAD, gradient_checkpointing=checkpointing)
        total, *_ = module.loss_and_stats(batch(True))
        total.backward()
        results.append((total, gradients(module.model)))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_same_gradients(results[0][1], results[1][1], 1e-9)


def test_a_mixture_of_experts_keeps_its_router_loss() -> None:
    options = architecture("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    plain, anchored = (
        module_of(options, None, objective=objective) for objective in (DEFT(), KLAnchor(base=DEFT(), weight=WEIGHT))
    )
    given = batch(False)
    given["token_weight"] = torch.ones_like(given["token_weight"])
    total, stats, _ = anchored.loss_and_stats(given)
    assert stats.reference_kl is not None and stats.reference_kl.sum() > 0.01
    torch.testing.assert_close(total - WEIGHT * stats.reference_kl.sum(), plain.loss_and_stats(given)[0])


@pytest.mark.parametrize("lora", [None, LoRA(r=2, dropout=0.5)], ids=["frozen", "adapters"])
def test_the_reference_is_as_it_began_without_dropout_and_draws_nothing(lora: LoRA | None) -> None:
    options = {**LLAMA, "attention_dropout": 0.5}
    module, base = module_of(options, lora), base_of(options)
    reference = module.batch_loss.reference
    reference.follow(module.model)
    inputs = {"input_ids": batch(False)["input_ids"], "use_cache": False}
    assert module.model.training
    before = torch.get_rng_state()
    logits = reference.logits(inputs)
    assert torch.equal(torch.get_rng_state(), before) and not logits.requires_grad
    torch.testing.assert_close(logits, base(**inputs).logits.detach(), rtol=1e-9, atol=1e-9)
    assert all(part.training for part in module.model.modules()), "training goes on with dropout"
    with torch.no_grad():
        assert not torch.equal(module.model(**inputs).logits, module.model(**inputs).logits)


def test_a_copy_is_no_part_of_the_module() -> None:
    module = module_of(LLAMA, None)
    reference = module.batch_loss.reference
    own = {id(weight) for weight in module.parameters()}
    assert reference.frozen and not any(weight.requires_grad for weight in reference.model.parameters())
    assert not own & {id(weight) for weight in reference.model.parameters()}
    assert len(own) == len(list(reference.model.parameters()))
    assert not any("reference" in name for name in module.state_dict())


def test_adapters_cost_no_copy_and_weight_zero_no_reference() -> None:
    adapted = module_of(LLAMA, HEAD).batch_loss.reference
    assert not adapted.frozen and adapted.fingerprint == ""
    assert module_of(LLAMA, None, objective=KLAnchor(weight=0.0)).batch_loss.reference is None
    assert module_of(LLAMA, None, objective=DEFT()).batch_loss.reference is None
    assert module_of(LLAMA, None, objective=DEFT(), forgetting=True).batch_loss.reference.frozen


def test_forgetting_alone_compares_where_there_is_no_gradient() -> None:
    module = module_of(LLAMA, None, objective=DEFT(), forgetting=True)
    assert module.loss_and_stats(batch(False))[1].reference_kl is None
    with torch.inference_mode():
        found = module.loss_and_stats(batch(False))[1].reference_kl
    assert found is not None
    torch.testing.assert_close(found, by_hand(module, base_of(LLAMA), batch(False))[1].detach(), rtol=1e-6, atol=1e-9)


def test_adapters_that_train_other_weights_are_refused() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM")
    biased = get_peft_model(build({**LLAMA, "model_type": "qwen2"}), config)
    with pytest.raises(UserError, match=r"^KLAnchor, --model.forgetting: the adapters of the model train .*bias too"):
        make_reference(biased, find_head(biased))


def test_adapters_that_have_been_trained_are_told_apart_from_where_they_begin(caplog: Any, capsys: Any) -> None:
    model = get_peft_model(build(LLAMA), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for moved in (False, True):
        caplog.clear()
        with caplog.at_level("INFO"):
            make_reference(model, find_head(model))
        assert "switched off" in caplog.text and ("trained before" in caplog.text) is moved
        base_causal_lm(model).model.layers[0].self_attn.q_proj.lora_B["default"].weight.data[0, 0] = 1.0


def test_a_fingerprint_is_that_of_the_bits() -> None:
    one = build(LLAMA)
    known = fingerprint(one)
    assert fingerprint(copy.deepcopy(one)) == known and fingerprint(build(LLAMA, seed=1)) != known
    with torch.no_grad():
        one.model.norm.weight[3] *= 1 + 1e-6
    assert fingerprint(one) != known
    assert fingerprint(build(LLAMA).bfloat16()) != known
