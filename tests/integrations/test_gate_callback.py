"""GateCallback: when it looks, what it adds to which log, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback
from whole_batches import STEPS, Tokens, arguments, by_hand, collate, same, tiny_model, token_rows, trained
from worlds import read_events

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.integrations import GateCallback, compute_loss_func
from deft_lightning.objectives import DEFT, NLL, Contaminated, Likelihood, Objective

pytestmark = pytest.mark.slow


@dataclass(frozen=True, repr=False)
class Counted(Objective):
    """NLL that counts how often it is called: in training once a micro-batch, for a gate once more."""

    calls: ClassVar[list[int]] = []

    def __call__(self, stats: TokenStats) -> Tensor:
        self.calls.append(len(stats.log_prob))
        return -stats.log_prob


@pytest.mark.parametrize(("every", "gates"), [(1, STEPS), (3, 2), (100, 0)])
def test_steps_that_are_not_logged_compute_no_gate(every: int, gates: int, tmp_path: Path) -> None:
    Counted.calls.clear()
    trained(tmp_path, compute_loss_func(Counted()), GateCallback(), 4, 2, logging_steps=every)
    assert len(Counted.calls) == 2 * STEPS + 2 * gates


def test_nll_covers_all_steps_since_the_last_log_and_gates_the_last_step(tmp_path: Path) -> None:
    _, figures = by_hand(lambda step, tokens: tokens.prob)
    trainer = trained(tmp_path, compute_loss_func(Likelihood()), GateCallback(), 4, 2, logging_steps=3)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, at in zip(logged, (0, 3), strict=True):
        # All steps have the same number of tokens: the mean over tokens is that over steps.
        assert entry["nll"] == pytest.approx(sum(f["nll"] for f in figures[at : at + 3]) / 3, rel=1e-4)
        assert entry["gate/mean"] == pytest.approx(figures[at + 2]["gate/mean"], rel=1e-4)


def test_a_log_at_the_end_of_an_epoch_has_the_figures_too(tmp_path: Path) -> None:
    options: dict[str, Any] = {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    trainer = trained(tmp_path, compute_loss_func(DEFT()), GateCallback(), 4, 1, **options)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all({"gate/mean", "focus/mean", "nll"} <= entry.keys() for entry in logged)


def test_focus_and_locked_share_are_those_of_the_tokens(tmp_path: Path) -> None:
    trainer = trained(tmp_path, compute_loss_func(DEFT()), GateCallback(), 4, 2, max_steps=1)
    tokens = Tokens(tiny_model().double())
    gate = tokens.prob**tokens.collision
    wrong = tokens.log_pi.argmax(-1) != tokens.targets
    locked = (tokens.collision >= 0.5) & wrong & (gate < 0.1)
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["focus/mean"] == pytest.approx(float(tokens.collision.mean()), rel=1e-5)
    assert entry["gate/locked"] == pytest.approx(float(locked.double().mean()))
    assert "focus/mean" not in trained(tmp_path, compute_loss_func(Counted()), GateCallback()).state.log_history[0]


def test_an_evaluation_has_its_plain_nll_and_may_choose_the_best_model_by_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_nll", "greater_is_better": False,
        "per_device_eval_batch_size": 2,
    }  # fmt: skip
    trainer = trained(tmp_path, compute_loss_func(Likelihood()), GateCallback(), **options)
    logged = [entry["eval_nll"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logged) == 2 and trainer.state.best_metric == min(logged)
    batch = collate(token_rows()[:3])
    with torch.no_grad():
        logits = trainer.model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert trainer.evaluate()["eval_nll"] == pytest.approx(float(nll), rel=1e-5)


def test_the_figures_reach_every_logger_of_the_trainer(tmp_path: Path) -> None:
    class Late(TrainerCallback):
        seen: ClassVar[list[dict[str, Any]]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen.append(dict(logs))

    trainer = Trainer(
        tiny_model(), arguments(tmp_path, 4, 2, report_to=["tensorboard"]), train_dataset=token_rows(),
        data_collator=collate, compute_loss_func=compute_loss_func(DEFT()), callbacks=[Late(), GateCallback()],
    )  # fmt: skip
    trainer.train()
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    events = read_events(files[0].parent)
    tags = {"gate/mean", "gate/ess", "gate/locked", "focus/mean", "prob/mean", "nll", "noise/estimated"}
    assert {f"train/{tag}" for tag in tags} <= set(events.Tags()["scalars"])
    for tag in tags:
        values = [event.value for event in events.Scalars(f"train/{tag}")]
        history = [entry[tag] for entry in trainer.state.log_history if "loss" in entry]
        assert values == pytest.approx(history, rel=1e-6) and len(values) == STEPS
        assert [entry[tag] for entry in Late.seen if "loss" in entry] == history


def test_a_callback_that_is_added_later_works_as_well(tmp_path: Path) -> None:
    trainer = Trainer(
        tiny_model(), arguments(tmp_path, 8, 1), train_dataset=token_rows(), data_collator=collate,
        compute_loss_func=compute_loss_func(DEFT()),
    )  # fmt: skip
    trainer.add_callback(GateCallback)
    trainer.train()
    assert "gate/mean" in trainer.state.log_history[0]


def test_a_mixture_of_experts_keeps_its_router_loss(tmp_path: Path) -> None:
    """Each micro-batch's router loss counts as much as its tokens."""

    def mixture() -> Any:
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5,
            )
        )  # fmt: skip

    def run(callback: Any) -> Any:
        trainer = Trainer(
            mixture(), arguments(tmp_path, 8, 1, max_steps=1), train_dataset=token_rows(), data_collator=collate,
            compute_loss_func=compute_loss_func(Likelihood()), callbacks=[callback] if callback else [],
        )  # fmt: skip
        trainer.train()
        return trainer.model

    reference, batch = mixture(), collate(token_rows())
    output = reference(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    keep = batch["labels"][:, 1:] != -100
    pi = output.logits[:, :-1][keep].softmax(-1)
    (1 - pi.gather(-1, batch["labels"][:, 1:][keep].unsqueeze(-1)).mean() + 0.5 * output.aux_loss).backward()
    same(run(GateCallback()), [(p - 0.5 * p.grad).detach() for p in reference.parameters()])
    with pytest.raises(UserError, match=r"a mixture of experts has a loss of its router: add .*GateCallback"):
        run(None)


def test_another_loss_beside_the_callback_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the trainer's loss is not from compute_loss_func"):
        trained(tmp_path, None, GateCallback())


@pytest.mark.parametrize(("option", "says"), [({"label_smoothing_factor": 0.1}, "label_smoothing_factor does nothing")])
def test_options_that_go_against_the_objective_are_refused(option: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        trained(tmp_path, compute_loss_func(DEFT()), GateCallback(), **option)


def test_a_wrong_divisor_is_refused_before_the_first_step(tmp_path: Path) -> None:
    class Twice(Trainer):
        def get_batch_samples(self, *args: Any) -> Any:
            batches, count = super().get_batch_samples(*args)
            return batches, 2 * count

    trainer = Twice(
        tiny_model(), arguments(tmp_path, 8, 1), train_dataset=token_rows(), data_collator=collate,
        compute_loss_func=compute_loss_func(DEFT()), callbacks=[GateCallback()],
    )  # fmt: skip
    with pytest.raises(UserError, match=r"the trainer divides a step by 66.0, but 33 is what its tokens count"):
        trainer.train()
    for one, other in zip(trainer.model.parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(one, other)


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(token_rows())


def test_a_stream_is_not_counted_but_its_counts_can_be_given(tmp_path: Path) -> None:
    def run(loss: Any) -> Trainer:
        # In float64: the rows of a batch lie in another order than those of a set that is shuffled.
        trainer = Trainer(
            tiny_model().double(), arguments(tmp_path, 8, 1), train_dataset=Stream(), data_collator=collate,
            compute_loss_func=loss, callbacks=[GateCallback()],
        )  # fmt: skip
        trainer.train()
        return trainer

    with pytest.warns(UserWarning, match="noise/estimated is not logged: a stream has no labels that could be counted"):
        assert "noise/estimated" not in run(compute_loss_func(DEFT())).state.log_history[0]
    objective = Contaminated(chance="unigram", answer_chance=None, start=0.1)
    with pytest.raises(UserError, match=r"compares with word frequencies: a stream.*label_counts"):
        run(compute_loss_func(objective))
    labels = torch.tensor([label for row in token_rows() for label in row["labels"][1:] if label != -100])
    streamed = run(compute_loss_func(objective, label_counts=torch.bincount(labels)))
    counted = trained(tmp_path, compute_loss_func(objective), GateCallback(), model=tiny_model().double())
    for one, other in zip(streamed.model.parameters(), counted.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    sampled = Contaminated(chance="unigram", answer_chance=None)
    with pytest.warns(UserWarning, match=r"noise rates begin at 0.01: a stream has no sample of its answers"):
        entry = run(compute_loss_func(sampled, label_counts=torch.bincount(labels))).state.log_history[0]
    assert entry["noise/estimated"] == 0.01


def test_outputs_that_do_not_fit_are_one_line() -> None:
    loss = compute_loss_func(NLL())
    logits, labels = torch.randn(2, 7, 11), torch.randint(0, 11, (2, 5))
    with pytest.raises(UserError, match=r"logits of shape \(2, 7\) do not fit labels of shape \(2, 5\)"):
        loss({"logits": logits}, labels)
    with pytest.raises(UserError, match="the batch has no labels"):
        loss({"logits": logits}, None)
    with pytest.raises(UserError, match="one process per device"):
        loss({"logits": logits}, torch.randint(0, 11, (2, 7)), num_items_in_batch=torch.tensor([[12.0], [12.0]]))
    with pytest.raises(UserError, match="is a class; make an instance"):
        compute_loss_func(DEFT)  # type: ignore[arg-type]


def test_watching_changes_nothing(tmp_path: Path) -> None:
    """Neither the order of the rows nor dropout, though labels are counted and gates computed."""

    def weights(callback: Any) -> list[Tensor]:
        trainer = Trainer(
            tiny_model(attention_dropout=0.3), arguments(tmp_path, 2, 2), train_dataset=token_rows(),
            data_collator=collate, compute_loss_func=compute_loss_func(DEFT()), callbacks=callback,
        )  # fmt: skip
        trainer.train()
        return [weight.detach() for weight in trainer.model.parameters()]

    for one, other in zip(weights([GateCallback()]), weights([]), strict=True):
        assert torch.equal(one, other)


def test_a_prediction_has_its_nll_and_leaves_the_next_evaluation_alone(tmp_path: Path) -> None:
    trainer = trained(tmp_path, compute_loss_func(DEFT()), GateCallback())
    before = trainer.evaluate()["eval_nll"]
    assert trainer.predict(token_rows()[3:]).metrics["test_nll"] != pytest.approx(before, rel=1e-3)
    assert trainer.evaluate()["eval_nll"] == before


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="GateCallback: the trainer has two"):
        Trainer(
            tiny_model(), arguments(tmp_path, 8, 1), train_dataset=token_rows(), data_collator=collate,
            compute_loss_func=compute_loss_func(DEFT()), callbacks=[GateCallback(), GateCallback(noise=False)],
        )  # fmt: skip


def test_a_watched_model_can_still_be_pickled(tmp_path: Path) -> None:
    trainer = trained(tmp_path, compute_loss_func(DEFT()), GateCallback())
    torch.save(trainer.model, tmp_path / "model.pt")
    assert torch.load(tmp_path / "model.pt", weights_only=False).config.vocab_size == 31
