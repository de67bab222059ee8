"""The noise rate without truth: against EM worked out by hand, on real runs, and when it speaks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import AutoModelForCausalLM
from worlds import bare_trainer, read_events, save_tiny_llama, split_data, still, sums, write_rows

from deft_lightning import SFTModule
from deft_lightning.callbacks import Checkpoint, NoiseEstimate, SFTProgressBar
from deft_lightning.data.noise import Noise, ResponseSwap
from deft_lightning.errors import UserError
from deft_lightning.objectives import NLL, Contaminated, Objective


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("estimate")
    save_tiny_llama(root / "model", 0.5)
    write_rows(root / "rows.jsonl", sums(30))
    return root


def run(
    world: Path, root: Path, objective: Objective, *callbacks: Any, swapped: float = 0.0, **options: Any
) -> tuple[SFTModule, Any]:
    ops = [ResponseSwap(rate=swapped)] if swapped else []
    data = split_data(
        str(world / "rows.jsonl"), tokenizer=str(world / "model"), cache_dir=str(root / "cache"), noise=Noise(ops=ops)
    )
    module = SFTModule(objective, pretrained=str(world / "model"), optimizer=still, scheduler=None)
    logger = TensorBoardLogger(root, name="", version="run")
    trainer = bare_trainer(root, *callbacks, logger=logger, limit_val_batches=0, **options)
    trainer.fit(module, datamodule=data)
    return module, data


def scalars(root: Path, tag: str) -> list[float]:
    return [event.value for event in read_events(root / "run").Scalars(tag)]


def by_hand(world: Path, data: Any) -> list[tuple[float, float, float]]:
    """Estimates of answers and tokens, and the true share of answers, batch by batch, in float64 and numpy alone."""
    model = AutoModelForCausalLM.from_pretrained(world / "model").double()
    counts = np.zeros(model.config.vocab_size)
    train = data.splits["train"].examples
    for at in range(len(train)):
        labels = train[at].labels
        np.add.at(counts, labels[labels != -100], 1)
    unigram = 0.99 * counts / counts.sum() + 0.01 / len(counts)
    answers, tokens, result = 0.01, 0.01, []
    for number, batch in enumerate(data.train_dataloader(), start=1):
        with torch.no_grad():
            log_prob = model(batch["input_ids"]).logits[:, :-1].log_softmax(-1).numpy()
        noise, token_noise, kept, wrong = [], 0.0, 0.0, []
        for row in range(len(batch["labels"])):
            labels = batch["labels"][row, 1:].numpy()
            at = np.flatnonzero(labels != -100)
            p, u = np.exp(log_prob[row, at, labels[at]]), unigram[labels[at]]
            mixture = (1 - tokens) * p + tokens * u
            odds = np.prod(mixture / u) * (1 - answers) / answers
            right = odds / (1 + odds)
            noise.append(1 - right)
            token_noise += right * (1 - (1 - tokens) * p / mixture).sum()
            kept += right * len(at)
            wrong.append(bool(batch["noise_code"][row].any()))
        share = max(1 / number, 0.1)
        answers, tokens = (
            float(np.clip((1 - share) * old + share * new, 0.01, 0.95))
            for old, new in ((answers, np.mean(noise)), (tokens, token_noise / kept))
        )
        result.append((answers, tokens, float(np.mean(wrong))))
    return result


def test_the_estimate_is_em_on_the_tokens_of_logged_steps(world: Path, tmp_path: Path) -> None:
    _, data = run(world, tmp_path, NLL(), NoiseEstimate(), swapped=0.5)
    answers, tokens, true = zip(*by_hand(world, data), strict=True)
    assert len(answers) > 4 and 0 < max(true) < 1
    assert scalars(tmp_path, "noise/estimated") == pytest.approx(answers, abs=1e-4)
    assert scalars(tmp_path, "noise/estimated_tokens") == pytest.approx(tokens, abs=1e-4)
    assert scalars(tmp_path, "noise/true") == pytest.approx(true, abs=1e-6), "of steps without noise too"


def test_an_objective_with_rates_of_its_own_logs_those(world: Path, tmp_path: Path) -> None:
    module, _ = run(world, tmp_path, Contaminated(chance="unigram", answer_chance=None), NoiseEstimate(), max_steps=4)
    logged = scalars(tmp_path, "noise/estimated")
    assert len(logged) == 4 and logged[0] == pytest.approx(0.01)
    assert logged[-1] == pytest.approx(module.current_objective.rates.answers)  # type: ignore[attr-defined]


def test_without_noise_there_is_no_true_rate(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path, NLL(), NoiseEstimate(), max_steps=2)
    assert "noise/true" not in read_events(tmp_path / "run").Tags()["scalars"]


def test_a_run_that_goes_on_goes_on_estimating(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "whole", NLL(), NoiseEstimate(), swapped=0.5)
    run(world, tmp_path / "half", NLL(), NoiseEstimate(), Checkpoint(every_n_train_steps=3), swapped=0.5, max_steps=3)
    state = next((tmp_path / "half").rglob("*.ckpt"))
    data = split_data(
        str(world / "rows.jsonl"), tokenizer=str(world / "model"), cache_dir=str(tmp_path / "cache"),
        noise=Noise(ops=[ResponseSwap(rate=0.5)]),
    )  # fmt: skip
    module = SFTModule(NLL(), pretrained=str(world / "model"), optimizer=still, scheduler=None)
    logger = TensorBoardLogger(tmp_path / "on", name="", version="run")
    trainer = bare_trainer(
        tmp_path, NoiseEstimate(), Checkpoint(every_n_train_steps=100), logger=logger, limit_val_batches=0
    )
    trainer.fit(module, datamodule=data, ckpt_path=str(state))
    whole = scalars(tmp_path / "whole", "noise/estimated")
    assert scalars(tmp_path / "on", "noise/estimated") == whole[3:]


class Reports:
    """What an estimate is told in a row of reports: a module that logs to nowhere, and rates that it reaches."""

    def __init__(self, rates: list[float]) -> None:
        self.watch = NoiseEstimate()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for rate in rates:
                self.watch.rates = (rate, 0.01)
                self.watch.recent.append(rate)
                self.watch._warn()
        self.lines = [str(warning.message) for warning in caught if "noise/estimated" in str(warning.message)]


@pytest.mark.parametrize(
    ("rates", "speaks"),
    [
        ([0.4] * 5, True), ([0.4] * 20, True), ([0.4] * 4, False), ([0.3] * 20, False),
        ([0.9, 0.8, 0.6, 0.5, 0.4, 0.36], False),  # it still falls: the model is learning
        ([0.9, 0.7, 0.45, 0.44, 0.45, 0.43, 0.44], True),
    ],
)  # fmt: skip
def test_it_warns_once_when_it_stays_above_a_third(rates: list[float], speaks: bool) -> None:
    reports = Reports(rates)
    assert len(reports.lines) == int(speaks)
    if speaks:
        assert "Systematic noise is not detected" in reports.lines[0] and "%" in reports.lines[0]


def test_another_chance_is_one_line() -> None:
    with pytest.raises(UserError, match=r"noise_estimate\.chance must be unigram or unprompted, not 'luck'"):
        NoiseEstimate(chance="luck")  # type: ignore[arg-type]


def test_a_pretrained_model_is_told_what_word_frequencies_do_not_see(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = []
    for name, objective, chance in (
        ("plain", NLL(), "unigram"), ("asked", NLL(), "unprompted"), ("own", Contaminated(level="token"), "unigram"),
    ):  # fmt: skip
        caplog.clear()
        with caplog.at_level("INFO"):
            run(world, tmp_path / name, objective, NoiseEstimate(chance=chance), max_steps=1)  # type: ignore[arg-type]
        said.append(sum("--noise_estimate.chance unprompted" in record.getMessage() for record in caplog.records))
    assert said == [1, 0, 0]


def test_the_estimate_is_in_the_progress_bar(world: Path, tmp_path: Path) -> None:
    bar = SFTProgressBar()
    module, _ = run(world, tmp_path, NLL(), NoiseEstimate(), bar, max_steps=3)
    shown = bar.get_metrics(module.trainer, module)
    assert shown["noise"] == pytest.approx(scalars(tmp_path, "noise/estimated")[-1], abs=1e-3)
