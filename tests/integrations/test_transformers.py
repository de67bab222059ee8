"""The objectives train inside transformers.Trainer, and its normalisation stays exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from deft_lightning.errors import UserError
from deft_lightning.functional import token_loss
from deft_lightning.integrations import TokenWeights, compute_loss_func
from deft_lightning.objectives import DEFT, NLL, Contaminated, KLAnchor, Likelihood, Objective


def tiny_model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2,
        )
    )  # fmt: skip


def token_rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    result = []
    for masked in (1, 5, 7, 2):  # unlike numbers of supervised tokens: a mean of means would be wrong
        ids = torch.randint(0, 31, (8,), generator=generator).tolist()
        result.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return result


@pytest.mark.slow
@pytest.mark.parametrize("objective", [NLL(), DEFT()], ids=repr)
@pytest.mark.parametrize(("batch", "accumulate"), [(4, 1), (1, 4), (2, 2)])
def test_one_step_of_the_trainer_is_the_mean_over_all_its_tokens(
    objective: Objective, batch: int, accumulate: int, tmp_path: Path
) -> None:
    data = token_rows()
    reference = tiny_model().double()
    ids = torch.tensor([row["input_ids"] for row in data])
    labels = torch.tensor([row["labels"] for row in data])
    loss = token_loss(reference(ids).logits[:, :-1], labels[:, 1:], objective)
    (loss.sum() / (labels[:, 1:] != -100).sum()).backward()
    model = tiny_model()
    before = [p.detach().clone() for p in model.parameters()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_steps=1, learning_rate=1.0, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data, compute_loss_func=compute_loss_func(objective)).train()
    for old, new, true in zip(before, model.parameters(), reference.parameters(), strict=True):
        assert true.grad is not None
        torch.testing.assert_close((old - new.detach()).double(), true.grad, rtol=1e-4, atol=1e-6)


class WeightedTrainer(TokenWeights, Trainer):
    """As the docstring has it."""


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("batch", "accumulate"), [(4, 1), (1, 4), (2, 2)])
def test_one_step_of_a_trainer_with_weights_is_the_weighted_mean(
    batch: int, accumulate: int, weighted: bool, tmp_path: Path
) -> None:
    generator, data = torch.Generator().manual_seed(2), token_rows()
    for row in data if weighted else []:
        row["token_weight"] = (3 * torch.rand(8, generator=generator) * torch.rand(1, generator=generator)).tolist()  # type: ignore[assignment]
    reference = tiny_model().double()
    ids, labels = (torch.tensor([row[name] for row in data]) for name in ("input_ids", "labels"))
    weight = torch.tensor([row.get("token_weight", [1.0] * 8) for row in data]).double()[:, 1:]
    keep = labels[:, 1:] != -100
    log_pi = torch.log_softmax(reference(ids).logits[:, :-1], -1)
    p = log_pi.gather(-1, labels[:, 1:].clamp_min(0).unsqueeze(-1)).squeeze(-1).exp()
    ((weight * (1 - p))[keep].sum() / weight[keep].sum()).backward()
    model = tiny_model()
    before = [p.detach().clone() for p in model.parameters()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_steps=1, learning_rate=1.0, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True,
        label_names=["labels", "token_weight"] if weighted else ["labels"],
    )  # fmt: skip
    func = compute_loss_func(Likelihood())
    trainer = WeightedTrainer(model, arguments, train_dataset=data, eval_dataset=data, compute_loss_func=func)
    trainer.train()
    for old, new, true in zip(before, model.parameters(), reference.parameters(), strict=True):
        assert true.grad is not None
        torch.testing.assert_close((old - new.detach()).double(), true.grad, rtol=1e-4, atol=1e-6)
    assert trainer.compute_loss_func is func


def test_an_objective_that_compares_with_a_reference_is_refused() -> None:
    with pytest.raises(UserError, match=r"^compute_loss_func: KLAnchor\(.*needs a reference model"):
        compute_loss_func(KLAnchor())
    assert callable(compute_loss_func(KLAnchor(weight=0.0)))


@pytest.mark.parametrize("objective", [Contaminated(), Contaminated(chance="unprompted")], ids=repr)
def test_an_objective_that_compares_with_bare_answers_is_refused(objective: Objective) -> None:
    with pytest.raises(
        UserError, match=r"answers without their prompts.*here use Contaminated\(answer_chance='least'\)"
    ):
        compute_loss_func(objective)


def test_a_router_loss_that_is_no_tensor_is_refused() -> None:
    row = token_rows()[0]
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    outputs = tiny_model()(ids)
    outputs["aux_loss"] = 0  # what transformers says where it has recorded no router
    with pytest.raises(UserError, match=r"^compute_loss_func: the model gives no auxiliary loss"):
        compute_loss_func(NLL())(outputs, labels)
