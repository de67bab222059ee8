"""The verb probe: its table against dense softmax in float64, its ranking against errors put there on purpose."""

from __future__ import annotations

import gc
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor
from transformers import AutoModelForCausalLM
from worlds import write_rows

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.__main__ import main
from deft_lightning.data.noise import Noise, ResponseSwap, TokenReplace
from deft_lightning.errors import UserError
from deft_lightning.figures import TokenSample
from deft_lightning.functional import TokenContext, TokenStats
from deft_lightning.metrics import exact_auroc
from deft_lightning.models.unprompted import UnpromptedReader
from deft_lightning.objectives import (
    DEFT,
    EAFT,
    NLL,
    Cayley,
    Floored,
    Objective,
    Rescaled,
    Schedule,
    Tsallis,
    known_objectives,
)
from deft_lightning.probe import conflict, example_score
from deft_lightning.probe.audit import AuditTally, Suspect, describe, write_lines
from deft_lightning.probe.figure import drawing
from deft_lightning.probe.reading import Read
from deft_lightning.probe.sample import Sampler, mixed
from deft_lightning.probe.tally import Tally

ROWS = [
    {"id": f"r{i}", "question": q, "answer": a}
    for i, (q, a) in enumerate(
        [("1+1?", "2"), ("Name three colours.", "red, green and blue"), ("Hi", "Hello! How are you?"), ("x", "yes"),
         ("Spell cat", "c a t"), ("Yes or no", "no"), ("Count", "one two three four five"), ("?", "!!"),
         ("Say it", "it")]
    )
]  # fmt: skip
PRETRAINED = {"spread": 0.6}  # sure of itself here and there


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare this package's objectives alone: those of other tests are in the class tree too."""
    known = {name: cls for name, cls in known_objectives().items() if cls.__module__.startswith("deft_lightning.")}
    monkeypatch.setattr("deft_lightning.probe.tally.known_objectives", lambda: known)


def probed(
    root: Path, pretrained: str, source: str, data: dict[str, Any] | None = None, **options: Any
) -> tuple[dict[str, Any], InstructionDataModule]:
    """Probe with the Python interface; ``options`` for the module are those it knows, the rest are the verb's."""
    model = {name: options.pop(name) for name in ("objective", "head") if name in options}
    loader = InstructionDataModule(source, **{"validation_fraction": 0.0, "batch_size": 16, **(data or {})})
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=str(root))
    return trainer.probe(SFTModule(pretrained=pretrained, **model), loader, **options), loader


@dataclass
class Dense:
    """What a softmax over dense logits in float64 says of every supervised token, one example at a time."""

    p: Tensor
    entropy: Tensor
    collision: Tensor
    top: Tensor
    correct: Tensor
    codes: Tensor

    def entropy_of_largest(self, k: int) -> Tensor:
        share = self.top[:, :k] / self.top[:, :k].sum(1, keepdim=True)
        return -(share * share.log()).sum(1)


def dense(pretrained: str, data: InstructionDataModule) -> Dense:
    model = AutoModelForCausalLM.from_pretrained(pretrained).double().eval()
    found: list[list[Tensor]] = []
    for at in range(data.size("train")):
        example = data.example("train", at)
        with torch.no_grad():
            pi = model(input_ids=torch.from_numpy(example.input_ids)[None]).logits[0].softmax(-1)
        for t in range(1, len(example.labels)):
            if (label := int(example.labels[t])) >= 0:
                row = pi[t - 1]
                found.append([
                    row[label], -(row * row.log()).sum(), (row**2).sum(), row.sort(descending=True).values,
                    row.argmax() == label, torch.tensor(int(example.noise_code[t])),
                ])  # fmt: skip
    return Dense(*(torch.stack(column) for column in zip(*found, strict=True)))


def gates_by_hand(truth: Dense) -> dict[str, Tensor]:
    """The gates of the README's table, written out."""
    p, focal = truth.p, 1 - truth.p
    return {
        "NLL": torch.ones_like(p), "Likelihood": p, "DFT": p, "Tsallis": p.sqrt(), "Cayley": p ** (p / (2 - p)),
        "DEFT": p**truth.collision, "EAFT": truth.entropy_of_largest(20) / math.log(20),
        "Focal": focal**2 - 2 * p * focal * p.log(), "Truncated": (p >= 0.5).double(),
        "Floored": (p**truth.collision).clamp_min(0.1),
    }  # fmt: skip


