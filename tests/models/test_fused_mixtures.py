"""The fused head of mixtures of experts: the router's loss is in the sum, as transformers has it."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_cases import (
    COEFFICIENT,
    LACKING,
    MIXTURES,
    TRANSFORMERS,
    loader,
    mixture,
    options_of,
    to_double,
    uneven_batches,
)
from packaging.version import Version
from tiny import (
    assert_same_gradients,
    build,
    deft_by_hand,
    gradients,
    move_adapters,
    one_line,
    prepare,
)
from torch import Tensor, nn
from worlds import bare_trainer, constant, sgd

from deft_lightning.errors import UserError
from deft_lightning.models import LoRA, add_adapters, router_loss_factor

pytestmark = pytest.mark.slow


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
    if routed and kind in LACKING:
        with pytest.raises(UserError, match="no auxiliary loss"):
            module.loss_and_stats(batch)
        return
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


@pytest.mark.parametrize("kind", [kind for kind in MIXTURES if kind not in LACKING])
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
    if kind != "llama4_text" and TRANSFORMERS < Version("5.19"):  # no config of the others knew it
        one_line(caught, "has no such option", "--model.architecture.output_router_logits")
    else:
        one_line(caught, "ForCausalLM", "no auxiliary loss", "--model.architecture.output_router_logits")


@pytest.mark.parametrize("head", ["fused", "dense"])
def test_a_router_loss_that_transformers_says_is_0_is_refused(
    head: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.granitemoe import modeling_granitemoe

    balance = modeling_granitemoe.load_balancing_loss_func
    assert balance(None) == 0, "what it says of logits that nobody recorded"
    monkeypatch.setattr(modeling_granitemoe, "load_balancing_loss_func", lambda logits, *more: balance(None, *more))
    with pytest.raises(UserError) as caught:
        prepare(mixture("granitemoe"), head=head).loss_and_stats(batch)
    one_line(caught, "GraniteMoeForCausalLM", "no auxiliary loss", "--model.architecture.output_router_logits")


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
        bare_trainer(tmp_path, logger=logger, accumulate_grad_batches=2).fit(module, loader(batches))
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


@pytest.mark.parametrize("head", ["fused", "dense"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_the_router_loss_counts_what_the_tokens_of_the_batch_do(kind: str, head: Any, batch: dict[str, Tensor]) -> None:
    """Where they have weights the step is divided by their sum: the router's share stays its coefficient."""
    module = prepare(mixture(kind), head=head)
    to_double(module.model)
    weight = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    output = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    targets = batch["labels"][:, 1:]
    keep = targets != -100
    of_token, log_pi = weight[:, 1:][keep], torch.log_softmax(output.logits[:, :-1][keep], -1)
    collision = log_pi.detach().exp().square().sum(-1)
    p = log_pi.gather(-1, targets[keep].unsqueeze(-1)).squeeze(-1).exp()
    wanted = (of_token * (1 - p**collision) / collision).sum() + COEFFICIENT * of_token.sum() * output.aux_loss
    wanted.backward()
    expected = gradients(module.model)
    total, stats, _ = module.loss_and_stats({**batch, "token_weight": weight})
    assert total.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert stats.weight is not None and torch.equal(stats.weight, of_token.to(stats.weight.dtype))
    total.backward()
    assert_same_gradients(gradients(module.model), expected, 2e-6)
