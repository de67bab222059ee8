"""Figures by source in real runs: against the model's own logits token by token, over ranks, packed, resumed."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from sources_worker import ANSWERS, NOISE, make_data, on_ranks, run, write_sources
from start_ranks import run_ranks
from tensorboard.plugins.custom_scalar import layout_pb2
from transformers import AutoModelForCausalLM
from worlds import read_events, save_tiny_llama, still, write_rows

from deft_lightning import InstructionDataModule
from deft_lightning.callbacks import Checkpoint, Dashboard
from deft_lightning.callbacks.monitored import MetricCheck
from deft_lightning.data.examples import Prepared
from deft_lightning.data.noise import Noise
from deft_lightning.errors import UserError
from deft_lightning.functional import token_stats
from deft_lightning.metrics import SourceSums
from deft_lightning.objectives import DEFT

pytestmark = pytest.mark.slow

Scalars = dict[str, list[tuple[int, float]]]
WHOLE = {"optimizer": still, "accumulate_grad_batches": 100}  # an epoch is one step, and moves nothing


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    save_tiny_llama(root / "pretrained", 0.3)
    write_sources(root)
    return root


def sources(world: Path) -> list[str]:
    return [str(world / f"{name}.jsonl") for name in ANSWERS]


def scalars(folder: Path) -> Scalars:
    events = read_events(folder)
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def by_source(found: Scalars) -> Scalars:
    return {tag: values for tag, values in found.items() if tag.count("/") == 2}


def trained(world: Path, root: Path, data: InstructionDataModule, **options: Any) -> Scalars:
    run(root, str(world / "pretrained"), data, **options)
    return scalars(root)


def last(found: Scalars, tag: str) -> float:
    return found[tag][-1][1]


def examples(data: InstructionDataModule, split: str) -> list[Prepared]:
    if split != "corrupted":
        return [data.example(split, at) for at in range(data.size(split))]
    noisy = data.splits.corrupted(data.size("validation"), 1)
    assert noisy is not None and noisy.rows is not None
    return [noisy.example(at) for row in noisy.rows for at in row]


def expected(world: Path, data: InstructionDataModule, split: str) -> dict[str, dict[str, float]]:
    """Figures of every source by the first letter of the ids, from logits of one example at a time in float64."""
    model = AutoModelForCausalLM.from_pretrained(world / "pretrained", dtype=torch.float64).eval()
    tokens: dict[str, list[tuple[float, float, bool]]] = defaultdict(list)
    for example in examples(data, split):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(example.input_ids)[None]).logits[0, :-1]
        labels, codes = (torch.from_numpy(part)[1:] for part in (example.labels, example.noise_code))
        keep = labels != -100
        stats = token_stats(logits[keep], labels[keep])
        gates = DEFT().gate(stats)
        rows = zip((-stats.log_prob).tolist(), gates.tolist(), (codes[keep] > 0).tolist(), strict=True)
        tokens[example.id[0]] += rows
    figures = {}
    for name, rows in tokens.items():
        clean, noisy = ([gate for _, gate, wrong in rows if wrong == kind] for kind in (False, True))
        figures[name] = {
            "tokens": len(rows), "nll": sum(nll for nll, *_ in rows) / len(rows),
            "gate": sum(gate for _, gate, _ in rows) / len(rows), "share": len(noisy) / len(rows),
            "clean": sum(clean) / max(len(clean), 1), "noisy": sum(noisy) / max(len(noisy), 1),
            "noisy_nll": sum(nll for nll, _, wrong in rows if wrong) / max(len(noisy), 1),
        }  # fmt: skip
    return figures


@pytest.mark.parametrize("packing", [False, True])
def test_every_figure_is_that_of_the_tokens_of_its_source(packing: bool, world: Path, tmp_path: Path) -> None:
    data = make_data(sources(world), noise=NOISE, packing=packing, max_length=96)
    found = trained(world, tmp_path / "run", data, **WHOLE)
    train, val, corrupted = (expected(world, data, split) for split in ("train", "validation", "corrupted"))
    assert train.keys() == val.keys() == ANSWERS.keys()
    for name in ANSWERS:
        wanted = {
            f"train/{name}/nll": train[name]["nll"], f"val/{name}/nll": val[name]["nll"],
            f"gate/{name}/mean": train[name]["gate"], f"noise/{name}/share": train[name]["share"],
            f"gate/{name}/clean": train[name]["clean"], f"gate/{name}/noisy": train[name]["noisy"],
            f"val_noisy/{name}/nll": corrupted[name]["noisy_nll"],
        }  # fmt: skip
        assert {tag for tag in by_source(found) if tag.split("/")[1] == name} == wanted.keys()
        for tag, value in wanted.items():
            assert last(found, tag) == pytest.approx(value, rel=2e-5), tag
    nlls = [val[name]["nll"] for name in ANSWERS]
    assert max(nlls) - min(nlls) > 0.01, "sources that are alike show nothing"


@pytest.mark.parametrize("noise", [Noise(), NOISE])
def test_the_dashboard_has_a_page_of_the_sources(noise: Noise, world: Path, tmp_path: Path) -> None:
    data = make_data(sources(world), noise=noise)
    run(tmp_path / "run", str(world / "pretrained"), data, Dashboard(curve=False, examples=0))
    found = read_events(tmp_path / "run")
    (event,) = found.Tensors("custom_scalars__config__")
    pages = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]).category
    (page,) = (page for page in pages if page.title == "By source")
    patterns = [tag for chart in page.chart for tag in chart.multiline.tag]
    tags = found.Tags()["scalars"]
    lines = [tag for pattern in patterns for tag in tags if re.match(pattern, tag)]
    written = {tag for tag in by_source(scalars(tmp_path / "run")) if not re.match(r"gate/./(clean|noisy)|noise/", tag)}
    assert sorted(lines) == sorted(written) and len(lines) == len(patterns)


def test_the_sums_of_the_sources_are_the_sums_of_all(world: Path, tmp_path: Path) -> None:
    data = make_data(sources(world))
    found = trained(world, tmp_path / "run", data, max_epochs=2)
    counts = {name: figures["tokens"] for name, figures in expected(world, data, "validation").items()}
    for (step, whole), *parts in zip(found["val/nll"], *(found[f"val/{name}/nll"] for name in ANSWERS), strict=True):
        assert {at for at, _ in parts} == {step}
        total = sum(counts[name] * nll for name, (_, nll) in zip(ANSWERS, parts, strict=True))
        assert total / sum(counts.values()) == pytest.approx(whole, rel=1e-6)  # TensorBoard keeps float32
    assert len(found["val/nll"]) == 2


def test_a_step_without_a_token_of_a_source_has_no_figure_of_it(world: Path, tmp_path: Path) -> None:
    data = make_data(sources(world), batch_size=2)
    found = trained(world, tmp_path / "run", data)
    seen: dict[str, set[int]] = {name: set() for name in ANSWERS}
    for step, batch in enumerate(data.train_dataloader()):
        for id in batch["example_id"]:
            seen[id[0]].add(step)
    for name, steps in seen.items():
        assert 0 < len(steps) < len(found["train/nll"])
        for tag in (f"train/{name}/nll", f"gate/{name}/mean"):
            assert {step for step, _ in found[tag]} == steps


def test_one_source_has_no_figures_of_its_own_and_the_batches_it_had(world: Path, tmp_path: Path) -> None:
    data = make_data(sources(world)[0], noise=NOISE)
    assert not by_source(trained(world, tmp_path / "one", data))
    assert not any("source" in name for batch in data.train_dataloader() for name in batch)
    # The same rows as two sources: all that was logged is logged as it was.
    rows = Path(sources(world)[0]).read_text().splitlines(keepends=True)
    (tmp_path / "first.jsonl").write_text("".join(rows[:10]))
    (tmp_path / "second.jsonl").write_text("".join(rows[10:]))
    parts = [str(tmp_path / "first.jsonl"), str(tmp_path / "second.jsonl")]
    one, two = scalars(tmp_path / "one"), trained(world, tmp_path / "two", make_data(parts, noise=NOISE))
    assert {tag: values for tag, values in two.items() if tag not in by_source(two)} == one
    assert {"train/first/nll", "val/second/nll"} <= by_source(two).keys()


def test_weights_of_sources(world: Path, tmp_path: Path) -> None:
    a, b, c = sources(world)
    found = trained(world, tmp_path / "run", make_data({a: 1, c: 0, b: 2.0}), **WHOLE)
    assert {tag.split("/")[1] for tag in by_source(found)} == {"a", "b"}, "a weight of 0 is no source"
    data = make_data({a: 0, b: 2.0})
    assert not by_source(trained(world, tmp_path / "one", data, **WHOLE))


def test_validation_rows_of_their_own_have_their_own_sources(world: Path, tmp_path: Path) -> None:
    a, b, c = sources(world)
    data = make_data([a, b], validation_source=[c, b])
    found = trained(world, tmp_path / "run", data, **WHOLE)
    assert {tag for tag in by_source(found) if tag.endswith("/nll")} == {
        "train/a/nll", "train/b/nll", "val/c/nll", "val/b/nll",
    }  # fmt: skip
    assert last(found, "val/c/nll") == pytest.approx(expected(world, data, "validation")["c"]["nll"], rel=2e-5)
    data = make_data([a, b], validation_source=c)
    found = trained(world, tmp_path / "single", data, **WHOLE)
    assert {tag for tag in by_source(found) if tag.endswith("/nll")} == {"train/a/nll", "train/b/nll"}


def test_more_sources_than_are_told_apart(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    many = [write_rows(tmp_path / f"s{at}.jsonl", [{"question": f"q{at}", "answer": "yes"}]) for at in range(33)]
    data = make_data(many)
    assert not by_source(trained(world, tmp_path / "run", data))
    assert data.splits.remarks == ["33 sources are more than 32: there are no metrics by source"]
    data = make_data(many[:32])
    found = by_source(trained(world, tmp_path / "fewer", data, **WHOLE))
    assert len({tag.split("/")[1] for tag in found if tag.endswith("/nll")}) == 32 and not data.splits.remarks


@pytest.mark.parametrize("tag", ["val/b/nll", "val_noisy/b/nll"])
def test_a_checkpoint_may_wait_for_one_source(tag: str, world: Path, tmp_path: Path) -> None:
    saved = Checkpoint(dirpath=str(tmp_path / "saved"), monitor=tag)
    data = make_data(sources(world), noise=NOISE)
    run(tmp_path / "run", str(world / "pretrained"), data, saved, MetricCheck())
    assert float(saved.best_model_score) == pytest.approx(last(scalars(tmp_path / "run"), tag))
    wrong = Checkpoint(dirpath=str(tmp_path / "wrong"), monitor="val/d/nll")
    with pytest.raises(UserError, match="val/d/nll: no such metric"):
        run(tmp_path / "other", str(world / "pretrained"), make_data(sources(world)), wrong, MetricCheck())


@pytest.fixture(scope="module")
def alone(world: Path) -> Scalars:
    """What one process writes."""
    on_ranks(world, 1, "auto")
    return by_source(scalars(world / "auto"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_write_what_one_process_writes(strategy: str, alone: Scalars, world: Path) -> None:
    run_ranks(Path(__file__).with_name("sources_worker.py"), world, strategy)
    one, two = alone, by_source(scalars(world / strategy))
    assert one.keys() == two.keys()
    assert {tag.replace("/b/", "/*/") for tag in one if "/b/" in tag} == {
        "train/*/nll", "val/*/nll", "val_noisy/*/nll", "gate/*/mean", "gate/*/clean", "gate/*/noisy", "noise/*/share",
    }  # fmt: skip
    for tag, values in one.items():
        assert [step for step, _ in values] == [step for step, _ in two[tag]], tag
        assert [value for _, value in values] == pytest.approx([value for _, value in two[tag]], rel=1e-4), tag


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_that_goes_on_writes_what_one_that_was_not_stopped_writes(
    packing: bool, world: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"noise": NOISE, "packing": packing, "max_length": 96, "batch_size": 2 if packing else 4}
    pretrained = str(world / "pretrained")
    run(tmp_path / "whole", pretrained, make_data(sources(world), **options), max_steps=6, max_epochs=-1)
    saved = Checkpoint(dirpath=str(tmp_path / "saved"), every_n_train_steps=3)
    run(tmp_path / "first", pretrained, make_data(sources(world), **options), saved, max_steps=3, max_epochs=-1)
    run(
        tmp_path / "second", pretrained, make_data(sources(world), **options), max_steps=6, max_epochs=-1,
        ckpt_path=str(tmp_path / "saved" / "last.ckpt"),
    )  # fmt: skip
    whole, first, second = (by_source(scalars(tmp_path / name)) for name in ("whole", "first", "second"))
    later = {tag: [value for value in values if value[0] >= 3] for tag, values in whole.items()}
    assert {tag: values for tag, values in later.items() if values} == second
    earlier = {tag: [value for value in values if value[0] < 3] for tag, values in whole.items() if "val" not in tag}
    assert {tag: values for tag, values in earlier.items() if values} == {
        tag: values
        for tag, values in first.items()
        if "val" not in tag  # each run validates at its end
    }


def test_sums_by_source_leave_out_what_does_not_count() -> None:
    sums = SourceSums(("a", "b"), 2)
    index, values = torch.tensor([0, 1, 1]), torch.tensor([1.0, 2.0, 4.0])
    sums.update(index, values, torch.ones(3))
    sums.update(index, torch.full((3,), torch.nan), torch.ones(3), counted=torch.tensor(False))
    sums.update(index[:0], values[:0], values[:0], counted=torch.tensor(True))
    assert sums.compute().tolist() == [[1.0, 1.0], [6.0, 2.0]]