# --- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("head", ["fused", "dense"])
@pytest.mark.parametrize("chosen", [DEFT(), EAFT(k=5), Cayley(floor=0.5)], ids=repr)
def test_table_is_that_of_a_dense_softmax_in_float64(
    chosen: Objective, head: str, pretrained: str, source: str, tmp_path: Path
) -> None:
    noise = Noise(ops=[TokenReplace(rate=0.4)])
    report, data = probed(tmp_path, pretrained, source, {"noise": noise}, objective=chosen, head=head)
    truth = dense(pretrained, data)
    p, noisy = truth.p, truth.codes > 0
    assert report["tokens"] == len(p) > 80 and 20 < int(noisy.sum()) < 60
    wanted = {
        "p": p.mean(), "entropy": truth.entropy.mean(), "renyi2": -truth.collision.log().mean(),
        "collision": truth.collision.mean(), "nll": -p.log().mean(), "accuracy": truth.correct.double().mean(),
    }  # fmt: skip
    assert report["means"] == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=1e-4)
    assert report["prior"]["position"] == pytest.approx(float(p.mean()), rel=1e-4)
    assert report["prior"]["overconfidence"] == pytest.approx(float(truth.collision.mean() / p.mean()), rel=1e-4)

    gates = gates_by_hand(truth)
    if chosen == EAFT(k=5):
        gates[repr(chosen)] = truth.entropy_of_largest(5) / math.log(5)
    if isinstance(chosen, Cayley):
        lift = 0.5 * p.mean()
        gates[repr(chosen)] = p ** (lift + (1 - lift) * p / (2 - p)).clamp(1e-3, 1)
    found = {row["name"]: row for row in report["objectives"]}
    for name, gate in gates.items():
        spent = float((gate * (1 - p)).sum() / (1 - p).sum())
        values = {
            "gate": float(gate.mean()), "ess": float(gate.sum() ** 2 / (len(p) * (gate**2).sum())) if gate.any() else 0,
            "shrinkage": spent, "gate_clean": float(gate[~noisy].mean()), "gate_noisy": float(gate[noisy].mean()),
        }  # fmt: skip
        assert {key: found[name][key] for key in values} == pytest.approx(values, rel=1e-4, abs=1e-7), name
        assert found[name]["lr_factor"] == (pytest.approx(1 / spent, rel=1e-4) if spent else None)
    assert [row["name"] for row in report["objectives"] if row["chosen"]] == [report["objectives"][0]["name"]]
    assert report["objectives"][0]["name"] == ("DEFT" if chosen == DEFT() else repr(chosen))


@pytest.mark.slow
def test_noise_is_told_from_clean_tokens_by_operation(pretrained: str, source: str, tmp_path: Path) -> None:
    noise = Noise(ops=[ResponseSwap(rate=0.5), TokenReplace(rate=0.3), TokenReplace(rate=0.2, source="unigram")])
    report, data = probed(tmp_path, pretrained, source, {"noise": noise}, examples=None)
    truth = dense(pretrained, data)
    assert [row["operation"] for row in report["noise"]] == ["ResponseSwap", "TokenReplace", "TokenReplace 2"]
    gate, clash = truth.p**truth.collision, (truth.collision / truth.p).log().clamp_min(0)
    for code, row in enumerate(report["noise"], start=1):
        own, clean = truth.codes == code, truth.codes == 0
        assert row["tokens"] == int(own.sum()) > 0
        assert row["gate"] == pytest.approx(float(gate[own].mean()), rel=1e-4)
        assert row["gate_clean"] == pytest.approx(float(gate[clean].mean()), rel=1e-4)
        for key, score in (("auroc_gate", 1 - gate), ("auroc_prob", 1 - truth.p), ("auroc_conflict", clash)):
            pairs = score[own][:, None] - score[clean][None]
            wanted = float((pairs > 0).double().mean() + (pairs == 0).double().mean() / 2)
            assert row[key] == pytest.approx(wanted, abs=2e-3), key


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [Schedule(), Rescaled(), Floored(decay="linear")], ids=repr)
def test_an_objective_of_a_run_is_what_it_ends_as(
    chosen: Objective, pretrained: str, source: str, tmp_path: Path
) -> None:
    report, _ = probed(tmp_path, pretrained, source, objective=chosen)
    own, *others = report["objectives"]
    assert own["chosen"] and own["name"] == repr(chosen)
    deft = next(row for row in others if row["name"] == "DEFT")
    assert {**own, "name": "DEFT", "chosen": False} == deft and own["gate"] < 0.99


