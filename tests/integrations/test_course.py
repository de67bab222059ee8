"""Objectives that change as training goes on, in transformers.Trainer: against runs by hand, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gates_by_hand import GateOf, NoiseModel, deft, first_nll, first_rate, floored, rescaled
from torch import Tensor
from transformers import Trainer
from whole_batches import STEPS, arguments, by_hand, collate, same, tiny_model, token_rows, trained, wrong_rows

from deft_lightning.errors import UserError
from deft_lightning.integrations import GateCallback, TokenWeights, compute_loss_func
from deft_lightning.objectives import (
    DEFT,
    NLL,
    BySource,
    Contaminated,
    Floored,
    Likelihood,
    Objective,
    Rescaled,
    Schedule,
)

pytestmark = pytest.mark.slow
CASES: list[tuple[Objective, Callable[[], GateOf]]] = [
    (DEFT(), lambda: deft),
    (Schedule(switch=0.5), lambda: first_nll),
    (Floored(floor=0.9, decay="linear"), lambda: floored),
    (Rescaled(decay=0.5), lambda: rescaled(0.5)),
    (Contaminated(chance="unigram", answer_chance=None, start=0.2), NoiseModel),
    (Contaminated(answer_chance="least", start=0.2), lambda: NoiseModel(least=True)),
    (Contaminated(chance="unigram", answer_chance=None, start=0.2, opening=0.5), lambda: NoiseModel(opening=0.5)),
]


@pytest.mark.parametrize(("batch", "accumulate"), [(8, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize(("objective", "gate_of"), CASES, ids=[repr(objective) for objective, _ in CASES])
def test_a_run_is_the_one_by_hand_however_a_step_is_cut(
    objective: Objective, gate_of: Callable[[], GateOf], batch: int, accumulate: int, tmp_path: Path
) -> None:
    weights, figures = by_hand(gate_of())
    trainer = trained(tmp_path, compute_loss_func(objective), GateCallback(), batch, accumulate)
    same(trainer.model, weights)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == STEPS
    for entry, figure in zip(logged, figures, strict=True):
        assert {name: entry[name] for name in figure} == pytest.approx(figure, rel=1e-4)


def test_noise_rates_are_logged_as_they_are_in_force(tmp_path: Path) -> None:
    hand = NoiseModel()
    by_hand(hand)
    objective = Contaminated(chance="unigram", answer_chance=None, start=0.2)
    trainer = trained(tmp_path, compute_loss_func(objective), GateCallback(), 4, 2)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    told = [(entry["noise/estimated"], entry["noise/estimated_tokens"]) for entry in logged]
    assert told == [pytest.approx(pair, rel=1e-4) for pair in hand.told]
    assert hand.told[-1] != hand.told[0]


class WatchedByHand(NoiseModel):
    """The rates beside a run under NLL: a mean over the logged steps that counts the first ones alike."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = self.tokens = 0.01
        self.seen = 0

    def moved(self, rate: float, mean: float) -> float:  # type: ignore[override]
        latest = max(1 / self.seen, 0.1)
        return min(max((1 - latest) * rate + latest * mean, 0.01), 0.95)

    def __call__(self, step: int, tokens: Any) -> Tensor:
        self.seen += 1
        super().__call__(step, tokens)
        return torch.ones_like(tokens.prob)


def test_noise_is_estimated_whatever_trains(tmp_path: Path) -> None:
    hand = WatchedByHand()
    by_hand(hand)
    after = [*hand.told[1:], (hand.answers, hand.tokens)]
    trainer = trained(tmp_path, compute_loss_func(NLL()), GateCallback(), 4, 2)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    told = [(entry["noise/estimated"], entry["noise/estimated_tokens"]) for entry in logged]
    assert told == [pytest.approx(pair, rel=1e-3) for pair in after]
    assert max(first for first, _ in after) > 0.05
    without = trained(tmp_path, compute_loss_func(NLL()), GateCallback(noise=False))
    assert not any("noise/estimated" in entry for entry in without.state.log_history)


RESUMED = [
    Rescaled(decay=0.9),
    Schedule(switch=0.7),
    Contaminated(answer_chance="least", start=0.2, opening=0.6),
    Rescaled(base=Floored(floor=0.9, decay="linear")),
    NLL(),
]


@pytest.mark.parametrize("restore", [False, True], ids=["default", "callbacks restored"])
@pytest.mark.parametrize("objective", RESUMED, ids=repr)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    objective: Objective, restore: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "batch": 2, "accumulate": 2, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch",
        "learning_rate": 1e-2, "restore_callback_states_from_checkpoint": restore,
    }  # fmt: skip
    whole = trained(tmp_path, compute_loss_func(objective), GateCallback(), **options)
    cut = trained(
        tmp_path, compute_loss_func(objective), GateCallback(), **options, resume=str(tmp_path / "checkpoint-3")
    )
    for one, other in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        assert torch.equal(one, other)
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
    last = [
        {name: value for name, value in trainer.state.log_history[at].items() if name not in timed}
        for trainer in (whole, cut)
        for at in (-3, -2)
    ]
    assert last[:2] == last[2:]
    callbacks = [one for one in cut.callback_handler.callbacks if isinstance(one, GateCallback)]
    assert len(callbacks) == 1


