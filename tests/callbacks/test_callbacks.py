"""What a user reads: event files, checkpoints, predictions and the progress bar of real runs."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import bare_trainer, constant, read_events, still, write_rows

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.callbacks import (
    Checkpoint,
    EntropyMonitor,
    GateMonitor,
    NoiseMonitor,
    PredictionWriter,
    SFTProgressBar,
)
from deft_lightning.data.noise import Noise, TokenReplace
from deft_lightning.errors import UserError
from deft_lightning.evaluation import Generation
from deft_lightning.objectives import DEFT, DFT, Likelihood, Objective, Tsallis
from deft_lightning.training.resume import newest_checkpoint

ROWS = [
    {"id": f"r{i}", "question": q, "answer": a}
    for i, (q, a) in enumerate(
        [("1+1?", "2 is it"), ("Name three colours.", "red, green and blue"), ("Hi", "Hello! How are you?"),
         ("x", "y, and then z"), ("Spell cat", "c a t"), ("Yes or no", "no"), ("Count", "one two three"), ("?", "!!")]
    )
]  # fmt: skip
HELD_OUT = [{"question": "Say it.", "answer": "something long"}, {"question": "2+2", "answer": "4"}]
NOISE = Noise(ops=[TokenReplace(rate=0.3)])
SCALARS = {
    "train": {"loss", "nll", "ppl", "token_accuracy", "tokens", "grad_norm"},
    "val": {"loss", "nll", "ppl", "token_accuracy"},
    "gate": {"mean", "ess", "locked", "q10", "q50", "q90"},
    "focus": {"mean", "q10", "q50", "q90"},
    "prob": {"mean", "q10", "q50", "q90"},
    "entropy": {"shannon", "renyi2", "q10", "q50", "q90"},
    "renyi2": {"q10", "q50", "q90"},
    "collision": {"mean", "q10", "q50", "q90"},
    "gradient": {"p0_10", "p10_50", "p50_90", "p90_100"},
}
NOISE_SCALARS = {"gate/clean", "gate/noisy", "nll/clean", "nll/noisy", "noise/auroc_gate", "noise/auroc_prob",
                 "noise/gradient_share", "noise/memorised", "noise/recovered",
                 "gate/locked_clean"}  # fmt: skip
HISTOGRAMS = {"gate/hist", "focus/hist", "prob/hist", "gradient/hist", "entropy/hist", "entropy/renyi2_hist",
              "collision/hist"}  # fmt: skip

PRETRAINED = {"spread": 0.5, "num_hidden_layers": 1}
make_trainer = partial(bare_trainer, logger=None)  # with event files


def contract(*without: str) -> set[str]:
    return {f"{room}/{name}" for room, names in SCALARS.items() if room not in without for name in names}


def data(tmp_path: Path, rows: Sequence[dict[str, Any]] = ROWS, **options: Any) -> InstructionDataModule:
    source = write_rows(tmp_path / "train.jsonl", rows)
    held_out = write_rows(tmp_path / "val.jsonl", HELD_OUT)
    return InstructionDataModule(source, **{"validation_source": held_out, "batch_size": 2, **options})


def module_of(pretrained: str, objective: Objective | None = None, **options: Any) -> SFTModule:
    return SFTModule(
        **{"objective": objective or DEFT(), "pretrained": pretrained, "optimizer": still, "scheduler": constant,
           **options}
    )  # fmt: skip


class Events:
    """Scalars and histograms of a run, by tag and step."""

    def __init__(self, folder: str | Path) -> None:
        files = read_events(folder)
        tags = files.Tags()
        self.scalars = {tag: {e.step: e.value for e in files.Scalars(tag)} for tag in tags["scalars"]}
        self.histograms = {
            tag: {e.step: e.histogram_value for e in files.Histograms(tag)} for tag in tags["histograms"]
        }


def monitored(
    tmp_path: Path, pretrained: str, objective: Objective | None = None, *, noise: Noise = NOISE, **options: Any
) -> tuple[Events, SFTModule, InstructionDataModule]:
    module, loaded = module_of(pretrained, objective), data(tmp_path, noise=noise)
    trainer = make_trainer(tmp_path / "run", GateMonitor(), EntropyMonitor(), NoiseMonitor(), **options)
    trainer.fit(module, loaded)
    assert trainer.log_dir is not None
    return Events(trainer.log_dir), module, loaded


# --- tags -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_tag_of_the_contract_is_in_the_event_file(pretrained: str, tmp_path: Path) -> None:
    events, _, _ = monitored(tmp_path, pretrained)
    assert contract() | NOISE_SCALARS <= events.scalars.keys()
    assert events.histograms.keys() == HISTOGRAMS


@pytest.mark.slow
def test_without_noise_nothing_speaks_of_noise(pretrained: str, tmp_path: Path) -> None:
    events, _, _ = monitored(tmp_path, pretrained, noise=Noise())
    assert not NOISE_SCALARS & events.scalars.keys()
    assert contract() <= events.scalars.keys()


@pytest.mark.slow
def test_an_objective_without_a_focus_writes_none(pretrained: str, tmp_path: Path) -> None:
    events, _, _ = monitored(tmp_path, pretrained, DFT())
    assert contract("focus") <= events.scalars.keys()
    assert not [tag for tag in [*events.scalars, *events.histograms] if tag.startswith("focus")]
    assert events.histograms.keys() == HISTOGRAMS - {"focus/hist"}


def test_histograms_can_be_turned_off(pretrained: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", GateMonitor(histograms=False), EntropyMonitor(histograms=False))
    trainer.fit(module_of(pretrained), data(tmp_path))
    events = Events(str(trainer.log_dir))
    assert not events.histograms and "gate/mean" in events.scalars and "entropy/shannon" in events.scalars


# --- values ---------------------------------------------------------------------------------------------------------


class Tokens:
    """Statistics of all supervised tokens of some batches, in float64 from the weights on disk, by their formulas."""

    def __init__(self, pretrained: str, batches: Sequence[dict[str, Any]]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float64).eval()
        logits, targets, codes, clean = [], [], [], []
        for batch in batches:
            out = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            keep = batch["labels"][:, 1:] != -100
            logits.append(out[keep])
            targets.append(batch["labels"][:, 1:][keep])
            codes.append(batch["noise_code"][:, 1:][keep])
            clean.append(batch["clean_labels"][:, 1:][keep])
        self.clean = torch.cat(clean)
        self.logits, self.targets, self.codes = torch.cat(logits), torch.cat(targets), torch.cat(codes)
        pi = torch.softmax(self.logits, dim=-1)
        self.p = pi.gather(-1, self.targets.unsqueeze(-1)).squeeze(-1)
        self.collision = pi.detach().square().sum(-1)
        self.entropy = -(pi * pi.log()).sum(-1).detach()
        self.loss = (1 - self.p**self.collision) / self.collision
        self.gate = (self.p**self.collision).detach()
        self.noisy = self.codes != 0

    def grad_norm(self) -> float:
        parameters = list(self.model.parameters())
        grads = torch.autograd.grad(self.loss.mean(), parameters, retain_graph=True)
        return math.sqrt(sum(float(g.square().sum()) for g in grads))


def pairwise_auroc(positive: Tensor, negative: Tensor) -> float:
    difference = positive[:, None] - negative[None, :]
    return float(((difference > 0).double() + 0.5 * (difference == 0)).mean())


def expected_scalars(tokens: Tokens) -> dict[str, float]:
    p, gate, noisy = tokens.p.detach(), tokens.gate, tokens.noisy
    nll, effort = -p.log(), gate * (1 - p)
    values: dict[str, Any] = {
        "train/loss": tokens.loss.mean(),
        "train/nll": nll.mean(),
        "train/ppl": nll.mean().exp(),
        "train/token_accuracy": (tokens.logits.argmax(-1) == tokens.targets).double().mean(),
        "train/grad_norm": tokens.grad_norm(),
        "gate/mean": gate.mean(),
        "gate/ess": gate.sum() ** 2 / (len(gate) * gate.square().sum()),
        "focus/mean": tokens.collision.mean(),
        "prob/mean": p.mean(),
        "entropy/shannon": tokens.entropy.mean(),
        "entropy/renyi2": -tokens.collision.log().mean(),
        "collision/mean": tokens.collision.mean(),
        "gate/clean": gate[~noisy].mean(),
        "gate/noisy": gate[noisy].mean(),
        "nll/clean": nll[~noisy].mean(),
        "nll/noisy": nll[noisy].mean(),
        "noise/gradient_share": effort[noisy].sum() / effort.sum(),
        "noise/memorised": (tokens.logits.argmax(-1) == tokens.targets)[noisy].double().mean(),
        "noise/recovered": (tokens.logits.argmax(-1) == tokens.clean)[noisy].double().mean(),
    }
    for name, low, high in (("p0_10", 0, 0.1), ("p10_50", 0.1, 0.5), ("p50_90", 0.5, 0.9), ("p90_100", 0.9, 1.1)):
        values[f"gradient/{name}"] = effort[(p >= low) & (p < high)].sum() / effort.sum()
    return {tag: float(value.detach() if isinstance(value, Tensor) else value) for tag, value in values.items()}


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_scalars_of_every_step_are_those_of_all_micro_batches_of_its_window(
    accumulate: int, pretrained: str, tmp_path: Path
) -> None:
    events, _, loaded = monitored(tmp_path, pretrained, accumulate_grad_batches=accumulate)
    batches = list(loaded.train_dataloader())
    steps = 4 // accumulate
    seen = 0
    for step in range(steps):
        tokens = Tokens(pretrained, batches[step * accumulate : (step + 1) * accumulate])
        assert tokens.noisy.any() and not tokens.noisy.all(), "every step has both classes"
        seen += len(tokens.p)
        for tag, value in {**expected_scalars(tokens), "train/tokens": seen}.items():
            assert events.scalars[tag][step] == pytest.approx(value, rel=2e-5, abs=1e-9), (tag, step)
        with torch.no_grad():
            for tag, score in (("noise/auroc_gate", -tokens.gate), ("noise/auroc_prob", -tokens.p)):
                exact = pairwise_auroc(score[tokens.noisy], score[~tokens.noisy])
                # Of 1024 bins few are shared by two tokens.
                assert events.scalars[tag][step] == pytest.approx(exact, abs=0.02), (tag, step)
    for tag in (contract("val") | NOISE_SCALARS) & events.scalars.keys():
        assert sorted(events.scalars[tag]) == list(range(steps)), tag


@pytest.mark.slow
def test_validation_scalars_are_means_over_all_held_out_tokens(pretrained: str, tmp_path: Path) -> None:
    events, _, loaded = monitored(tmp_path, pretrained)
    clean, _ = loaded.val_dataloader()
    tokens = Tokens(pretrained, list(clean))
    expected = {tag.replace("train", "val"): v for tag, v in expected_scalars(tokens).items() if tag[:5] == "train"}
    for tag in contract() & {f"val/{name}" for name in SCALARS["val"]}:
        assert list(events.scalars[tag].values()) == [pytest.approx(expected[tag], rel=2e-5)], tag


@pytest.mark.slow
def test_histograms_count_every_token_of_the_window(pretrained: str, tmp_path: Path) -> None:
    events, _, loaded = monitored(tmp_path, pretrained, accumulate_grad_batches=2)
    batches = list(loaded.train_dataloader())
    for step in range(2):
        tokens = Tokens(pretrained, batches[2 * step : 2 * step + 2])
        quantities = {
            "gate/hist": (tokens.gate, 1.0),
            "focus/hist": (tokens.collision, 1.0),
            "prob/hist": (tokens.p.detach(), 1.0),
            "entropy/hist": (tokens.entropy, math.log(262)),
            "entropy/renyi2_hist": (-tokens.collision.log(), math.log(262)),
            "collision/hist": (tokens.collision, 1.0),
        }
        for tag, (values, top) in quantities.items():
            found = events.histograms[tag][step]
            counts, edges = np.histogram(values.numpy(), bins=50, range=(0.0, top))
            # TensorBoard leaves out empty bins at the ends and merges runs of them.
            by_edge = {round(limit, 6): count for limit, count in zip(found.bucket_limit, found.bucket, strict=True)}
            for right, count in zip(edges[1:], counts, strict=True):
                assert by_edge.get(round(float(right), 6), 0) == count, (tag, step, right)
            assert sum(found.bucket) == found.num == len(values)
            assert found.sum == pytest.approx(float(values.sum()), rel=1e-5)
            assert found.sum_squares == pytest.approx(float(values.square().sum()), rel=1e-5)


@pytest.mark.slow
def test_an_unbounded_gate_has_an_exact_mean(pretrained: str, tmp_path: Path) -> None:
    """Gates p^-1 of improbable tokens lie far outside the histogram."""
    events, _, loaded = monitored(tmp_path, pretrained, Tsallis(q=2.0), accumulate_grad_batches=4)
    gate = 1 / Tokens(pretrained, list(loaded.train_dataloader())).p.detach()
    assert gate.min() > 1
    assert events.scalars["gate/mean"][0] == pytest.approx(float(gate.mean()), rel=1e-4)
    found = events.histograms["gate/hist"][0]
    last = [count for limit, count in zip(found.bucket_limit, found.bucket, strict=True) if count]
    assert last == [len(gate)] and found.num == len(gate)


@pytest.mark.slow
def test_auroc_is_chance_for_a_gate_that_is_the_same_for_all(pretrained: str, tmp_path: Path) -> None:
    events, _, _ = monitored(tmp_path, pretrained, Tsallis(q=1.0), accumulate_grad_batches=4)
    assert events.scalars["noise/auroc_gate"] == {0: 0.5}
    assert events.scalars["gate/ess"][0] == pytest.approx(1.0)
    assert events.scalars["gate/clean"] == events.scalars["gate/noisy"] == {0: 1.0}


# --- which steps ----------------------------------------------------------------------------------------------------


class Counting(GateMonitor):
    """Counts the micro-batches it looks at."""

    looked = 0

    def observe(self, *args: Any) -> None:
        self.looked += 1
        super().observe(*args)


@pytest.mark.slow
def test_nothing_is_written_or_looked_at_on_steps_that_are_not_logged(pretrained: str, tmp_path: Path) -> None:
    counting = Counting()
    module, loaded = module_of(pretrained), data(tmp_path, noise=NOISE, batch_size=1)
    trainer = make_trainer(
        tmp_path / "run", counting, EntropyMonitor(), NoiseMonitor(), log_every_n_steps=2, accumulate_grad_batches=2
    )
    trainer.fit(module, loaded)
    events = Events(str(trainer.log_dir))
    assert trainer.global_step == 4 and counting.looked == 4, "two micro-batches of two logged steps"
    for tag in (contract("val") | NOISE_SCALARS) & events.scalars.keys():
        assert sorted(events.scalars[tag]) == [1, 3], tag
    for tag in HISTOGRAMS:
        assert sorted(events.histograms[tag]) == [1, 3], tag
    batches = list(loaded.train_dataloader())
    # Monitors show the logged step; training means cover everything since the last logged one.
    for step, alone, since in ((1, batches[2:4], batches[:4]), (3, batches[6:8], batches[4:8])):
        own, window = expected_scalars(Tokens(pretrained, alone)), expected_scalars(Tokens(pretrained, since))
        for tag in ("gate/mean", "gate/ess", "focus/mean", "prob/mean", "entropy/shannon", "train/grad_norm"):
            assert events.scalars[tag][step] == pytest.approx(own[tag], rel=2e-5), tag
        for tag in ("train/loss", "train/nll", "train/ppl", "train/token_accuracy"):
            assert events.scalars[tag][step] == pytest.approx(window[tag], rel=2e-5), tag


@pytest.mark.slow
def test_a_step_with_only_clean_tokens_compares_nothing(pretrained: str, tmp_path: Path) -> None:
    loaded = data(tmp_path, noise=Noise(ops=[TokenReplace(rate=0.1)]), batch_size=1)
    trainer = make_trainer(tmp_path / "run", GateMonitor(histograms=False), NoiseMonitor())
    trainer.fit(module_of(pretrained), loaded)
    both = [
        step
        for step, batch in enumerate(loaded.train_dataloader())
        if 0 < int((batch["noise_code"] != 0).sum()) < int((batch["labels"][:, 1:] != -100).sum())
    ]
    assert 0 < len(both) < 8
    events = Events(str(trainer.log_dir))
    for tag in NOISE_SCALARS:
        assert sorted(events.scalars[tag]) == both, tag


# --- checkpoints ----------------------------------------------------------------------------------------------------


def half_rate(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def checkpoints_of(folder: Path) -> dict[str, int]:
    """Steps of the checkpoint files, links apart."""
    return {
        path.name: torch.load(path, weights_only=True)["global_step"]
        for path in folder.rglob("*.ckpt")
        if not path.is_symlink()
    }


def test_by_default_the_newest_state_is_kept_and_last_links_to_it(pretrained: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", Checkpoint(), max_epochs=3)
    trainer.fit(module_of(pretrained), data(tmp_path))
    assert checkpoints_of(tmp_path / "run") == {"step=12.ckpt": 12}
    assert Path(str(trainer.log_dir)) / "checkpoints" == next((tmp_path / "run").rglob("*.ckpt")).parent
    last = next(p for p in (tmp_path / "run").rglob("last.ckpt"))
    assert last.resolve().name == "step=12.ckpt"
    assert trainer.last_checkpoint().resolve() == last.resolve()


@pytest.mark.slow
def test_checkpoints_can_be_saved_every_few_optimizer_steps(pretrained: str, tmp_path: Path) -> None:
    saver = Checkpoint(every_n_train_steps=2, save_top_k=-1)
    trainer = make_trainer(tmp_path / "run", saver, max_epochs=3, accumulate_grad_batches=2)
    trainer.fit(module_of(pretrained), data(tmp_path))
    assert checkpoints_of(tmp_path / "run") == {"step=2.ckpt": 2, "step=4.ckpt": 4, "step=6.ckpt": 6}


def test_a_monitored_checkpoint_keeps_the_best_and_the_last(pretrained: str, tmp_path: Path) -> None:
    saver = Checkpoint(monitor="train/nll", mode="max", save_top_k=1)
    trainer = make_trainer(tmp_path / "run", saver, max_epochs=4)
    trainer.fit(module_of(pretrained, optimizer=half_rate), data(tmp_path, batch_size=8, validation_source=None,
                                                             validation_fraction=0.0))  # fmt: skip
    found = checkpoints_of(tmp_path / "run")
    assert found.pop("last.ckpt") == 4
    assert found == {"step=1.ckpt": 1}, "training lowers the NLL, so the first is the highest"


def archive(path: Path, age: float, **inside: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weights": torch.arange(1000), "deft_lightning": {}, **inside}, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_the_newest_checkpoint_is_that_of_the_newest_run_at_any_depth_whatever_its_date(tmp_path: Path) -> None:
    archive(tmp_path / "a" / "version_1" / "checkpoints" / "step=9.ckpt", age=0)
    archive(tmp_path / "a" / "version_10" / "step=90.ckpt", age=30)
    newest = archive(tmp_path / "a" / "version_10" / "step=100.ckpt", age=40)
    archive(tmp_path / "a" / "version_9" / "step=200.ckpt", age=-5)
    archive(tmp_path / "newer.pt", age=-10)
    assert newest_checkpoint(tmp_path) == newest
    assert newest_checkpoint(str(tmp_path)) == newest
    loose = archive(tmp_path / "b" / "z.ckpt", age=10)
    assert newest_checkpoint(tmp_path) == loose, "no number orders it, so its date does"


def test_a_truncated_checkpoint_is_never_passed_over_in_silence(tmp_path: Path) -> None:
    good = archive(tmp_path / "good.ckpt", age=10, global_step=5)
    for name, share in (("half.ckpt", 0.5), ("nearly.ckpt", 0.999), ("empty.ckpt", 0.0)):
        bad = archive(tmp_path / name, age=0)
        content = bad.read_bytes()
        bad.write_bytes(content[: int(share * len(content))])
        with pytest.raises(UserError, match=rf"{bad} is the newest, and cannot be read.*--ckpt_path {good}"):
            newest_checkpoint(tmp_path)
        os.utime(bad, (1e8, 1e8))
        assert newest_checkpoint(tmp_path) == good, "an older one is no loss"
        bad.unlink()


def test_a_link_to_a_checkpoint_that_is_gone_is_skipped(tmp_path: Path) -> None:
    good = archive(tmp_path / "good.ckpt", age=10)
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "deleted.ckpt")
    assert newest_checkpoint(tmp_path) == good


def test_without_a_checkpoint_of_ours_there_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None
    torch.save({"weights": 1}, tmp_path / "theirs.ckpt")
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match=r"--ckpt_path last: no checkpoint under .* \(--trainer\.default_root_dir\)"):
        make_trainer(tmp_path).last_checkpoint()
    (tmp_path / "a.ckpt").write_text("no archive")
    with pytest.raises(UserError, match=r"a\.ckpt is the newest, and cannot be read"):
        newest_checkpoint(tmp_path)


# --- predictions ----------------------------------------------------------------------------------------------------


def predicted_rows(
    tmp_path: Path,
    pretrained: str,
    rows: Sequence[dict[str, Any]],
    output: str | None = None,
    format: Any = "question_answer",
    **generation: Any,
) -> tuple[list[dict[str, Any]], Trainer]:
    module = module_of(pretrained, generation=Generation(**{"max_new_tokens": 4, **generation}))
    loaded = data(tmp_path, test_source=write_rows(tmp_path / "test.jsonl", rows), eval_batch_size=2, format=format)
    trainer = make_trainer(tmp_path / "run", PredictionWriter(output))
    trainer.predict(module, loaded, return_predictions=False)
    path = Path(output or Path(str(trainer.log_dir)) / "predictions.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line], trainer


def test_predictions_are_one_json_line_a_prompt_in_the_order_of_the_file(pretrained: str, tmp_path: Path) -> None:
    rows = [
        {"id": f"t{i}", "question": q, "answer": f"gold {i}"} for i, q in enumerate(["abc", "d", "ef", "g\nh", "ü"])
    ]
    found, trainer = predicted_rows(tmp_path, pretrained, rows)
    assert [list(record) for record in found] == [["id", "prompt", "completions", "gold", "truncated"]] * 5
    assert [record["id"] for record in found] == [row["id"] for row in rows]
    assert [record["gold"] for record in found] == [row["answer"] for row in rows]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(pretrained).eval(),
        AutoTokenizer.from_pretrained(pretrained),
    )
    for row, record in zip(rows, found, strict=True):
        assert record["prompt"] == f"<|user|>{row['question']}<|end|><|assistant|>"
        ids = torch.tensor([tokenizer(record["prompt"]).input_ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert record["completions"] == [tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)]
    assert [path.name for path in Path(str(trainer.log_dir)).glob("*predictions*")] == ["predictions.jsonl"]
    assert not list(Path(str(trainer.log_dir)).glob(".predictions*")), "no part is left behind"


def test_predictions_that_cannot_be_written_are_refused_before_anything_is_generated(
    pretrained: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    source = tmp_path / "rows.jsonl"
    source.write_text('{"question": "a"}\n')
    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=[PredictionWriter(str(tmp_path / "file" / "out.jsonl"))],
        default_root_dir=str(tmp_path), enable_progress_bar=False,
    )  # fmt: skip
    module = SFTModule(pretrained=pretrained)
    with pytest.raises(UserError, match=r"--predictions\.output .*out\.jsonl: cannot be written"):
        trainer.predict(module, InstructionDataModule(test_source=str(source)), return_predictions=False)


def test_what_a_killed_prediction_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "predictions.jsonl"
    dead = tmp_path / f".{target.name}.{platform.node()}.999999-1"
    dead.mkdir()
    (dead / "0.0").write_text("half a line")
    writer = PredictionWriter(str(target))
    world = SimpleNamespace(
        is_global_zero=True, global_rank=0, world_size=1, num_predict_batches=[1], log_dir=None,
        strategy=SimpleNamespace(broadcast=lambda value: value, barrier=lambda name: None),
    )  # fmt: skip
    started: Any = world
    writer.setup(started, None, "predict")  # type: ignore[arg-type]
    writer.on_predict_start(started, None)  # type: ignore[arg-type]
    assert not dead.exists()
    writer.write_on_batch_end(started, None, [{"id": "a"}], None, None, 0, 0)  # type: ignore[arg-type]
    writer.on_predict_end(started, None)  # type: ignore[arg-type]
    assert target.read_text() == '{"id": "a"}\n' and not list(tmp_path.glob(f".{target.name}*"))


@pytest.mark.parametrize("format", ["question_answer", "auto"])
def test_rows_without_a_response_are_predicted_with_no_gold(format: str, pretrained: str, tmp_path: Path) -> None:
    rows = [{"id": "a", "question": "abc"}, {"id": "b", "question": "d"}]
    found, _ = predicted_rows(tmp_path, pretrained, rows, format=format)
    assert [(record["id"], record["gold"]) for record in found] == [("a", None), ("b", None)]


@pytest.mark.slow
def test_samples_of_a_prompt_stand_together_and_repeat(pretrained: str, tmp_path: Path) -> None:
    rows = [{"question": q} for q in ("abc", "d", "ef")]
    first, _ = predicted_rows(tmp_path, pretrained, rows, samples=3, temperature=1.0)
    assert [len(record["completions"]) for record in first] == [3, 3, 3]
    assert len({text for record in first for text in record["completions"]}) > 3
    assert predicted_rows(tmp_path, pretrained, rows, samples=3, temperature=1.0)[0] == first
    assert predicted_rows(tmp_path, pretrained, rows, samples=3, temperature=1.0, seed=1)[0] != first


def test_predictions_go_to_the_file_named_and_replace_what_was_there(pretrained: str, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out.jsonl"
    predicted_rows(tmp_path, pretrained, [{"id": "old", "question": "abc"}] * 3, str(output))
    found, _ = predicted_rows(
        tmp_path, pretrained, [{"id": "new", "question": "line\u2028separator\u0085"}], str(output)
    )
    assert [record["id"] for record in found] == ["new"]
    assert "line\u2028separator\u0085" in found[0]["prompt"]
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]


# --- progress bar ---------------------------------------------------------------------------------------------------


class Shown(SFTProgressBar):
    """Keeps what stood behind the bar after each batch."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)
        self.shown: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        self.shown.append(self.get_metrics(trainer, pl_module))


def test_the_bar_shows_loss_nll_and_validation_nll_under_short_names(pretrained: str, tmp_path: Path) -> None:
    bar = Shown()
    trainer = make_trainer(tmp_path / "run", bar, max_epochs=2)
    trainer.fit(module_of(pretrained), data(tmp_path, batch_size=4))
    final = bar.get_metrics(trainer, trainer.lightning_module)
    names = {"loss": "train/loss", "nll": "train/nll", "val_nll": "val/nll"}
    assert final.keys() == names.keys()
    for short, tag in names.items():
        assert final[short] == pytest.approx(trainer.callback_metrics[tag].item()), short
    assert "val_nll" not in bar.shown[1] and "val_nll" in bar.shown[2], "known once the first epoch is over"


def test_likelihood_and_deft_are_watched_by_their_own_gate(pretrained: str, tmp_path: Path) -> None:
    events, _, _ = monitored(tmp_path, pretrained, Likelihood(), accumulate_grad_batches=4)
    assert events.scalars["gate/mean"][0] == pytest.approx(events.scalars["prob/mean"][0], rel=1e-6)
    assert events.scalars["focus/mean"] == {0: 1.0}