@pytest.mark.slow
def test_every_objective_is_listed_and_one_that_cannot_run_is_named(
    pretrained: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(frozen=True, repr=False)
    class Needy(Objective):
        strength: float

        def __call__(self, stats: TokenStats) -> Tensor:
            return -self.strength * stats.log_prob

    @dataclass(frozen=True, repr=False)
    class Broken(Objective):
        def __call__(self, stats: TokenStats) -> Tensor:
            raise RuntimeError("no such thing")

    report, _ = probed(tmp_path, pretrained, source, objective=Needy(0.25))
    names = {row["name"] for row in report["objectives"]}
    known = known_objectives()
    # Without a run they are what they wrap.
    of_a_run = {name for name in known.keys() - {"Needy"} if known[name]().scheduled or known[name]().tracks}
    assert names == known.keys() - of_a_run - {"Needy", "Broken", "BySource"} | {"Needy(strength=0.25)"}
    assert "Schedule" in of_a_run
    assert len(names) >= 10 and set(report["left_out"]) == {"Needy", "Broken"}
    assert report["objectives"][0]["gate"] == report["objectives"][0]["shrinkage"] == pytest.approx(0.25)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and "no such thing" in printed
    del Needy, Broken, report
    gc.collect()  # the class tree is the registry: other tests walk it


# --- the sample and the files ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_sample_is_spread_and_the_same_every_time(pretrained: str, source: str, tmp_path: Path) -> None:
    reports = [
        probed(tmp_path / name, pretrained, source, examples=count, audit=str(tmp_path / f"{name}.jsonl"))[0]
        for name, count in (("a", 3), ("b", 3), ("all", None))
    ]
    assert reports[0] == reports[1] and reports[0]["means"] != reports[2]["means"]
    assert [report["examples"] for report in reports] == [3, 3, 9]
    assert [report["examples_total"] for report in reports] == [9, 9, 9]
    ids = {json.loads(line)["id"] for line in (tmp_path / "a.jsonl").read_text().splitlines()}
    assert ids == {"r0", "r3", "r6"}
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [{"packing": True, "max_length": 128}, {"max_tokens_per_batch": 64}, {"batch_size": 2}, {"group_by_length": True}],
    ids=str,
)
def test_batches_do_not_matter(layout: dict[str, Any], pretrained: str, source: str, tmp_path: Path) -> None:
    plain, _ = probed(tmp_path, pretrained, source)
    other, _ = probed(tmp_path, pretrained, source, layout)
    assert other["tokens"] == plain["tokens"] and other["examples"] == 9
    assert other["means"] == pytest.approx(plain["means"], rel=1e-4)
    assert [s["id"] for s in other["suspicious"]] == [s["id"] for s in plain["suspicious"]]