def test_the_state_of_another_objective_is_not_gone_on_from(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path, compute_loss_func(Rescaled(decay=0.9)), GateCallback(), **options)
    loss = compute_loss_func(Contaminated(chance="unigram", answer_chance=None))
    with pytest.warns(UserWarning, match=r"^GateCallback: the checkpoint is of Rescaled\(.*starts over$"):
        trained(tmp_path, loss, GateCallback(), **options, resume=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_without_the_callback_is_gone_on_from_and_saved_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path, compute_loss_func(DEFT()), None, **options)
    with pytest.warns(UserWarning, match="the checkpoint is of a run without GateCallback"):
        trained(
            tmp_path, compute_loss_func(Rescaled()), GateCallback(), **options, resume=str(tmp_path / "checkpoint-3")
        )
    assert (tmp_path / "checkpoint-6").is_dir()


def test_state_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path, compute_loss_func(Rescaled()), GateCallback(), **options)
    file = tmp_path / "checkpoint-3" / "trainer_state.json"
    file.write_text(file.read_text().replace('"marginal": null', '"marginal": "not base64!"'))
    with pytest.raises(UserError, match=r"^GateCallback: its state in trainer_state.json cannot be used"):
        trained(tmp_path, compute_loss_func(Rescaled()), GateCallback(), **options, resume=str(file.parent))


def test_a_second_training_of_the_same_loss_begins_anew(tmp_path: Path) -> None:
    loss = compute_loss_func(Rescaled(decay=0.9))
    first = trained(tmp_path, loss, GateCallback())
    again = trained(tmp_path, loss, GateCallback())
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "objective", [Schedule(), Rescaled(), Floored(decay="linear"), Contaminated(answer_chance="least")], ids=repr
)
def test_without_the_callback_the_first_step_is_refused(objective: Objective, tmp_path: Path) -> None:
    """It would silently be what it ends as, from the first step on."""
    with pytest.raises(UserError, match=r"changes during training: add deft_lightning.integrations.GateCallback") as e:
        trained(tmp_path, compute_loss_func(objective), None)
    assert repr(objective) in str(e.value) and "\n" not in str(e.value)


def test_objectives_of_sources_follow_the_run_too(tmp_path: Path) -> None:
    """Every other row is of a source whose objective changes half-way; its mean gate is that of its own tokens."""

    class Sourced(TokenWeights, Trainer):
        pass

    rows = [{**row, "source": [0 if at % 2 else -1]} for at, row in enumerate(token_rows())]

    def with_sources(some: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        return {**collate(some), "source": torch.tensor([row["source"][0] for row in some])}

    def gate_of(step: int, tokens: Any) -> Tensor:
        of_source = tokens.row % 2 == 1
        own = torch.ones_like(tokens.prob) if step < STEPS / 2 else tokens.prob
        return torch.where(of_source, own, deft(step, tokens))

    weights, _ = by_hand(gate_of)
    objective = BySource(DEFT(), {"trusted": Schedule(NLL(), Likelihood(), switch=0.5)})
    given = arguments(tmp_path, 4, 2, label_names=["labels", "source"])
    trainer = Sourced(
        tiny_model(), given, train_dataset=rows, data_collator=with_sources,
        compute_loss_func=compute_loss_func(objective), callbacks=[GateCallback()],
    )  # fmt: skip
    trainer.train()
    same(trainer.model, weights)
    with pytest.raises(UserError, match=r"needs the source of each row: put TokenWeights before Trainer .*trusted"):
        trained(tmp_path, compute_loss_func(objective), GateCallback())


@pytest.mark.parametrize("batch", [2, 8])
def test_noise_rates_begin_with_a_sample_of_the_answers(batch: int, tmp_path: Path) -> None:
    """A model that knows the right answers meets three wrong ones of eight."""
    model = trained(tmp_path, compute_loss_func(NLL()), None, max_steps=40).model
    rate = first_rate(model, wrong_rows())
    assert 0.2 < rate < 0.6
    options: dict[str, Any] = {"model": model, "rows": wrong_rows(), "max_steps": 1, "batch": batch}
    objective = Contaminated(chance="unigram", answer_chance=None)
    trainer = trained(tmp_path, compute_loss_func(objective), GateCallback(), **options)
    assert trainer.state.log_history[0]["noise/estimated"] == pytest.approx(rate, abs=1e-3)
    assert trainer.model.training
