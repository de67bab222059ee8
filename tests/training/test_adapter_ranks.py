"""Checkpoints of adapters on two real ranks: they hold what trains, resume to the bit, and refuse another base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from adapters_worker import ADAPTERS
from ranks_worker import run_to
from start_ranks import run_ranks
from test_ranks import prepare
from transformers import AutoModelForCausalLM
from worlds import save_tiny_llama

from deft_lightning.models import load_checkpoint, model_from_checkpoint

pytestmark = pytest.mark.slow


class Runs(NamedTuple):
    """What each scenario gave on both ranks."""

    root: Path
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp(request.param)
    prepare(root)
    save_tiny_llama(root / "pretrained", 0.3, num_hidden_layers=1, attention_dropout=0.4)
    save_tiny_llama(root / "elsewhere", 0.3, num_hidden_layers=1, seed=1)
    run_ranks(Path(__file__).with_name("adapters_worker.py"), root, request.param)
    return Runs(root, [torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in range(2)])


@pytest.mark.parametrize("kind", ["file", "shares"])
def test_they_hold_what_trains_and_resume_to_the_bit(kind: str, runs: Runs) -> None:
    if not runs.ranks[0][kind]:
        pytest.skip("only fsdp2 writes shares")
    for found in runs.ranks:
        assert found[kind]["held"] == found[kind]["trained"] and found[kind]["difference"] == 0.0
        assert found[kind]["base"]["name"] == str((runs.root / "pretrained").resolve())
        line = found[kind]["refused"]
        assert re.search(r"elsewhere: its weights are not those that the adapters .* were trained on", line), line
        assert "\n" not in line


def test_one_process_reads_them(runs: Runs) -> None:
    """The fingerprint of a sharded base is that of the whole one."""
    path = runs.ranks[0]["file"]["checkpoint"]
    run_to(runs.root / "back", 1, 4, path, model=ADAPTERS)
    model = model_from_checkpoint(load_checkpoint(path))[0]
    if shares := runs.ranks[0]["shares"]:
        again = model_from_checkpoint(load_checkpoint(shares["checkpoint"]))[0]
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
        AutoModelForCausalLM.from_pretrained(runs.root / "exported-shares")