@pytest.mark.slow
def test_files_are_complete(pretrained: str, source: str, tmp_path: Path) -> None:
    noise = Noise(ops=[ResponseSwap(rate=0.5)])
    report, data = probed(
        tmp_path,
        pretrained,
        source,
        {"noise": noise},
        output=str(tmp_path / "o" / "p"),
        audit=str(tmp_path / "a.jsonl"),
    )
    written = json.loads((tmp_path / "o" / "p" / "probe.json").read_text())
    assert written == report
    assert set(written) == {
        "version", "model", "checkpoint", "data", "examples", "examples_total", "tokens", "means", "prior",
        "objectives", "left_out", "noise", "histograms", "suspicious", "noise_estimate", "measured", "recommendation",
        "knowledge", "truth",
    }  # fmt: skip
    shapes = written["histograms"]
    assert sum(shapes["p_clean"]) + sum(shapes["p_noisy"]) == written["tokens"]
    assert sum(shapes["collision_noisy"]) == written["noise"][0]["tokens"]
    image = imread(tmp_path / "o" / "p" / "probe.png")
    assert image.shape[1] == 1500 and (image[..., :3] < 0.5).any()
    names = sorted(path.name for path in (tmp_path / "o" / "p").iterdir())
    assert names == ["probe.json", "probe.png", "probe.svg", "tokens.npz"]
    assert "mean gate, noisy" in (tmp_path / "o" / "p" / "probe.svg").read_text()
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == [f"r{i}" for i in range(9)]
    assert [line["rank"] for line in lines] == list(range(1, 10))
    assert [line["score"] for line in lines] == sorted((line["score"] for line in lines), reverse=True)
    assert lines[:5] == written["suspicious"]
    noisy = {data.example("train", at).id for at in range(9) if data.example("train", at).noise_code.any()}
    assert {line["id"] for line in lines if line["noisy"]} == noisy and 1 < len(noisy) < 9
    assert all(line["noise"] == (["ResponseSwap"] if line["noisy"] else []) for line in lines)
    pairs = [(a["score"], b["score"]) for a in lines if a["noisy"] for b in lines if not b["noisy"]]
    wanted = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
    assert written["noise"][0]["auroc_example"] == pytest.approx(wanted) and wanted != 0.5
    assert written["noise"][0]["examples"] == len(noisy)
    assert set(written["noise_estimate"]) == {
        "answers", "answers_low", "answers_high", "level", "tokens", "tokens_all", "examples", "reliable", "asked",
        "second_pass", "injected", "auroc",
    }  # fmt: skip
    hit = sum(int((data.example("train", at).noise_code > 0).sum()) for at in range(9))
    wanted = {"answers": len(noisy) / 9, "tokens": hit / written["tokens"]}
    assert written["noise_estimate"]["injected"] == pytest.approx(wanted)
    assert set(written["measured"]) == {
        "gain_answer", "gain_token", "gain_positive", "sure", "sure_right", "sure_right_kept",
    }  # fmt: skip
    assert set(written["recommendation"]) == {"objective", "rule", "text"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "o"]


@pytest.mark.slow
def test_one_objective_without_bound_does_not_flatten_the_figure(
    pretrained: str, source: str, tmp_path: Path, ours: None
) -> None:
    wild, _ = probed(tmp_path, pretrained, source, objective=Tsallis(q=3.0))
    plain, _ = probed(tmp_path, pretrained, source)
    assert wild["objectives"][0]["gate"] > 100
    shown = [drawing(report).axes[1].get_xlim()[1] for report in (wild, plain)]
    assert shown[0] == pytest.approx(1.16 * 2) and 1.16 <= shown[1] < 1.3


@pytest.mark.slow
def test_nothing_is_trained_and_the_module_is_left_as_it_was(pretrained: str, source: str, tmp_path: Path) -> None:
    module = SFTModule(pretrained=pretrained)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=str(tmp_path))
    trainer.probe(module, InstructionDataModule(source, validation_fraction=0.0))
    assert module.model.training and all(weight.grad is None for weight in module.parameters())
    before = AutoModelForCausalLM.from_pretrained(pretrained).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())


def test_a_model_that_gives_no_numbers_is_one_line(pretrained: str, source: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pretrained)
    model.lm_head.weight.data[3, 3] = math.nan
    model.save_pretrained(tmp_path / "broken")
    data = {"tokenizer": pretrained}
    with pytest.raises(UserError, match="reproduce the model's logits"):
        probed(tmp_path, str(tmp_path / "broken"), source, data)
    with pytest.raises(UserError, match="not numbers"):
        probed(tmp_path, str(tmp_path / "broken"), source, data, head="dense")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_say_nearly_the_same(precision: str, pretrained: str, source: str, tmp_path: Path) -> None:
    wanted, _ = probed(tmp_path, pretrained, source)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, default_root_dir=str(tmp_path), precision=precision
    )  # fmt: skip
    found = trainer.probe(SFTModule(pretrained=pretrained), InstructionDataModule(source, validation_fraction=0.0))
    assert found["means"] == pytest.approx(wanted["means"], rel=1e-5 if precision == "64-true" else 0.1, abs=0.02)
    assert found["means"] != wanted["means"]


