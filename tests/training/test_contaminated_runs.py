"""The noise model in real runs: one set of rates however a run is cut up, kept by checkpoints, not by bad steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contaminated_worker import BEST, NOISY, found, train
from lightning.pytorch import Callback
from start_ranks import run_ranks
from test_module import loader
from worlds import (
    adam,
    bare_trainer,
    constant,
    largest_difference,
    random_example,
    read_events,
    same_state,
    save_tiny_llama,
    write_rows,
)

from deft_lightning import SFTModule
from deft_lightning.callbacks import Checkpoint
from deft_lightning.data.noise import Noise, ResponseSwap
from deft_lightning.errors import UserError
from deft_lightning.objectives import NLL, Contaminated, Objective

pytestmark = pytest.mark.slow

EXACT = 2e-5
KINDS: list[Objective] = [
    NOISY,
    Contaminated(level="token", decay=0.5, start=0.3),
    Contaminated(level="answer", chance="marginal", answer_chance="marginal", decay=0.5, start=0.3, opening=0.5),
]
ANSWERS = ["2", "red, green and blue", "Hello! How are you?", "y", "c a t", "no", "one two three four five", "!!"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("noisy")
    save_tiny_llama(root / "pretrained", 0.6, num_hidden_layers=1)
    rows = [{"id": f"r{i}", "question": f"q{i}", "answer": f"{a} {i % 3}"} for i, a in enumerate(ANSWERS * 4)]
    write_rows(root / "rows.jsonl", rows)
    return root


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert largest_difference(one["weights"], other["weights"]) < EXACT
    assert one["rates"] == pytest.approx(other["rates"], abs=EXACT)
    assert (one["marginal"] is None) == (other["marginal"] is None)
    if one["marginal"] is not None:
        assert one["marginal"].sum().item() == pytest.approx(1.0, abs=1e-6)
        assert float((one["marginal"] - other["marginal"]).abs().max()) < EXACT


@pytest.mark.parametrize("objective", KINDS, ids=repr)
def test_micro_batches_and_heads_change_neither_rates_nor_weights(objective: Objective, world: Path) -> None:
    whole = train(world, objective=objective)
    rates = whole.normaliser.memory
    assert len(rates) == 2 and any(abs(rate - 0.3) > 0.05 for rate in rates), "rates that stay show nothing"
    apart = train(world, {"batch_size": 2}, objective=objective, accumulate_grad_batches=4)
    dense = train(world, objective=objective, model={"head": "dense"})
    for other in (apart, dense):
        assert_same(found(other), found(whole))


@pytest.mark.parametrize("objective", KINDS, ids=repr)
def test_packing_judges_answers_as_rows_of_their_own(objective: Objective, world: Path) -> None:
    """A whole epoch in one step: all examples, whatever rows they are in."""
    plain = train(world, objective=objective, accumulate_grad_batches=100, max_epochs=3)
    packed = train(
        world, {"packing": True, "max_length": 120}, objective=objective, accumulate_grad_batches=100, max_epochs=3
    )  # fmt: skip
    assert plain.trainer.global_step == packed.trainer.global_step == 3
    assert_same(found(packed), found(plain))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["unigram", "best"])
def test_two_ranks_are_one_process(kind: str, strategy: str, world: Path) -> None:
    run_ranks(Path(__file__).with_name("contaminated_worker.py"), world, strategy, kind)
    one = train(world, objective=BEST if kind == "best" else NOISY)
    assert_same(torch.load(world / f"{strategy}.pt", weights_only=True), found(one))


@pytest.mark.parametrize("cut", [3, 4])  # in the middle of an epoch of four steps, and at its end
@pytest.mark.parametrize("objective", KINDS, ids=repr)
def test_resume_is_bit_exact(cut: int, objective: Objective, world: Path, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= cut

    whole = train(world, objective=objective)
    saved = Checkpoint(dirpath=str(tmp_path))
    train(world, None, saved, Stop(), objective=objective)
    second = train(world, objective=objective, ckpt_path=str(tmp_path / "last.ckpt"))
    assert whole.trainer.global_step == second.trainer.global_step == 8
    assert same_state(whole.model, second.model) and whole.normaliser.memory == second.normaliser.memory
    one, other = (found(module)["marginal"] for module in (whole, second))
    assert (one is None) or torch.equal(one, other)
    about = torch.load(tmp_path / "last.ckpt", weights_only=True)["deft_lightning"]
    assert len(about["rates"]) == 2 and ("marginal" in about) == (one is not None)


class Broken(SFTModule):
    """Its third step is not a number, statistics included."""

    def configure_model(self) -> None:
        super().configure_model()
        terms = self.batch_loss

        def broken(*args: Any) -> Any:
            output = terms(*args)
            if self.trainer.fit_loop.total_batch_idx != 2:
                return output
            log_prob = output.stats.log_prob * float("nan")
            return output._replace(loss=output.loss * float("nan"), stats=output.stats._replace(log_prob=log_prob))

        broken.context = terms.context  # type: ignore[attr-defined]
        self.batch_loss = broken


def test_a_step_that_is_left_out_leaves_rates_and_mean_prediction_alone(world: Path) -> None:
    class Course(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[Any, Any]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            marginal = pl_module.batch_loss.context.marginal
            self.seen.append((pl_module.normaliser.memory, marginal.mean.clone()))

    course = Course()
    module = train(world, None, course, kind=Broken, model={"on_nonfinite": "skip"}, max_epochs=1)
    assert module.skipped == 1
    before, at, after = course.seen[1:4]
    assert at[0] == before[0] != after[0]
    assert torch.equal(at[1], before[1]) and not torch.equal(after[1], at[1])
    assert all(0.01 <= rate <= 0.95 for rate in after[0])


def test_a_run_begins_with_the_rate_of_its_sample_and_one_that_goes_on_keeps_its_own(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that knows the names, of which half are swapped."""

    class Rates(Callback):
        def __init__(self, stop: int = 100) -> None:
            self.seen, self.stop = list[Any](), stop

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.seen.append(pl_module.current_objective.rates)

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= self.stop

    train(world, objective=Contaminated(level="token"), max_epochs=1)
    assert "before the first step" not in caplog.text
    data = {"noise": Noise(ops=[ResponseSwap(rate=0.5, exact=True)])}
    save_tiny_llama(tmp_path / "young" / "pretrained", 0.6, num_hidden_layers=2)
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnop"), (32, 6)).tolist()
    for folder in (tmp_path, tmp_path / "young"):
        names = [{"question": f"{i:02d}?", "answer": "".join(row)} for i, row in enumerate(letters)]
        write_rows(folder / "rows.jsonl", names)
    teach: dict[str, Any] = {"max_epochs": 200, "model": {"optimizer": partial(adam, lr=3e-3)}}
    taught = train(tmp_path / "young", {"noise": Noise()}, objective=NLL(), **teach)
    taught.trainer.export(taught, output=str(tmp_path / "pretrained"), datamodule=taught.trainer.datamodule)
    counted = Contaminated(decay=0.5, answer_chance="unigram")
    first, second = Rates(stop=2), Rates()
    saved = Checkpoint(dirpath=str(tmp_path / "kept"))
    train(tmp_path, data, saved, first, objective=counted)
    told = caplog.text
    caplog.clear()
    assert 0.3 < first.seen[0].answers < 0.7 and first.seen[0].tokens == 0.01
    assert f"noise/estimated before the first step, on 32 answers: {first.seen[0].answers:.2f}" in told
    after = train(tmp_path, data, second, objective=counted, ckpt_path=str(tmp_path / "kept" / "last.ckpt"))
    assert "before the first step" not in caplog.text
    assert second.seen[0] != first.seen[0] and len(second.seen) == 6
    whole = train(tmp_path, data, objective=counted)
    assert same_state(whole.model, after.model) and whole.normaliser.memory == after.normaliser.memory


