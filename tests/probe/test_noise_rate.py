"""The noise rate before training: against draws of which the truth is known, and against EM as training does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from worlds import write_rows

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.data.loading.company import Company
from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.models.unprompted import UnpromptedReader
from deft_lightning.objectives import NLL, Contaminated, Objective
from deft_lightning.probe.bare import Bare, bare_pass
from deft_lightning.probe.evidence import GRID, Answers, EvidenceTally
from deft_lightning.probe.rate import measured, noise_rate, rate_record
from deft_lightning.probe.report import table

WORDS = 30
ROWS = [
    {"id": f"r{i}", "question": f"{'please ' * (i % 4)}repeat {word}", "answer": " ".join([word] * (1 + i % 3))}
    for i, word in enumerate("ab cat dog elephant ox fox".split())
]
PRETRAINED = {"spread": 0.6}


class Draws:
    """Answers drawn from the two-level noise model itself, by a model that gives 0.9 to one token of thirty.

    Args:
        noise: Share of answers that are noise, each token of them from the unigram.
        tokens: Share of the other tokens that are.
        seed: Of the draws.
        count: Answers, of 2 to 9 tokens.
    """

    def __init__(self, noise: float, tokens: float, seed: int = 0, count: int = 400) -> None:
        draw = np.random.default_rng(seed)
        self.unigram = draw.dirichlet(np.full(WORDS, 2.0))
        self.counts = draw.integers(2, 10, count)
        self.wrong = draw.random(count) < noise
        row = np.repeat(np.arange(count), self.counts)
        favourite = draw.integers(0, WORDS, len(row))
        said = np.where(draw.random(len(row)) < 0.9, favourite, draw.integers(0, WORDS, len(row)))
        self.noisy = self.wrong[row] | (draw.random(len(row)) < tokens)
        label = np.where(self.noisy, draw.choice(WORDS, len(row), p=self.unigram), said)
        p = np.where(label == favourite, 0.9 + 0.1 / WORDS, 0.1 / WORDS)
        sure = torch.full((len(row),), 0.82, dtype=torch.float64)
        self.labels, self.row = torch.from_numpy(label), torch.from_numpy(row)
        self.stats = TokenStats(torch.from_numpy(p).log(), sure, sure, self.labels == torch.from_numpy(favourite))

    def answers(self, split: int = 1, bare: Bare | None = None) -> Answers:
        """Return what the probe keeps of them, read in so many batches, the last one first."""
        tally = EvidenceTally(torch.from_numpy(self.unigram).log(), 1)
        for places in np.array_split(np.arange(len(self.counts)), split)[::-1]:
            keep = torch.arange(int(self.counts.max())) < torch.from_numpy(self.counts[places])[:, None]
            own = (self.row >= int(places[0])) & (self.row <= int(places[-1]))
            codes = torch.from_numpy(self.noisy).long()[own]
            tally.update(self.stats.select(own), self.labels[own], keep, places.tolist(), codes, bare)
        return tally.answers()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("noise", "tokens"), [(0.0, 0.0), (0.4, 0.0), (0.6, 0.02), (0.1, 0.15)])
def test_the_estimate_is_right(noise: float, tokens: float, seed: int) -> None:
    draws = Draws(noise, tokens, seed)
    answers = draws.answers()
    found, true = noise_rate(answers), float(draws.wrong.mean())
    # Some noise is said by the model too: a token of the unigram that it favours.
    assert found.rates.answers == pytest.approx(max(true, 0.01), abs=0.04)
    assert found.rates.tokens == pytest.approx(max(tokens, 0.01), abs=0.02)
    assert found.low <= max(true, 0.01) <= found.high
    assert found.high - found.low < 0.12
    if noise:
        record = rate_record(answers, found)
        assert record["tokens_all"] == pytest.approx(float(draws.noisy.mean()), abs=0.04)
        assert found.right[draws.wrong].mean() < 0.15 and found.right[~draws.wrong].mean() > 0.85


def test_it_ends_where_the_steps_of_training_would() -> None:
    draws = Draws(0.3, 0.1)
    found = noise_rate(draws.answers())
    chance = torch.from_numpy(draws.unigram).log()[draws.labels]
    stats = draws.stats._replace(chance=chance, example=draws.row)
    objective = Contaminated(decay=0.0)
    for _ in range(300):
        objective = objective.updated(stats)
    assert found.rates == pytest.approx(objective.rates, abs=2e-3)
    posterior = objective.posterior(stats)
    first = torch.cat([torch.tensor([True]), draws.row[1:] != draws.row[:-1]])
    assert found.right == pytest.approx(posterior.answer[first].numpy(), abs=0.02)


def test_batches_and_their_order_do_not_matter() -> None:
    one, other = Draws(0.3, 0.1).answers(1), Draws(0.3, 0.1).answers(7)
    for name in Answers.__dataclass_fields__:
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-9), name
    assert noise_rate(one)[:3] == noise_rate(other)[:3] == noise_rate(one)[:3]


def test_few_answers_that_look_alike_are_no_certainty() -> None:
    few, many = (noise_rate(Draws(0.0, 0.0, count=count).answers()) for count in (10, 400))
    edge = 1 - 0.05**0.1  # at this rate ten draws without an exception are seen in one of twenty cases
    assert few.high == pytest.approx(edge) and few.low == 0.01
    assert many.high < 0.03
    few = noise_rate(Draws(1.0, 0.0, count=10).answers())
    assert few.low < 1 - edge and few.high == 0.95


def test_the_better_of_two_chances_counts_for_an_answer() -> None:
    draws = Draws(0.5, 0.0)
    known = torch.from_numpy(draws.unigram).log()[draws.labels].numpy()
    parts = np.split(known, np.cumsum(draws.counts)[:-1])
    # Without the prompt the model finds the answers of even places twice as probable a token, the others half.
    bare = Bare(
        {at: part + (np.log(2) if at % 2 == 0 else -np.log(2)) for at, part in enumerate(parts)}, frozenset({2}), 0
    )
    plain, asked = draws.answers(), draws.answers(bare=bare)
    even = (np.arange(len(plain)) % 2 == 0) & (np.arange(len(plain)) != 2)
    assert (asked.asked == even).all() and not plain.asked.any()
    log_p, row = draws.stats.log_prob.numpy(), draws.row.numpy()
    chance = np.concatenate([part + np.log(2) * one for part, one in zip(parts, even, strict=True)])
    choice = 1 - np.exp(chance)  # what chance is sure of is hardly evidence
    assert asked.gain == pytest.approx(np.bincount(row, choice * (log_p - chance)), abs=1e-5)
    for place, rate in enumerate(1 / (1 + np.exp(-GRID))):
        # Both have wrong tokens from the unigram.
        model, noise = ((1 - rate) * np.exp(values) + rate * np.exp(known) for values in (log_p, chance))
        assert asked.evidence[place] == pytest.approx(np.bincount(row, choice * np.log(model / noise)), abs=1e-5)
    assert asked.kept == pytest.approx(plain.kept)


def test_what_an_objective_is_recommended_by() -> None:
    draws = Draws(0.4, 0.0)
    answers = draws.answers()
    found = measured(answers, noise_rate(answers))
    per_token = (draws.stats.log_prob - torch.from_numpy(draws.unigram).log()[draws.labels]).numpy()
    per_answer = np.bincount(draws.row.numpy(), per_token)
    assert found["gain_token"] == pytest.approx(per_token.mean())
    assert found["gain_answer"] == pytest.approx(per_answer.mean())
    assert found["gain_positive"] == pytest.approx((per_answer > 0).mean()) and 0.5 < found["gain_positive"] < 0.7
    assert found["sure"] == 1.0 and found["sure_right"] == pytest.approx(draws.stats.correct.double().mean())
    assert found["sure_right"] < 0.65 and found["sure_right_kept"] > 0.85


# --- the second pass ------------------------------------------------------------------------------------------------


def set_up(root: Path, pretrained: str, source: Any, objective: Objective) -> tuple[Any, Any]:
    """Return a module with its model and data, ready to be probed."""
    module, data = SFTModule(pretrained=pretrained, objective=objective), InstructionDataModule(
        source, validation_fraction=0.0, tokenizer=pretrained
    )  # fmt: skip
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=str(root))
    trainer.probe(module, data)
    module.eval()
    return module, data


@pytest.mark.parametrize("alone", [False, True])
def test_second_pass_is_the_model_without_the_prompt(
    alone: bool, pretrained: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = set_up(tmp_path, pretrained, source, NLL())

    def settle(reader: UnpromptedReader, batches: Any) -> None:
        reader.alone, reader.once = alone, True

    monkeypatch.setattr(UnpromptedReader, "settle", settle)
    with torch.no_grad():
        found = bare_pass(module, data, "train", [4, 1, 3], torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(pretrained).double().eval()
    examples = [data.example("train", at) for at in range(data.size("train"))]
    lengths = np.array([len(example.input_ids) for example in examples])
    company = Company(len(examples), examples.__getitem__, lengths)
    assert found.log_prob.keys() == {1, 3, 4} and not found.whole and company.ahead
    for at in (1, 3, 4):
        answer = company.of(at, examples[at])
        ahead = answer.ahead[: answer.frame] if alone else answer.ahead
        ids = np.concatenate([ahead, answer.input_ids])
        with torch.no_grad():
            log_pi = model(input_ids=torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
        own = examples[at].labels[examples[at].labels >= 0]
        wanted = log_pi[-1 - len(own) : -1].gather(-1, torch.from_numpy(own)[:, None]).squeeze(-1).tolist()
        assert found.log_prob[at] == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert found.read > sum(len(company.of(at, examples[at]).input_ids) for at in (1, 3, 4))


def test_text_without_a_prompt_is_compared_with_frequencies(pretrained: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "text.jsonl", [{"text": f"some words {i}"} for i in range(5)])
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=str(tmp_path))
    data = InstructionDataModule(source, validation_fraction=0.0, tokenizer=pretrained)
    report = trainer.probe(SFTModule(pretrained=pretrained), data)
    estimate = report["noise_estimate"]
    assert estimate["second_pass"] == {"read": 0, "share": 0.0, "whole": 5} and estimate["asked"] == 0.0
    assert "5 answers have no prompt" in " ".join(table(report).split())


@pytest.mark.parametrize("unprompted", [True, False])
def test_an_objective_that_compares_with_it_is_probed(
    unprompted: bool, pretrained: str, source: str, tmp_path: Path
) -> None:
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=str(tmp_path))
    data = InstructionDataModule(source, validation_fraction=0.0, tokenizer=pretrained)
    module = SFTModule(pretrained=pretrained, objective=Contaminated(chance="unprompted"))
    if not unprompted:
        with pytest.raises(UserError, match="--unprompted"):
            trainer.probe(module, data, unprompted=False)
        return
    report = trainer.probe(module, data)
    module.eval()
    positions = list(range(len(ROWS)))
    with torch.no_grad():
        bare = bare_pass(module, data, "train", positions, torch.device("cpu"))
        gates: list[Tensor] = []
        for at in positions:
            ((_, batch),) = data.batches_of("train", [at])
            stats, keep = module.statistics({**batch, "unprompted": bare.spread(batch["labels"], [at])})
            assert stats.chance.tolist() == pytest.approx(bare.log_prob[at].tolist())
            gates.append(module.objective.gate(stats))
            assert keep.sum() == len(stats.log_prob)
    assert report["objectives"][0]["gate"] == pytest.approx(float(torch.cat(gates).mean()), rel=1e-4)


def test_frequencies_alone_cost_no_second_pass(pretrained: str, source: str, tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=str(tmp_path))
    data = InstructionDataModule(source, validation_fraction=0.0, tokenizer=pretrained)
    report = trainer.probe(SFTModule(pretrained=pretrained), data, unprompted=False)
    assert report["noise_estimate"]["second_pass"] is None and report["noise_estimate"]["asked"] == 0.0
    assert "--unprompted false" in table(report)
    other = trainer.probe(SFTModule(pretrained=pretrained), data)
    assert other["noise_estimate"]["second_pass"]["whole"] == 0
    assert 0 < other["noise_estimate"]["second_pass"]["share"] < 1
    # The rest of the report does not depend on it.
    about = ("noise_estimate", "measured", "recommendation", "suspicious")
    assert {k: v for k, v in report.items() if k not in about} == {k: v for k, v in other.items() if k not in about}