# --- the sample of tokens -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [DEFT(), EAFT(k=5)], ids=repr)
def test_tokens_are_those_of_a_dense_softmax(
    chosen: Objective, pretrained: str, source: str, tmp_path: Path, ours: None
) -> None:
    noise = Noise(ops=[TokenReplace(rate=0.4)])
    report, data = probed(tmp_path, pretrained, source, {"noise": noise}, objective=chosen, output=str(tmp_path / "o"))
    truth, found = dense(pretrained, data), TokenSample.load(tmp_path / "o")
    assert len(found) == found.seen == report["tokens"] and found.operations.tolist() == ["TokenReplace"]
    # In the order of examples and of the text, as the truth is.
    places = [
        (at, t) for at in range(9) for t, label in enumerate(data.example("train", at).labels) if t and label >= 0
    ]
    assert list(zip(found.example.tolist(), found.token.tolist(), strict=True)) == places
    assert np.exp(found.log_prob) == pytest.approx(truth.p.numpy(), rel=1e-4)
    assert found.entropy == pytest.approx(truth.entropy.numpy(), rel=1e-4)
    assert found.collision == pytest.approx(truth.collision.numpy(), rel=1e-4)
    assert (found.correct == truth.correct.bool().numpy()).all()
    assert found.noise_code.tolist() == truth.codes.tolist() and 0 < found.noise_code.sum() < len(found)
    assert found.topk.tolist() == ([5, 20] if chosen == EAFT(k=5) else [20])
    for row, k in zip(found.topk_entropy, found.topk, strict=True):
        assert row == pytest.approx(truth.entropy_of_largest(int(k)).numpy(), rel=1e-4)


def counted_batch(lengths: list[int], first: int) -> tuple[dict[int, TokenStats], Tensor, list[int], Tensor]:
    """Examples whose statistics tell which token they are of."""
    keep = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    positions = list(range(first, first + len(lengths)))
    value = (torch.tensor(positions)[:, None] * 100.0 + torch.arange(1, max(lengths) + 1))[keep]
    return {0: TokenStats(-value, value, value, value > 0)}, keep, positions, value.long() % 2


def test_the_sample_is_bounded_and_does_not_depend_on_batches() -> None:
    lengths = [1 + at * 7 % 40 for at in range(300)]
    samples = []
    for size, turned in ((1, False), (17, True), (300, False)):
        sampler = Sampler([], size=500)
        batches = [counted_batch(lengths[at : at + size], at) for at in range(0, 300, size)]
        for batch in batches[::-1] if turned else batches:
            sampler.update(*batch)
            assert len(sampler._hashes) <= 500
        samples.append(sampler.sample([]))
    for found in samples:
        assert len(found) == 500 and found.seen == sum(lengths) and found.topk_entropy.shape == (0, 500)
        value = found.example * 100 + found.token
        assert (found.collision == value).all() and (found.noise_code == value % 2).all()
        assert (np.diff(value) > 0).all() and (found.example == samples[0].example).all()
        assert (found.token == samples[0].token).all()
    # Spread: each tenth of the tokens has its share, and so has each place in the text.
    order = np.concatenate([np.arange(length) + at * 100 for at, length in enumerate(lengths, start=0)])
    ranks = np.searchsorted(order, samples[0].example * 100 + samples[0].token - 1)
    shares = np.histogram(ranks, bins=10, range=(0, len(order)))[0]
    assert shares.min() >= 30 and shares.max() <= 70
    odd = samples[0].token % 2
    assert 200 < odd.sum() < 300


def test_hashes_are_one_to_one_and_fill_their_range() -> None:
    hashes = mixed(np.arange(100_000, dtype=np.uint64))
    assert len(set(hashes.tolist())) == 100_000
    counts = np.histogram(hashes.astype(np.float64) / 2**64, bins=20, range=(0, 1))[0]
    assert 4700 < counts.min() <= counts.max() < 5300