def test_rates_are_logged(world: Path) -> None:
    module = train(world, logger=None)
    events = read_events(module.trainer.log_dir)
    logged = [event.value for event in events.Scalars("noise/estimated")]
    assert logged[0] == pytest.approx(0.3) and len(logged) == 8 and abs(logged[-1] - 0.3) > 0.02
    assert len(events.Scalars("noise/estimated_tokens")) == 8


def test_without_the_counts_of_the_data_module_it_is_one_line(world: Path, tmp_path: Path) -> None:
    examples = [random_example(seed, 12, 4) for seed in range(8)]
    module = SFTModule(Contaminated(answer_chance=None), pretrained=str(world / "pretrained"), scheduler=constant)
    with pytest.raises(UserError, match=r"^Contaminated\(.*training labels are.*InstructionDataModule") as refused:
        bare_trainer(tmp_path).fit(module, loader(examples, 4))
    assert "\n" not in str(refused.value)
    module = SFTModule(
        Contaminated(chance="marginal", answer_chance=None), pretrained=str(world / "pretrained"), scheduler=constant
    )
    bare_trainer(tmp_path).fit(module, loader(examples, 4))
    assert len(module.normaliser.memory) == 2, "what the model itself says needs no counts"


def test_a_validation_after_a_run_keeps_its_mean_prediction(world: Path) -> None:
    module = train(world, {"validation_fraction": 0.25}, objective=BEST, max_epochs=1)
    mean = found(module)["marginal"]
    assert float(mean.max()) > 2 / len(mean), "it is no longer uniform"
    bare_trainer(world / "again").validate(module, datamodule=module.trainer.datamodule, verbose=False)
    assert torch.equal(found(module)["marginal"], mean)
