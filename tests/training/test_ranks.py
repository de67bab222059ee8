"""Two real ranks against one process on the same global batches."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from given_tokens import Tokens
from ranks_worker import SCENARIOS, run_to
from start_ranks import run_ranks
from transformers import AutoModelForCausalLM
from worlds import read_events, save_tiny_llama, write_rows

from deft_lightning import Trainer
from deft_lightning.evaluation.score import score

pytestmark = pytest.mark.slow

ANSWERS = ["2", "red, green and blue", "Hello! How are you?", "y", "c a t", "no", "one two three four five", "!!"]
HELD_OUT = ["something long, much longer than the rest", "4", "x y z", "no", "yes, it is"]
PROMPTS = ["abc", "d\ne", "f", "gh", "i"]
LETTERS = 'The quick brown fox jumps over 13 lazy dogs, 24 of 57; 689 & 0: "nothing"!'
# JSON leaves these characters as they are, and some readers take them for line ends.
SEPARATORS = ["abc", "d\u2028e", "f\u0085", "gh\u2029", "i"]


class Runs(NamedTuple):
    """What each scenario gave on one process and on both ranks."""

    root: Path
    ranks: list[dict[str, Any]]
    single: dict[str, dict[str, Any]]


def prepare(root: Path) -> None:
    save_tiny_llama(root / "pretrained", 0.3, num_hidden_layers=1)
    save_tiny_llama(root / "peaked", 1.0, num_hidden_layers=1)
    rows = {
        "train": [{"id": f"r{i}", "question": f"q{i}", "answer": a} for i, a in enumerate(ANSWERS * 2)],
        "val": [{"id": f"v{i}", "question": f"v{i}", "answer": a} for i, a in enumerate(HELD_OUT)],
        "test": [{"id": f"t{i}", "question": q, "answer": f"gold {i}"} for i, q in enumerate(PROMPTS)],
        "separators": [{"id": f"t{i}", "question": q, "answer": f"gold {i}"} for i, q in enumerate(SEPARATORS)],
    }
    options = {"A": "red", "B": "blue"}
    rows |= {
        "figfont": [{"id": f"f{i}", "question": q, "answer": LETTERS} for i, q in enumerate(PROMPTS)],
        "medical": [
            {"id": f"m{i}", "question": f"{i}?", "options": options, "answer": "AB"[i % 2], "source": f"s{i % 2}"}
            for i in range(3)
        ],
        "gsm8k": [{"question": q, "answer": "1"} for q in (*PROMPTS, "j", "k")],
    }
    for name, content in rows.items():
        write_rows(root / f"{name}.jsonl", content)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """What one process does, which no strategy changes: its folder, and what each scenario gave."""
    root = tmp_path_factory.mktemp("single")
    prepare(root)
    return root, {name: scenario(root, 1) for name, scenario in SCENARIOS.items()}


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def runs(
    request: pytest.FixtureRequest, single: tuple[Path, dict[str, dict[str, Any]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:  # fmt: skip
    """All scenarios, run once: the start of a rank costs more than what it does."""
    root, (folder, alone) = tmp_path_factory.mktemp(request.param), single
    prepare(root)
    shutil.copy(folder / "one.ckpt", root)  # which the ranks go on from
    shutil.copytree(folder / "exported-1", root / "exported-1")
    run_ranks(Path(__file__).with_name("ranks_worker.py"), root, request.param)
    return Runs(root, [torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in range(2)], alone)


def assert_same_weights(runs: Runs, name: str, tolerance: float = 1e-5) -> None:
    single, (first, second) = runs.single[name]["weights"], (rank[name]["weights"] for rank in runs.ranks)
    assert single.keys() == first.keys() == second.keys()
    initial = dict(AutoModelForCausalLM.from_pretrained(runs.root / "pretrained").named_parameters())
    for key, value in single.items():
        assert torch.equal(first[key], second[key]), f"the ranks disagree: {key}"
        start = next((p for n, p in initial.items() if key == n), torch.zeros_like(value))
        moved = float((value - start).detach().abs().max())
        assert moved > 1e-4, f"{key} has not trained"
        assert float((first[key] - value).abs().max()) / moved < tolerance, key


@pytest.mark.parametrize(
    "name",
    ["uneven", "dense", "clipped", "accumulated", "one rank masked", "lora", "packed", "checkpointed", "scheduled",
     "rescaled", "rescaled, one rank masked", "weighted", "weighted, rescaled"],
)  # fmt: skip
def test_two_ranks_train_the_weights_of_one_process_on_the_same_global_batch(name: str, runs: Runs) -> None:
    assert_same_weights(runs, name, 2e-4 if name == "lora" else 2e-5)
    single = runs.single[name]
    for rank in runs.ranks:
        assert (rank[name]["steps"], rank[name]["tokens"]) == (single["steps"], single["tokens"])
        assert rank[name]["grad_norm"].item() == pytest.approx(single["grad_norm"].item(), rel=1e-4)
        assert rank[name]["nll"].item() == pytest.approx(single["nll"].item(), rel=1e-5)
        if "loss" in single:
            assert rank[name]["loss"].item() == pytest.approx(single["loss"].item(), rel=1e-5)


def test_the_scenarios_are_what_they_say(runs: Runs) -> None:
    steps = {name: found["steps"] for name, found in runs.single.items() if "steps" in found}
    expected = {
        "uneven": 4, "dense": 2, "clipped": 2, "accumulated": 4, "one rank masked": 2, "nothing supervised": 1,
        "lora": 4, "packed": 4, "bf16": 4, "checkpointed": 2, "skipped": 3, "stopped": 2, "scheduled": 4,
        "columns left out": 4,
        "rescaled": 4, "rescaled, one rank masked": 4, "weighted": 4, "weighted, rescaled": 4,
    }  # fmt: skip
    assert steps == expected
    assert runs.single["clipped"]["grad_norm"] > 0.1, "something is clipped"


def test_columns_left_out_are_chosen_by_each_rank_within_the_bound_that_is_logged(runs: Runs) -> None:
    single, *ranks = (found["columns left out"] for found in (runs.single, *runs.ranks))
    start = AutoModelForCausalLM.from_pretrained(runs.root / "peaked").state_dict()
    for key, value in single["weights"].items():
        assert torch.equal(ranks[0]["weights"][key], ranks[1]["weights"][key])
        moved = (value - start[key]).norm()
        assert moved > 0 and (ranks[0]["weights"][key] - value).norm() <= 0.05 * moved, key
    for found in (single, *ranks):
        assert 0 < found["kept"] < 0.9 and 0 < found["dropped"] <= 2 * 2.0**-7
    assert len({(float(rank["kept"]), float(rank["dropped"])) for rank in ranks}) == 1


@pytest.mark.parametrize("name", ["rescaled", "rescaled, one rank masked", "weighted, rescaled"])
def test_the_mean_gate_is_over_the_tokens_of_all_ranks(name: str, runs: Runs) -> None:
    wanted = runs.single[name]["scales"]
    assert wanted[0] == 1.0 and min(wanted[2:]) > 3.0 and len(set(wanted)) == 4, "one for each optimizer step"
    first, second = (rank[name]["scales"] for rank in runs.ranks)
    assert first == second == pytest.approx(wanted, rel=1e-4)


def test_ranks_without_any_supervised_token_leave_the_weights_alone(runs: Runs) -> None:
    initial = dict(AutoModelForCausalLM.from_pretrained(runs.root / "pretrained").named_parameters())
    for rank in runs.ranks:
        found = rank["nothing supervised"]
        assert (found["steps"], found["tokens"]) == (1, 0)
        assert all(torch.equal(value, initial[name]) for name, value in found["weights"].items())


def test_bfloat16_trains_nearly_the_same_weights_and_keeps_them_in_float32(runs: Runs) -> None:
    exact = runs.single["uneven"]["weights"]
    for found in (*runs.ranks, runs.single):
        assert found["bf16"]["nll"].item() == pytest.approx(runs.single["uneven"]["nll"].item(), rel=2e-2)
        for name, value in found["bf16"]["weights"].items():
            assert value.dtype == torch.float32
            # Gradients of bfloat16, 8 bits each, over 4 steps of a rate at which weights move by up to 0.5.
            assert float((value - exact[name]).abs().max()) < 0.05, name
    assert torch.equal(*(rank["bf16"]["weights"]["model.norm.weight"] for rank in runs.ranks))


def test_only_rank_0_builds_a_model_whose_weights_are_there(runs: Runs) -> None:
    first, second = (rank["built"] for rank in runs.ranks)
    if second["share"] == 1.0:
        assert first["devices"] == second["devices"] == [["cpu"]]
    else:
        assert (first["devices"], second["devices"]) == ([["cpu"], ["meta"]], [["meta"]])
        assert first["share"] + second["share"] == pytest.approx(1.0) and 0.4 < second["share"] < 0.6


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_left_out_by_every_rank(runs: Runs) -> None:
    assert_same_weights(runs, "skipped", 1e-4)
    learnt = [1 + (3 * i * i) % 9 for i in range(24)]
    for found in (*runs.ranks, runs.single):
        assert found["skipped"]["skipped"] == 1
        assert found["skipped"]["tokens"] == sum(learnt[:8] + learnt[16:])
    assert all(bool(value.isfinite().all()) for value in runs.single["skipped"]["weights"].values())


def test_a_loss_that_is_not_finite_stops_every_rank_and_names_the_examples(runs: Runs) -> None:
    single, (first, second) = runs.single["raised"]["error"], (rank["raised"]["error"] for rank in runs.ranks)
    assert "step 2" in single and "examples: p8, p9, p10, p11, p12 and 3 more" in single
    # Of two ranks the one with every second example knows better.
    assert "examples: p9, p11, p13, p15;" in first and first == second
    for text in (single, first):
        assert "\n" not in text and "--model.on_nonfinite skip" in text and "model.embed_tokens.weight" in text
    for rank in (*runs.ranks, runs.single):
        assert all(bool(value.isfinite().all()) for value in rank["raised"]["weights"].values())


def test_a_signal_to_one_rank_stops_all_after_the_same_step_with_one_checkpoint(runs: Runs) -> None:
    for found in (*runs.ranks, runs.single):
        assert found["stopped"]["steps"] == 2
        assert found["stopped"]["files"] == ["last.ckpt", "step=2.ckpt"]
    assert_same_weights(runs, "stopped")


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resumed", "resumed lora", "resumed rescaled"])
def test_a_resumed_run_is_bit_exact_with_dropout_and_a_schedule_of_noise(name: str, runs: Runs) -> None:
    for found in (*runs.ranks, runs.single):
        assert found[name]["difference"] == 0.0 < found[name]["dropout"]


def test_shares_of_a_checkpoint_are_resumed_bit_exactly_and_exported_by_one_process(runs: Runs) -> None:
    if not runs.ranks[0]["sharded"]:
        pytest.skip("only fsdp2 writes shares")
    for found in runs.ranks:
        assert found["sharded"]["difference"] == 0.0
        assert {"meta.pt", ".metadata", "__0_0.distcp", "__1_0.distcp"} <= set(found["sharded"]["files"])
    AutoModelForCausalLM.from_pretrained(runs.root / "exported-shares")
    assert not [path for path in Path(runs.ranks[0]["sharded"]["checkpoint"]).parent.glob(".*")], "nothing is left over"


def test_a_checkpoint_of_one_process_goes_on_with_two_ranks_and_back(runs: Runs) -> None:
    assert_same_weights(runs, "exchanged", 1e-4)
    with zipfile.ZipFile(runs.ranks[0]["exchanged"]["checkpoint"]) as file:
        assert file.testzip() is None
    module, _ = run_to(runs.root / "back", 1, 6, runs.ranks[0]["exchanged"]["checkpoint"])
    expected, _ = run_to(runs.root / "on", 1, 6, runs.single["exchanged"]["checkpoint"])
    for (name, a), b in zip(module.model.named_parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_a_running_module_is_exported_whole(runs: Runs) -> None:
    folders = {found["exported"]["folder"] for found in runs.ranks}
    assert folders == {str(runs.root / "exported-2")}
    two, one = (AutoModelForCausalLM.from_pretrained(runs.root / f"exported-{n}") for n in (2, 1))
    for (name, a), b in zip(two.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


# --- what is logged -------------------------------------------------------------------------------------------------


def test_scalars_are_those_of_one_process(runs: Runs) -> None:
    single, double = read_events(runs.single["watched"]["log_dir"]), read_events(runs.ranks[0]["watched"]["log_dir"])
    tags = set(single.Tags()["scalars"])
    assert {"gate/mean", "gate/ess", "train/nll", "train/tokens", "val/nll", "val/ppl", "noise/auroc_gate"} <= tags
    assert {"gate/q50", "gradient/p0_10", "counterfactual/Tsallis_q_0.5/ess"} <= tags
    assert {"noise/memorised", "noise/recovered", "val_noisy/recovered"} <= tags
    assert tags == set(double.Tags()["scalars"])
    for tag in tags:
        expected = [(event.step, event.value) for event in single.Scalars(tag)]
        found = [(event.step, event.value) for event in double.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in expected], tag
        # A value near the edge of one of 1024 bins may fall on its other side.
        tolerance = 1e-2 if "auroc" in tag else 1e-4
        assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=tolerance), tag


def test_histograms_count_the_tokens_of_both_ranks(runs: Runs) -> None:
    single, double = read_events(runs.single["watched"]["log_dir"]), read_events(runs.ranks[0]["watched"]["log_dir"])
    tags = {"gate/hist", "focus/hist", "prob/hist", "gradient/hist"}
    tags |= {"entropy/hist", "entropy/renyi2_hist", "collision/hist"}
    assert tags == set(single.Tags()["histograms"]) == set(double.Tags()["histograms"])
    for tag in tags:
        pairs = list(zip(single.Histograms(tag), double.Histograms(tag), strict=True))
        assert len(pairs) == 4
        for expected, found in pairs:
            assert found.step == expected.step
            a, b = expected.histogram_value, found.histogram_value
            if tag == "gradient/hist":  # weighed by numbers that differ in rounding
                assert (b.num, b.bucket) == (pytest.approx(a.num, rel=1e-4), pytest.approx(a.bucket, rel=1e-4))
                continue
            assert (b.num, b.bucket_limit, b.bucket) == (a.num, a.bucket_limit, a.bucket), (tag, found.step)
            assert b.sum == pytest.approx(a.sum, rel=1e-5)


def test_one_process_and_two_ranks_write_what_numpy_finds_in_all_tokens_of_a_step(runs: Runs) -> None:
    for found in (runs.single["given"], runs.ranks[0]["given"]):
        written = read_events(found["log_dir"])
        for at, step in enumerate(found["seen"]):
            tokens = Tokens(step)
            assert 500 < len(tokens.p) < 700
            for tag, (values, top) in tokens.quantities().items():
                row = written.Histograms(tag)[at].histogram_value
                counts, edges = np.histogram(values, 50, (0, top))
                bins = dict(zip(np.round(row.bucket_limit, 6), row.bucket, strict=True))
                assert [bins.get(round(float(right), 6), 0) for right in edges[1:]] == counts.tolist(), (tag, at)
                sums = (values.sum(), np.square(values).sum())
                assert (row.num, row.sum, row.sum_squares) == pytest.approx((len(values), *sums), rel=1e-6), (tag, at)
            for tag, value in tokens.scalars().items():
                assert written.Scalars(tag)[at].value == pytest.approx(value, rel=1e-6), (tag, at)


def test_two_ranks_write_the_very_numbers_and_pictures_of_one_process(runs: Runs) -> None:
    single, double = (read_events(found["given"]["log_dir"]) for found in (runs.single, runs.ranks[0]))
    assert single.Tags()["images"] == double.Tags()["images"] == ["objective/gate", "occupancy/p_alpha"]
    for tag in ("objective/gate", "occupancy/p_alpha"):
        pairs = list(zip(single.Images(tag), double.Images(tag), strict=True))
        assert len(pairs) == (1 if tag == "objective/gate" else 2)
        assert all(a.encoded_image_string == b.encoded_image_string for a, b in pairs), tag
    for tag in single.Tags()["histograms"]:
        for a, b in zip(single.Histograms(tag), double.Histograms(tag), strict=True):
            one, two = a.histogram_value, b.histogram_value
            if tag == "gradient/hist":  # its counts are sums of floats, which have no order of their own
                assert (two.num, two.bucket) == (pytest.approx(one.num), pytest.approx(one.bucket)), tag
                continue
            assert (two.num, two.bucket_limit, two.bucket) == (one.num, one.bucket_limit, one.bucket), tag
    rooms = (
        "gate/",
        "prob/",
        "focus/",
        "entropy/",
        "renyi2/",
        "collision/",
        "gradient/",
        "counterfactual/",
        "noise/",
        "nll/",
    )
    tags = [tag for tag in single.Tags()["scalars"] if tag.startswith(rooms)]
    assert len(tags) > 30 and tags == [tag for tag in double.Tags()["scalars"] if tag.startswith(rooms)]
    for tag in tags:
        exact = "auroc" in tag or tag.split("/")[1][:1] == "q"
        for a, b in zip(single.Scalars(tag), double.Scalars(tag), strict=True):
            assert b.value == (a.value if exact else pytest.approx(a.value, rel=1e-6)), tag


def test_both_ranks_know_the_same_metrics(runs: Runs) -> None:
    first, second = (rank["watched"]["metrics"] for rank in runs.ranks)
    assert first == second
    assert first["val/nll"] == pytest.approx(runs.single["watched"]["metrics"]["val/nll"], rel=1e-4)


def test_validation_counts_every_one_of_an_odd_number_of_examples_once(runs: Runs) -> None:
    assert len(HELD_OUT) % 2 == 1
    expected = runs.single["validated"]["metrics"]
    for rank in runs.ranks:
        assert rank["validated"]["metrics"] == pytest.approx(expected, rel=1e-6)


# --- what is written ------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_two_ranks_exports_what_they_trained(runs: Runs) -> None:
    log_dir = Path(runs.ranks[0]["watched"]["log_dir"])
    assert log_dir == Path(runs.ranks[1]["watched"]["log_dir"]), "one run, one folder"
    files = [path for path in log_dir.rglob("*.ckpt") if not path.is_symlink()]
    assert [path.name for path in files] == ["step=4.ckpt"]
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    folder = trainer.export(ckpt_path=str(files[0]), output=str(runs.root / "export"))
    loaded = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    for name, value in runs.ranks[0]["watched"]["weights"].items():
        assert torch.equal(loaded[name], value), name
    assert_same_weights(runs, "watched", 1e-4)


def records(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize("name", ["predicted", "separators predicted"])
def test_predictions_of_both_ranks_merge_into_one_file_in_order(name: str, runs: Runs) -> None:
    first, second = (rank[name]["path"] for rank in runs.ranks)
    assert first == second
    found = records(first)
    assert [record["id"] for record in found] == [f"t{i}" for i in range(len(PROMPTS))]
    assert [record["gold"] for record in found] == [f"gold {i}" for i in range(len(PROMPTS))]
    assert found == records(runs.single[name]["path"])
    assert not list(runs.root.glob(".predictions*")), "no part is left behind"


def test_benchmarks_are_the_same_for_two_ranks_and_one(runs: Runs) -> None:
    expected = runs.single["benchmarked"]
    for rank in runs.ranks:
        assert rank["benchmarked"]["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)
    found = records(runs.ranks[0]["benchmarked"]["path"])
    assert found == records(expected["path"]) and len({text for r in found for text in r["completions"]}) > 15
    metrics = expected["metrics"]
    assert [metrics[f"test/{name}/examples"] for name in ("figfont", "medical", "gsm8k")] == [5, 3, 7]
    assert metrics["test/figfont/jaro_winkler"] > 0 and {"test/medical/macro", "test/gsm8k/maj@3"} <= set(metrics)
    later = {
        f"test/{name}/{figure}": value
        for name, figures in score(Path(runs.ranks[0]["benchmarked"]["path"])).items()
        for figure, value in figures.items()
    }
    assert metrics == pytest.approx(later, rel=1e-6)


def test_a_test_run_counts_every_one_of_an_odd_number_of_examples_once(runs: Runs) -> None:
    for rank in runs.ranks:
        found = rank["predicted"]["metrics"]
        assert found["test/examples"] == len(PROMPTS)
        assert found == pytest.approx(runs.single["predicted"]["metrics"])