def test_gradient_mass_is_by_weight_and_gates_are_not() -> None:
    p, weight = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.5, 1.0, 4.0])
    stats = TokenStats(p.log(), p, p, p > 0.5).within(TokenContext(weight))
    tally = Tally({"NLL": NLL(), "Likelihood": Tsallis(0.0)}, "NLL", [])
    for part in (torch.tensor([0, 1]), torch.tensor([2])):
        tally.update({0: stats.select(part)}, torch.zeros(len(part)))
    nll, likelihood = tally.table()
    mass = weight * (1 - p)
    assert nll["shrinkage"] == pytest.approx(1.0) and nll["gate"] == 1.0
    assert likelihood["shrinkage"] == pytest.approx(float((mass * p).sum() / mass.sum()), rel=1e-6)
    assert likelihood["gate"] == pytest.approx(float(p.mean()), rel=1e-6)


# --- the audit ------------------------------------------------------------------------------------------------------


def test_conflict_is_how_far_the_target_is_below_what_the_model_says_itself() -> None:
    p, collision = torch.tensor([0.25, 0.9, 1e-4, 1e-4]), torch.tensor([0.25, 0.82, 0.82, 2e-4])
    stats = TokenStats(p.log(), collision, collision, p > 0.5)
    wanted = [0.0, 0.0, math.log(8200), math.log(2)]
    assert conflict(stats).tolist() == pytest.approx(wanted, rel=1e-5)
    assert example_score(torch.tensor([3.0, 0.0, 0.0, 0.0])) == 1.5
    assert example_score(torch.zeros(0)) == 0.0


def test_an_example_without_supervised_tokens_is_not_lost() -> None:
    keep = torch.tensor([[False, True, True], [False, False, False]])
    log_prob, half = torch.tensor([0.001, 0.5]).log(), torch.tensor([0.5, 0.5])
    stats = TokenStats(log_prob, half, half, half > 1)
    tally = AuditTally()
    codes, labels = torch.tensor([0, 2]), torch.tensor([3, 4])
    tally.update(Read([7, 4], {"example_id": ["a", "b"]}, keep, {0: stats}, labels, codes, None))
    suspects, scored = tally.suspects(None, True, str)
    first, second = sorted(suspects, key=lambda suspect: -suspect.at)
    assert (first.at, first.id, first.tokens, first.operations, first.noisy) == (7, "a", 2, {2}, True)
    assert first.nll == pytest.approx(-math.log(0.001 * 0.5) / 2, rel=1e-5)
    assert (second.at, second.scores["odd"], second.nll, second.tokens, second.noisy) == (4, 0.0, None, 0, False)
    assert scored.tokens.counts.tolist() == [0, 2]  # in the order of the split


def test_an_audit_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "a.jsonl"
    write_lines(target, [{"x": float("inf")}])
    assert target.read_text() == '{"x": null}\n'

    def broken() -> Any:
        yield {"x": 1}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_lines(target, broken())
    assert target.read_text() == '{"x": null}\n' and list(tmp_path.iterdir()) == [target]


def test_exact_auroc_counts_pairs() -> None:
    generator = np.random.default_rng(0)
    high, low = generator.integers(2, 9, 40), generator.integers(0, 7, 60)
    wanted = np.mean([(a > b) + (a == b) / 2 for a in high for b in low])
    assert exact_auroc(high.tolist(), low.tolist()) == pytest.approx(wanted)
    assert exact_auroc([], [1.0]) == 0.5


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, pretrained: str) -> Path:
    """Root of a run that has learnt the multiplication table of small numbers by heart."""
    root = tmp_path_factory.mktemp("learned")
    source = write_rows(root / "clean.jsonl", table())
    data = InstructionDataModule(source, validation_fraction=0.0, batch_size=16, tokenizer=pretrained)
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    module = SFTModule(
        objective=NLL(),
        architecture={"model_type": "llama", **shape},
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=5e-3),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
    )
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=150, logger=False, default_root_dir=str(root),
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(root / "checkpoints" / "last.ckpt")
    return root


