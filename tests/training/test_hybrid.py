"""Four real ranks in two groups that hold the whole model each, against one process on the same global batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import hybrid_worker
import pytest
import ranks_worker
import torch
from start_ranks import run_ranks
from transformers import AutoModelForCausalLM
from worlds import save_tiny_llama, write_rows

from deft_lightning.errors import UserError
from deft_lightning.training import offload
from deft_lightning.training.fsdp2 import FSDP2Strategy
from deft_lightning.training.memory.estimate import Setup
from deft_lightning.training.offload import activations_in_host_memory

pytestmark = pytest.mark.slow

RANKS = 4


class Runs(NamedTuple):
    """What each scenario gave on one process and on every rank."""

    root: Path
    single: dict[str, dict[str, Any]]
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All scenarios, run once."""
    root = tmp_path_factory.mktemp("hybrid")
    save_tiny_llama(root / "pretrained", 0.3, num_hidden_layers=2)
    write_rows(root / "train.jsonl", ({"id": f"r{i}", "question": f"q{i}", "answer": f"a{i * i}"} for i in range(16)))
    write_rows(root / "val.jsonl", ({"id": f"v{i}", "question": f"v{i}", "answer": str(i)} for i in range(4)))
    single = {
        "groups": hybrid_worker.plain(root, 1),
        "exchanged": hybrid_worker.exchanged(root, 1),
        "exported": ranks_worker.exported(root, 1),
    }
    run_ranks(Path(hybrid_worker.__file__), root, "fsdp2", worlds=(RANKS,))
    return Runs(root, single, [torch.load(root / f"hybrid{rank}.pt", weights_only=True) for rank in range(RANKS)])


@pytest.mark.parametrize("name", ["groups", "host memory"])
def test_groups_of_ranks_train_the_weights_of_one_process(name: str, runs: Runs) -> None:
    one = runs.single["groups"]
    start = AutoModelForCausalLM.from_pretrained(runs.root / "pretrained").state_dict()
    for key, value in one["weights"].items():
        assert float((value - start[key]).abs().max()) > 1e-3, f"{key} has not trained"
        for found in runs.ranks:
            assert float((found[name]["weights"][key] - value).abs().max()) < 1e-6, key
    for found in runs.ranks:
        assert (found[name]["steps"], found[name]["tokens"]) == (one["steps"], one["tokens"]) == (4, one["tokens"])
        assert found[name]["grad_norm"].item() == pytest.approx(one["grad_norm"].item(), rel=1e-5)
        assert found[name]["nll"].item() == pytest.approx(one["nll"].item(), rel=1e-5)


def test_activations_have_waited_in_host_memory(runs: Runs) -> None:
    assert all(found["host memory"]["sent"] > 0 == found["groups"]["sent"] for found in runs.ranks)


def test_a_rank_holds_its_share_of_its_group(runs: Runs) -> None:
    shares = [found["groups"]["share"] for found in runs.ranks]
    assert shares[0] + shares[1] == pytest.approx(1.0) == shares[2] + shares[3]
    assert max(shares) < 0.6


def test_the_fingerprint_is_that_of_the_whole_model(runs: Runs) -> None:
    assert {found["groups"]["fingerprint"] for found in runs.ranks} == {runs.single["groups"]["fingerprint"]}


def test_low_precision_works_in_groups(runs: Runs) -> None:
    for found in runs.ranks:
        wanted, low = runs.single["groups"]["nll"].item(), found["low precision"]["nll"].item()
        assert low != wanted and low == pytest.approx(wanted, rel=2e-2)


@pytest.mark.parametrize("name", ["resumed", "resumed from shares"])
def test_a_resumed_run_is_bit_exact(name: str, runs: Runs) -> None:
    for found in runs.ranks:
        assert found[name]["difference"] == 0.0 < found[name]["dropout"]


def test_a_checkpoint_of_one_process_goes_on_in_groups(runs: Runs) -> None:
    for key, value in runs.single["exchanged"]["weights"].items():
        for found in runs.ranks:
            torch.testing.assert_close(found["exchanged"]["weights"][key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_a_running_module_is_exported_whole(runs: Runs) -> None:
    four, one = (AutoModelForCausalLM.from_pretrained(runs.root / f"exported-{n}") for n in (RANKS, 1))
    for (name, a), b in zip(four.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_ranks_that_do_not_divide_into_the_groups_are_refused_in_one_line(runs: Runs) -> None:
    for found in runs.ranks:
        assert found["refused"]["error"] == "--trainer.strategy.replicate 3: 4 ranks do not divide into as many groups"
    with pytest.raises(UserError, match=r"replicate must be at least 1, got 0"):
        FSDP2Strategy(replicate=0)


def test_the_estimate_of_memory_counts_the_share_of_a_group() -> None:
    setup = Setup(torch.optim.AdamW, ranks=4, sharded=True, replicate=2)
    assert setup.shares == 2
    assert Setup(torch.optim.AdamW, ranks=4).shares == 1


def test_what_waits_in_host_memory_is_copied_and_weights_are_not() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 8))
    x = torch.randn(512, 64, requires_grad=True)
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in (*model.parameters(), x)]  # type: ignore[union-attr]
    copies: list[torch.Size] = []
    empty_like = torch.empty_like

    def counted(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        copies.append(tensor.shape)
        return empty_like(tensor, **options)

    for p in (*model.parameters(), x):
        p.grad = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", counted)
        patch.setattr(offload, "LEAST", 1024)
        with activations_in_host_memory():
            loss = model(x).square().sum()
    loss.backward()
    found = [p.grad for p in (*model.parameters(), x)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))  # type: ignore[arg-type]
    assert (512, 64) in copies and (512, 256) in copies
    assert not {tuple(p.shape) for p in model.parameters()} & {tuple(shape) for shape in copies}
