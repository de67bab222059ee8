"""Anchored runs on two real ranks against one process, and resumed to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from anchor_worker import SCENARIOS
from start_ranks import run_ranks
from test_ranks import prepare
from transformers import AutoModelForCausalLM
from worlds import largest_difference, save_tiny_llama

pytestmark = pytest.mark.slow

SAME = ["frozen", "dense", "adapters", "weighted", "checkpointed"]


class Runs(NamedTuple):
    """What each scenario gave on one process and on both ranks."""

    root: Path
    ranks: list[dict[str, Any]]
    single: dict[str, dict[str, Any]]


def world(root: Path) -> None:
    prepare(root)
    save_tiny_llama(root / "elsewhere", 0.3, seed=1, num_hidden_layers=1)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("single")
    world(root)
    return {name: scenario(root, 1) for name, scenario in SCENARIOS.items()}


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def runs(
    request: pytest.FixtureRequest, single: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    root = tmp_path_factory.mktemp(request.param)
    world(root)
    run_ranks(Path(__file__).with_name("anchor_worker.py"), root, request.param)
    ranks = [torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    shutil.rmtree(root / "anchored", ignore_errors=True)
    return Runs(root, ranks, single)


@pytest.mark.parametrize("name", SAME)
def test_two_ranks_train_the_weights_of_one_process(name: str, runs: Runs) -> None:
    one = runs.single[name]
    start = dict(AutoModelForCausalLM.from_pretrained(runs.root / "pretrained").named_parameters())
    for rank in runs.ranks:
        assert rank[name]["loss"].item() == pytest.approx(one["loss"].item(), rel=1e-4)
        assert rank[name]["grad_norm"].item() == pytest.approx(one["grad_norm"].item(), rel=1e-3)
        for key, value in one["weights"].items():
            before = start[key] if key in start else torch.zeros_like(value)
            moved = float((value - before).detach().abs().max())
            assert moved > 1e-4, f"{key} has not trained"
            assert float((rank[name]["weights"][key] - value).abs().max()) / moved < 5e-4, key


def test_the_anchor_pulls_and_a_weight_of_zero_is_the_base_bit_for_bit(runs: Runs) -> None:
    for found in (runs.single, *runs.ranks):
        assert largest_difference(found["weight 0"]["weights"], found["plain"]["weights"]) == 0
        assert largest_difference(found["frozen"]["weights"], found["plain"]["weights"]) > 1e-2, "it pulls"
        assert largest_difference(found["frozen"]["weights"], found["dense"]["weights"]) < 1e-3
        assert largest_difference(found["frozen"]["weights"], found["checkpointed"]["weights"]) < 1e-5


def test_mixed_precision_trains_about_the_same(runs: Runs) -> None:
    for found in (runs.single, *runs.ranks):
        assert found["bf16"]["loss"].item() == pytest.approx(found["frozen"]["loss"].item(), rel=0.1)


@pytest.mark.parametrize("name", ["resumed", "resumed adapters"])
def test_resuming_is_bit_exact(name: str, runs: Runs) -> None:
    for found in (runs.single, *runs.ranks):
        assert found[name]["difference"] == 0
        assert found[name]["dropout"] > 0, "dropout shows whether a reference has drawn any"


@pytest.mark.parametrize("name", ["forgotten", "forgotten adapters"])
def test_forgetting_is_the_same_number_on_any_number_of_ranks(name: str, runs: Runs) -> None:
    wanted = runs.single[name]["kl"]
    assert wanted > 1e-3
    for rank in runs.ranks:
        assert rank[name]["kl"] == pytest.approx(wanted, rel=1e-3)


def test_a_run_that_began_elsewhere_is_refused_in_one_line(runs: Runs) -> None:
    for found in (runs.single, *runs.ranks):
        line = found["other beginning"]["error"]
        assert "elsewhere has other weights" in line and "--model.pretrained" in line and "\n" not in line