def table() -> list[dict[str, Any]]:
    return [
        {"id": f"{a}x{b}", "question": f"What is {a} times {b}?", "answer": f"{a} times {b} is {a * b}.", "bad": False}
        for a in range(2, 6)
        for b in range(2, 6)
    ]


LEARNED = [
    "--model.architecture.model_type", "llama", "--model.architecture.hidden_size", "48",
    "--model.architecture.intermediate_size", "96", "--model.architecture.num_hidden_layers", "2",
    "--model.architecture.num_attention_heads", "4", "--data.validation_fraction", "0", "--trainer.accelerator", "cpu",
]  # fmt: skip


def probe_verb(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr("sys.argv", ["deft_lightning", "probe", *args])
    main()


@pytest.mark.slow
def test_audit_ranks_wrong_answers_first_and_points_at_them(
    learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def alone(reader: UnpromptedReader, batches: Any) -> None:
        reader.alone = reader.once = True

    # The model has learnt single rows: behind others it may find answers more probable, but reads one digit worse.
    monkeypatch.setattr(UnpromptedReader, "settle", alone)
    wrong = {"3x4": "13", "5x4": "35", "2x2": "5"}
    spoilt = table()
    for row in spoilt:
        if row["id"] in wrong:
            row["answer"] = row["answer"].rsplit(" ", 1)[0] + f" {wrong[row['id']]}."
            row["bad"] = True
    source = write_rows(tmp_path / "spoilt.jsonl", spoilt)
    probe_verb(
        monkeypatch, *LEARNED, "--data.source", source, "--ckpt_path", "last", "--trainer.default_root_dir",
        str(learned), "--output", str(tmp_path / "out"), "--audit", str(tmp_path / "audit.jsonl"), "--truth", "bad",
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert len(lines) == 16 and {line["id"] for line in lines[:3]} == set(wrong)
    assert [line["noisy"] for line in lines] == [True] * 3 + [False] * 13
    assert all(line["noise"] is None for line in lines)
    assert [line["row"] for line in lines] == [1 + [row["id"] for row in spoilt].index(line["id"]) for line in lines]
    assert all(line["file"] == source and line["prompt"].startswith("What is ") for line in lines)
    assert lines[0]["answer"] == spoilt[lines[0]["row"] - 1]["answer"] + "<|end|>"
    for line in lines[:3]:
        worst = max(line["spans"], key=lambda span: span["excess"])
        # Of 12 and 13 the last digit is wrong, of 4 and 5 the only one.
        right, found = str(math.prod(map(int, line["id"].split("x")))), wrong[line["id"]]
        changed = next(i for i in range(len(found)) if right[i : i + 1] != found[i])
        assert worst["text"].startswith(found[changed]), line
        if line["part"] == "answer":  # what is printed is the number, whichever of its digits is odd
            assert line["place"]["text"].strip() == found, line
        else:
            assert line["place"] == {name: worst[name] for name in ("start", "end", "text")}, line
    assert not any(line["spans"] for line in lines[3:])
    report = json.loads((tmp_path / "out" / "probe.json").read_text())
    truth = report["truth"]
    assert (truth["field"], truth["known"], truth["noisy"], truth["auroc"]) == ("bad", 16, 3, 1.0)
    # Of whole answers: one digit is a matter of tokens. On some machines one of 39 pairs is the wrong way round.
    assert truth["auroc_evidence"] in (pytest.approx(1 - 1 / 39), 1.0)
    assert list(truth["scores"]) == ["audit", "odd", "answer", "elsewhere", "conflict", "nll", "length"]
    assert truth["first"] == {"3": 1.0} and truth["base"] == 3 / 16
    estimate = report["noise_estimate"]
    # One digit of a sentence is wrong: that is a matter of tokens, and the answers as a whole stay better than chance.
    assert estimate["answers"] < 0.02 and estimate["injected"] is None
    assert 0.01 < estimate["tokens"] < 0.04
    assert report["checkpoint"].endswith("last.ckpt") and report["prior"]["kind"] == "strong"
    printed = capsys.readouterr().out
    assert "strong prior" in printed and "truth (bad): 3 of 16 rows noisy" in printed
    assert all(name in printed for name in wrong)
    first = lines[0]
    where = f": {first['place']['text'].strip()!r} at {first['place']['start']}"
    assert f"[noisy] {first['score']:.4g}, {first['part']}{where}\n" in printed
    assert f"bad: AUROC of the evidence {truth['auroc_evidence']:.2f}" in printed


def test_the_place_of_a_line_is_that_of_the_part_that_speaks(pretrained: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"question": "how many cats?", "answer": "red cats, 1,234 of 56"}])
    data = InstructionDataModule(source, validation_fraction=0.0, tokenizer=pretrained)
    data.prepare_data()
    data.setup()
    example = data.example("train", 0)
    learnt = np.flatnonzero(example.labels >= 0)
    texts = [data.tokenizer.decode([label]).strip() for label in example.labels[learnt].tolist()]
    last = [at for at, text in zip(learnt.tolist(), texts, strict=True) if text.isdecimal()][-1]
    first = last
    while data.tokenizer.decode(example.labels[first - 1 : last + 1].tolist()).strip() in ("56", " 56"):
        first -= 1
    odd = np.array([learnt[0], learnt[2]])
    for part in ("answer", "odd", "elsewhere"):
        found = np.array([3.0, 7.0])
        suspect = Suspect(
            0, "r", {"audit": 3.0}, 1.0, len(learnt), odd, np.array([0, 2]), found, part, (first, last + 1)
        )
        line = describe(suspect, 1, example, data.tokenizer, [], False, None)
        place, spans = line["place"], line["spans"]
        assert line["part"] == part and [span["excess"] for span in spans] == [3.0, 7.0]
        if part == "answer":
            assert place["text"].strip() == "56" and (place["start"], place["end"]) == (first, last + 1)
        elif part == "odd":
            assert place == {name: spans[1][name] for name in ("start", "end", "text")}
        else:
            assert place is None  # the whole answer is meant


@pytest.mark.slow
def test_checkpoint_and_its_export_say_the_same(learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_rows(tmp_path / "rows.jsonl", table())
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=str(learned))
    folder = trainer.export(ckpt_path="last", output=str(tmp_path / "hf"))
    common = ["--data.source", source, "--trainer.default_root_dir", str(learned), "--examples", "10"]
    probe_verb(monkeypatch, *LEARNED, *common, "--ckpt_path", "last", "--output", str(tmp_path / "a"))
    probe_verb(
        monkeypatch, *common, "--data.validation_fraction", "0", "--trainer.accelerator", "cpu", "--output",
        str(tmp_path / "b"), "--model.pretrained", str(folder),
    )  # fmt: skip
    one, two = (json.loads((tmp_path / name / "probe.json").read_text()) for name in ("a", "b"))
    assert one["means"] == pytest.approx(two["means"], rel=1e-5) and one["examples"] == 10
    assert one["means"]["nll"] < 0.2


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--examples", "0"], ["--examples", "at least 1", "0"]),
        (["--examples", "few"], ["--examples"]),
        (["--output", "{file}/out"], ["--output", "cannot be written"]),
        (["--audit", "{file}/a.jsonl"], ["--audit", "cannot be written"]),
        (["--audit", "{folder}"], ["--audit", "is a folder"]),
        (["--ckpt_path", "nowhere.ckpt"], ["nowhere.ckpt", "--ckpt_path"]),
        (["--truth", "correct"], ["--truth correct", "no row"]),
        (["--truth", "question"], ["--truth question", "1+1?"]),
        (["--exmples", "3"], ["--exmples", "Did you mean", "--examples"]),
        (["--trainer.devices", "2"], ["one device", "--trainer.devices 1"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_mistakes_are_one_line(
    args: list[str], wanted: list[str], pretrained: str, source: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    args = [arg.format(file=source, folder=tmp_path) for arg in args]
    common = ["--model.pretrained", pretrained, "--data.source", source, "--trainer.accelerator", "cpu"]
    with pytest.raises(SystemExit) as stop:
        probe_verb(monkeypatch, *common, "--trainer.default_root_dir", str(tmp_path / "logs"), *args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert all(part in line for part in wanted), line


def test_it_wants_a_model_and_data(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=str(tmp_path))
    with pytest.raises(UserError, match="needs a model and data"):
        trainer.probe()
