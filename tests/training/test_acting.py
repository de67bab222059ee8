"""The objective in force through real runs, against a float64 loop over whole windows with its formulas written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from test_module import HELD_OUT, batches_of, data, deft, initial, loader, make_module, nll, supervised, window_gradient
from torch import Tensor
from worlds import UNEVEN, bare_trainer, random_example, read_events, still, write_rows

from deft_lightning import SFTModule
from deft_lightning.callbacks import Checkpoint, GateMonitor
from deft_lightning.errors import UserError
from deft_lightning.objectives import DEFT, DFT, EAFT, NLL, Floored, Likelihood, Objective, Rescaled, Schedule

pytestmark = pytest.mark.slow

ROWS = UNEVEN
RATE = 0.5
Loss = Callable[[Tensor, Tensor], Tensor]
windows = pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (3, 3), (1, 8)])  # of the same eight examples
heads = pytest.mark.parametrize("head", ["fused", "dense"])


def slow_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE)


class Course(Callback):
    """Keeps the objective in force, where a monitor would ask for it."""

    def __init__(self) -> None:
        self.trained: list[Objective] = []
        self.validated: list[Objective] = []
        self.checked: list[Objective] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.trained.append(pl_module.current_objective)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        (self.checked if trainer.sanity_checking else self.validated).append(pl_module.current_objective)


def steps_by_hand(pretrained: str, batch: Any, losses: list[Callable[[Any], Loss]]) -> Any:
    """Gradient steps on one window; each loss is made from the model before its step."""
    model = initial(pretrained)
    for make in losses:
        gradient = window_gradient(model, [batch], make(model))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= RATE * gradient[name]
    return model


def assert_trained_alike(found: Any, wanted: Any, pretrained: str) -> None:
    start = dict(initial(pretrained).named_parameters())
    for (name, a), b in zip(found.named_parameters(), wanted.parameters(), strict=True):
        moved = float((b - start[name]).detach().abs().max())
        assert moved > 1e-3, f"{name} has not trained"
        assert float((a - b).detach().abs().max()) / moved < 1e-4, name


def scalars(trainer: Any, tag: str) -> list[float]:
    events = read_events(trainer.log_dir)
    return [event.value for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def mean_gate(model: Any, batch: Any) -> float:
    """Mean of ``p^C``."""
    with torch.no_grad():
        logits, targets = supervised(model, batch)
        pi = torch.softmax(logits, -1)
        return float((pi.gather(-1, targets.unsqueeze(-1)).squeeze(-1) ** pi.square().sum(-1)).mean())


# --- a schedule -----------------------------------------------------------------------------------------------------


@heads
@windows
def test_each_step_of_a_schedule_follows_the_loss_of_its_share_of_the_run(
    size: int, accumulate: int, head: str, pretrained: str, source: str, tmp_path: Path
) -> None:
    (batch,) = batches_of(pretrained, source, 8)

    def half(logits: Tensor, targets: Tensor) -> Tensor:
        return (nll(logits, targets) + deft(logits, targets)) / 2

    # Progress 0, 1/4, 1/2 and 3/4.
    wanted = steps_by_hand(pretrained, batch, [lambda model, loss=loss: loss for loss in (nll, nll, half, deft)])
    module = make_module(pretrained, objective=Schedule(switch=0.25, blend=0.5), head=head, optimizer=slow_sgd)
    course = Course()
    trainer = bare_trainer(tmp_path, course, max_epochs=4, accumulate_grad_batches=accumulate)
    trainer.fit(module, data(source, batch_size=size))
    assert trainer.global_step == 4
    assert_trained_alike(module.model, wanted, pretrained)
    weights = [getattr(objective, "weight", None) for objective in course.trained]
    micro = math.ceil(8 / size)
    assert weights == [weight for weight in (0.0, 0.0, 0.5, 1.0) for _ in range(micro)]


def test_a_linear_floor_sinks_over_the_optimizer_steps(pretrained: str, source: str, tmp_path: Path) -> None:
    (batch,) = batches_of(pretrained, source, 8)

    def floored(floor: float) -> Loss:
        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            log_p = torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            return -log_p * log_p.detach().exp().clamp_min(floor)  # the gradient of Likelihood, but for the floor

        return loss

    losses: list[Callable[[Any], Loss]] = [
        lambda model, left=left: floored(0.8 * left) for left in (1, 0.75, 0.5, 0.25)
    ]
    objective = Floored(base=Likelihood(), floor=0.8, decay="linear")
    module = make_module(pretrained, objective=objective, optimizer=slow_sgd)
    bare_trainer(tmp_path, max_epochs=4, accumulate_grad_batches=4).fit(module, data(source, batch_size=2))
    assert_trained_alike(module.model, steps_by_hand(pretrained, batch, losses), pretrained)


@pytest.mark.parametrize("head", ["fused", "dense"])
def test_a_schedule_between_objectives_that_need_other_statistics_trains(
    head: str, pretrained: str, source: str, tmp_path: Path
) -> None:
    """The entropy that the first needs stays there, for a comparison too."""
    module = make_module(pretrained, objective=Schedule(first=EAFT(k=5), then=DEFT(), switch=0.5), head=head)
    trainer = bare_trainer(tmp_path, GateMonitor(others=[EAFT(k=5)]), max_epochs=4, logger=None)
    trainer.fit(module, data(source))
    own, other = scalars(trainer, "gate/mean"), scalars(trainer, "counterfactual/EAFT_k_5_normalizer_log_k/gate")
    assert own[:2] == pytest.approx(other[:2], rel=1e-6)
    assert abs(own[2] - other[2]) > 1e-2
    # EAFT has no focus index, DEFT has one.
    assert len(scalars(trainer, "focus/mean")) == 2


def test_monitors_show_the_gate_in_force(pretrained: str, source: str, tmp_path: Path) -> None:
    module = make_module(pretrained, objective=Schedule(switch=0.5), optimizer=still)
    trainer = bare_trainer(tmp_path, GateMonitor(), max_epochs=4, logger=None)
    trainer.fit(module, data(source))
    (batch,) = batches_of(pretrained, source, 8)
    shut = mean_gate(initial(pretrained), batch)
    assert shut < 0.95 and scalars(trainer, "gate/mean") == pytest.approx([1, 1, shut, shut], rel=1e-5)
    assert scalars(trainer, "focus/mean")[:2] == [0, 0] and scalars(trainer, "focus/mean")[2] > 0.01


@pytest.mark.parametrize("objective", [Schedule(), Floored(decay="linear"), Rescaled(base=Schedule())], ids=repr)
def test_a_run_without_an_end_is_one_line_for_what_depends_on_it(
    objective: Objective, pretrained: str, source: str, tmp_path: Path
) -> None:
    module = make_module(pretrained, objective=objective)
    with pytest.raises(UserError, match=r"needs an end: set --trainer\.max_epochs") as refused:
        bare_trainer(tmp_path, max_epochs=-1).fit(module, data(source))
    assert repr(objective) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("objective", [DEFT(), Floored(), Rescaled()], ids=repr)
def test_a_run_without_an_end_is_fine_for_what_does_not(
    objective: Objective, pretrained: str, source: str, tmp_path: Path
) -> None:
    class Enough(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= 3

    trainer = bare_trainer(tmp_path, Enough(), max_epochs=-1)
    trainer.fit(make_module(pretrained, objective=objective), data(source))
    assert trainer.global_step == 3


# --- rescaled -------------------------------------------------------------------------------------------------------


@heads
@windows
def test_each_rescaled_step_is_divided_by_the_mean_gate_of_those_before(
    size: int, accumulate: int, head: str, pretrained: str, source: str, tmp_path: Path
) -> None:
    (batch,) = batches_of(pretrained, source, 8)
    means: list[float] = []
    scales: list[float] = []

    def rescaled(model: Any) -> Loss:
        # Every window has the same tokens; weights 1, 1/2, 1/4 ... back in time.
        ages = [0.5**age for age in range(len(means))][::-1]
        past = sum(w * m for w, m in zip(ages, means, strict=True)) / sum(ages) if means else 1.0
        scales.append(1 / past)
        means.append(mean_gate(model, batch))
        return lambda logits, targets: deft(logits, targets) / past

    wanted = steps_by_hand(pretrained, batch, [rescaled] * 4)
    assert max(scales) > 1.1, "a scale of one shows nothing"
    module = make_module(pretrained, objective=Rescaled(decay=0.5), head=head, optimizer=slow_sgd)
    trainer = bare_trainer(tmp_path, max_epochs=4, accumulate_grad_batches=accumulate, logger=None)
    trainer.fit(module, data(source, batch_size=size))
    assert scalars(trainer, "objective/scale") == pytest.approx(scales, rel=1e-4)
    assert_trained_alike(module.model, wanted, pretrained)


def test_a_gate_that_is_shut_is_not_scaled_up_without_bound(pretrained: str, source: str, tmp_path: Path) -> None:
    module = make_module(pretrained, objective=Rescaled(base=Likelihood()), optimizer=still)
    trainer = bare_trainer(tmp_path, GateMonitor(), max_epochs=2, logger=None)
    trainer.fit(module, data(source))
    (batch,) = batches_of(pretrained, source, 8)
    with torch.no_grad():
        p = (-nll(*supervised(initial(pretrained), batch))).exp().mean().item()
    assert p < 0.01
    assert scalars(trainer, "objective/scale") == pytest.approx([1, 100])
    assert scalars(trainer, "gate/mean") == pytest.approx([p, 100 * p], rel=1e-4)


def test_tokens_weigh_alike_and_a_window_without_any_changes_no_mean(pretrained: str, tmp_path: Path) -> None:
    """Windows of 9, 0 and 2 tokens: the mean is over eleven."""
    examples = [random_example(1, 16, 9), random_example(2, 7, 0), random_example(3, 6, 2), random_example(4, 6, 2)]
    module = make_module(pretrained, objective=Rescaled(decay=0.9), optimizer=still)
    trainer = bare_trainer(tmp_path, logger=None)
    trainer.fit(module, loader(examples, 1))
    model = initial(pretrained)
    first, third = (mean_gate(model, next(iter(loader([examples[i]], 1)))) for i in (0, 2))
    assert abs(first - third) > 1e-3
    both = (0.9 * 0.9 * 9 * first + 2 * third) / (0.9 * 0.9 * 9 + 2)
    wanted = [1.0, 1 / first, 1 / first, 1 / both]
    assert scalars(trainer, "objective/scale") == pytest.approx(wanted, rel=1e-5)


def test_nothing_is_tracked_or_logged_where_nothing_is_rescaled(pretrained: str, source: str, tmp_path: Path) -> None:
    module = make_module(pretrained, objective=Schedule())
    trainer = bare_trainer(tmp_path, max_epochs=2, logger=None)
    trainer.fit(module, data(source))
    assert scalars(trainer, "objective/scale") == [] and len(scalars(trainer, "train/loss")) == 2
    assert module.normaliser.memory == ()


class Broken(SFTModule):
    """Its second step is not a number, statistics included."""

    def configure_model(self) -> None:
        super().configure_model()
        terms = self.batch_loss

        def broken(*args: Any) -> Any:
            output = terms(*args)
            if self.trainer.global_step != 1:
                return output
            stats = output.stats.map(lambda x: x if x.dtype == torch.bool else x * float("nan"))
            return output._replace(loss=output.loss * float("nan"), stats=stats)

        broken.context = terms.context  # type: ignore[attr-defined]
        self.batch_loss = broken


def test_a_step_that_is_left_out_leaves_the_mean_gate_alone(pretrained: str, source: str, tmp_path: Path) -> None:
    module = Broken(objective=Rescaled(), pretrained=pretrained, optimizer=still, on_nonfinite="skip")
    trainer = bare_trainer(tmp_path, max_epochs=3, logger=None)
    trainer.fit(module, data(source))
    assert module.skipped == 1
    (batch,) = batches_of(pretrained, source, 8)
    scale = 1 / mean_gate(initial(pretrained), batch)
    assert scalars(trainer, "objective/scale")[-1] == pytest.approx(scale, rel=1e-5)


# --- validation, and what is loaded ---------------------------------------------------------------------------------


def held_out(model: Any, loss: Loss, pretrained: str, tmp_path: Path) -> float:
    """Mean of a loss over the held-out tokens."""
    found = []
    with torch.no_grad():
        for batch in batches_of(pretrained, write_rows(tmp_path / "held.jsonl", HELD_OUT), 2):
            found.append(loss(*supervised(model, batch)))
    return torch.cat(found).mean().item()


def test_validation_uses_what_is_in_force_and_a_checkpoint_remembers_it(
    pretrained: str, source: str, tmp_path: Path
) -> None:
    loaded = data(source, validation_source=write_rows(tmp_path / "val.jsonl", HELD_OUT))
    module = make_module(pretrained, objective=Schedule(switch=0.6), optimizer=still)
    course, kept = Course(), Checkpoint(save_top_k=-1)
    trainer = bare_trainer(tmp_path, course, kept, max_epochs=4, num_sanity_val_steps=2, logger=None)
    trainer.fit(module, loaded)
    plain, gated = (held_out(initial(pretrained), loss, pretrained, tmp_path) for loss in (nll, deft))
    assert abs(plain - gated) > 0.1
    # Steps 1 to 3 have progress 0, 1/4 and 1/2.
    assert scalars(trainer, "val/loss") == pytest.approx([plain, plain, plain, gated], rel=1e-5)
    assert [objective.deformed for objective in (*course.checked, *course.validated)] == [NLL()] * 4 + [DEFT()]

    def validated(path: str | None) -> float:
        again = make_module(pretrained, objective=Schedule(switch=0.6))
        (found,) = bare_trainer(tmp_path).validate(again, loaded, ckpt_path=path, verbose=False, weights_only=True)
        return float(found["val/loss"])

    files = {path.name: str(path) for path in Path(kept.dirpath or "").glob("step*.ckpt")}
    assert validated(files["step=2.ckpt"]) == pytest.approx(plain, rel=1e-5)
    assert validated(files["step=4.ckpt"]) == pytest.approx(gated, rel=1e-5)
    assert validated(None) == pytest.approx(gated, rel=1e-5), "without a run it is what it ends as"


def test_a_rescaled_checkpoint_validates_to_the_loss_that_fit_logged(
    pretrained: str, source: str, tmp_path: Path
) -> None:
    loaded = data(source, validation_source=write_rows(tmp_path / "val.jsonl", HELD_OUT))
    kept = Checkpoint()
    trainer = bare_trainer(tmp_path, kept, max_epochs=3, logger=None)
    trainer.fit(make_module(pretrained, objective=Rescaled(), optimizer=slow_sgd), loaded)
    logged, scale = scalars(trainer, "val/loss")[-1], scalars(trainer, "objective/scale")[-1]
    again = make_module(pretrained, objective=Rescaled())
    found = bare_trainer(tmp_path).validate(again, loaded, ckpt_path=kept.best_model_path, verbose=False)
    assert found[0]["val/loss"] == pytest.approx(logged, rel=1e-5)
    gated = held_out(again.model.double(), deft, pretrained, tmp_path)
    assert abs(scale - 1) > 0.05 and logged == pytest.approx(scale * gated, rel=1e-4)
    saved = torch.load(kept.best_model_path, weights_only=True)["deft_lightning"]
    assert saved["training"][1] == pytest.approx(1 / scale) and saved["objective"] == repr(Rescaled())


def test_a_checkpoint_from_before_there_was_a_course_is_loaded(pretrained: str, source: str, tmp_path: Path) -> None:
    kept = Checkpoint()
    bare_trainer(tmp_path, kept).fit(make_module(pretrained, optimizer=still), data(source))
    saved = torch.load(kept.best_model_path, weights_only=True)
    for name in ("training", "gates"):
        del saved["deft_lightning"][name]
    torch.save(saved, tmp_path / "old.ckpt")
    module = make_module(pretrained, objective=Rescaled(base=Schedule()))
    trainer = bare_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, data(source), ckpt_path=str(tmp_path / "old.ckpt"))
    assert trainer.global_step == 2 and module.current_objective.deformed == DEFT()


def test_a_second_fit_starts_its_schedule_anew(pretrained: str, source: str, tmp_path: Path) -> None:
    module = make_module(pretrained, objective=Schedule(then=DFT(), switch=0.5), optimizer=still)
    for _ in range(2):
        course = Course()
        bare_trainer(tmp_path, course, max_epochs=2).fit(module, data(source))
        assert [objective.deformed for objective in course.trained] == [NLL(), None]


def test_micro_batches_of_a_fit_that_broke_off_are_forgotten(pretrained: str, source: str, tmp_path: Path) -> None:
    class Break(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("enough")

    module = make_module(pretrained, objective=Rescaled(), optimizer=still)
    with pytest.raises(RuntimeError, match="enough"):
        bare_trainer(tmp_path, Break(), accumulate_grad_batches=2).fit(module, data(source, batch_size=4))
    bare_trainer(tmp_path, accumulate_grad_batches=2).fit(module, data(source, batch_size=4))
    (batch,) = batches_of(pretrained, source, 8)
    assert module.normaliser.memory[1] == module.tokens_seen == len(supervised(initial(pretrained), batch)[1])
