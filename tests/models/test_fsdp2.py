"""The fused head under FSDP2: two real ranks, each with half of the batch, against one process with dense logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fsdp2_worker import CASES, GIVEN, WORLD, Case, given_object, half, make
from start_ranks import run_ranks
from tiny import VOCAB, assert_same_gradients, deft_by_hand, gradients
from torch import Tensor

pytestmark = pytest.mark.slow

Ranks = list[dict[str, dict[str, Any]]]
EXACT = [name for name, case in CASES.items() if not case.bf16]
ROUNDED = [name for name, case in CASES.items() if case.bf16]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What every scenario gave on both ranks, run once: a rank that hangs is killed and shown, not waited for."""
    root = tmp_path_factory.mktemp("fsdp2")
    run_ranks(Path(__file__).with_name("fsdp2_worker.py"), root, worlds=[WORLD])
    return [torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


def results(ranks: Ranks, name: str) -> list[dict[str, Any]]:
    for found in ranks:
        if "failed" in found[name]:
            pytest.fail(found[name]["failed"], pytrace=False)
    return [found[name] for found in ranks]


def dense_runs(case: Case, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Loss and log p of each rank's rows, and the gradients of them all, from the logits of one whole model.

    Half by half, because the router's loss is that of a micro-batch on one rank.
    """
    model = make(case).to(dtype)
    losses, kept = [torch.zeros(()) for _ in range(WORLD)], [[] for _ in range(WORLD)]
    for piece in range(case.pieces):
        for rank in range(WORLD):
            ids, targets = half(piece, case, rank)
            output = model(input_ids=ids, use_cache=False)
            keep = targets != -100
            logits = output.logits[keep].float()
            loss = deft_by_hand(logits, targets[keep])
            if case.options.get("output_router_logits"):
                loss = loss + case.options["router_aux_loss_coef"] * int(keep.sum()) * output.aux_loss
            loss.backward()
            losses[rank] = losses[rank] + loss.detach()
            log_prob = logits.log_softmax(-1).gather(-1, targets[keep].unsqueeze(-1)).squeeze(-1)
            kept[rank].append(log_prob.detach())
    return losses, [torch.cat(parts) for parts in kept], gradients(model)


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_have_the_loss_and_every_gradient_of_one_process_with_dense_logits(name: str, ranks: Ranks) -> None:
    found = results(ranks, name)
    losses, log_probs, wanted = dense_runs(CASES[name])
    for rank in range(WORLD):
        assert found[rank]["loss"].isfinite()
        torch.testing.assert_close(found[rank]["loss"], losses[rank], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[rank]["log_prob"], log_probs[rank], rtol=1e-5, atol=1e-5)
        assert_same_gradients(found[rank]["gradients"], wanted, 2e-5)


def test_the_cases_are_what_they_say(ranks: Ranks) -> None:
    """A masked rank has nothing to learn from, adapters alone are trained, a mixture has its router's loss."""
    for name, case in CASES.items():
        if case.masked is not None:
            found = results(ranks, name)
            assert found[case.masked]["loss"] == 0 and len(found[case.masked]["log_prob"]) == 0
            assert found[1 - case.masked]["loss"] > 1
        if case.lora:
            names = results(ranks, name)[0]["gradients"].keys()
            assert any("lm_head.lora_A" in n for n in names) and all(".lora_" in n for n in names)
    case = CASES["mixture"]
    plain = Case({**case.options, "output_router_logits": False})
    assert dense_runs(case)[0][0] > dense_runs(plain)[0][0] + 1


def error_of(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    gap = sum(float((found[name].float() - value.float()).square().sum()) for name, value in wanted.items())
    return (gap / sum(float(value.float().square().sum()) for value in wanted.values())) ** 0.5


@pytest.mark.parametrize("name", ROUNDED)
def test_gathered_in_bfloat16_the_gradients_are_as_close_to_the_exact_ones_as_dense_bfloat16_is(
    name: str, ranks: Ranks
) -> None:
    found = results(ranks, name)
    losses, _, exact = dense_runs(CASES[name])
    rounded = dense_runs(CASES[name], torch.bfloat16)
    allowed = 2 * error_of(rounded[2], exact)
    assert 1e-3 < allowed < 0.2, "bfloat16 rounds, and not everything away"
    for rank in range(WORLD):
        gap = error_of(found[rank]["gradients"], exact)
        assert 1e-4 < gap <= allowed, (gap, allowed)
        assert found[rank]["loss"].item() == pytest.approx(losses[rank].item(), rel=2e-2)
        # Reduced and kept in float32: the sharded parameters are.
        assert all(grad.dtype == torch.float32 for grad in found[rank]["gradients"].values())


@pytest.mark.parametrize("name", ["sharded outside", "sharded outside, lora"])
def test_outside_the_forward_the_weight_is_a_shard_that_nobody_can_use_by_accident(name: str, ranks: Ranks) -> None:
    local = []
    for found in results(ranks, name):
        assert found["kinds"] == ["DTensor"] * 2, "before the first step and before the second"
        assert len(found["errors"]) == 2
        for error in found["errors"]:
            assert "sharded" in error and "use --model.head dense" in error and "\n" not in error
        assert not found["forwards"], "no module keeps the forward it was lent"
        local.append(found["local"])
    assert sum(rows for rows, _ in local) == VOCAB and all(0 < rows < VOCAB for rows, _ in local)


@pytest.mark.parametrize(("name", "case"), [("found late", "llama tied"), ("found late, lora", "lora head")])
def test_a_head_found_after_sharding_is_the_same(name: str, case: str, ranks: Ranks) -> None:
    losses, _, wanted = dense_runs(CASES[case])
    for rank, found in enumerate(results(ranks, name)):
        torch.testing.assert_close(found["loss"], losses[rank], rtol=1e-5, atol=1e-6)
        assert_same_gradients(found["gradients"], wanted, 2e-5)


@pytest.mark.parametrize(
    "name", ["llama", "llama tied", "gemma2", "lora head", "llama bf16", "lora head bf16", "root resharded"]
)
def test_the_first_batch_is_checked_on_both_ranks_and_training_goes_on(name: str, ranks: Ranks) -> None:
    losses, _, _ = dense_runs(CASES[name])
    for rank, found in enumerate(results(ranks, f"checked {name}")):
        assert found["loss"].item() == pytest.approx(losses[rank].item(), rel=2e-2 if "bf16" in name else 1e-5)


@pytest.mark.parametrize(("name", "case"), [("refused", "llama"), ("refused, lora", "lora head")])
def test_a_head_with_an_unknown_scale_is_refused_on_both_ranks_and_the_model_still_gives_logits(
    name: str, case: str, ranks: Ranks
) -> None:
    model = make(CASES[case])
    for rank, found in enumerate(results(ranks, name)):
        assert "use --model.head dense" in found["error"] and "\n" not in found["error"]
        assert found["restored"]
        with torch.no_grad():
            own = model(input_ids=half(0, CASES[case], rank)[0], use_cache=False).logits
        torch.testing.assert_close(found["logits"], 1.02 * own, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_sharded_on_its_own_is_refused_on_both_ranks(ranks: Ranks) -> None:
    for found in results(ranks, "head alone"):
        assert "sharded" in found["error"] and "use --model.head dense" in found["error"]
        assert "\n" not in found["error"]


@pytest.mark.parametrize(("name", "case"), [("evaluated", "llama tied"), ("evaluated, lora", "lora head")])
def test_evaluation_before_and_after_a_step_gives_the_same_as_one_process(name: str, case: str, ranks: Ranks) -> None:
    losses, log_probs, _ = dense_runs(CASES[case])
    model = make(CASES[case])
    for rank, found in enumerate(results(ranks, name)):
        for loss in found["losses"]:
            torch.testing.assert_close(loss, losses[rank], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["log_prob"], log_probs[rank], rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            own = model(input_ids=half(0, CASES[case], rank)[0], use_cache=False).logits
        torch.testing.assert_close(found["logits"], own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GIVEN)
def test_a_model_object_trains_as_in_one_process(name: str, ranks: Ranks) -> None:
    found = results(ranks, f"given {name}")
    start = {n: p.detach() for n, p in make(CASES[name]).named_parameters()}
    wanted = given_object(CASES[name], None)["weights"]
    assert any(not torch.equal(value, start[n]) for n, value in wanted.items()), "two steps move the weights"
    for rank in range(WORLD):
        assert found[rank]["weights"].keys() == wanted.keys()
        for n, value in wanted.items():
            torch.testing.assert_close(found[rank]["weights"][n], value, rtol=1e-4, atol=1e-5)


def test_muon_is_refused_in_one_line(ranks: Ranks) -> None:
    for found in results(ranks, "muon"):
        assert "MuonAdamW needs whole matrices: use --trainer.strategy auto or ddp" in found["error"]
        assert "\n" not in found["error"]
