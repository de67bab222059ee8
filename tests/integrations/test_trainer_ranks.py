"""Two real processes of transformers.Trainer give the run by hand, which knows of no processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gates_by_hand import GateOf, NoiseModel, deft, first_rate, rescaled
from start_ranks import run_ranks
from whole_batches import STEPS, by_hand, collate, tiny_model, token_rows, trained, wrong_rows

from deft_lightning.integrations import compute_loss_func
from deft_lightning.objectives import NLL

pytestmark = pytest.mark.slow
NOISE = "Contaminated(answer_chance=least, start=0.2)"
# Name, objective, examples of a rank's micro-batch, micro-batches: eight rows a step in all.
CASES: dict[str, tuple[str, int, int, Callable[[], GateOf]]] = {
    "plain": ("DEFT", 4, 1, lambda: deft),
    "plain, accumulated": ("DEFT", 1, 4, lambda: deft),
    "rescaled": ("Rescaled(decay=0.5)", 2, 2, lambda: rescaled(0.5)),
    "noise model": (NOISE, 4, 1, lambda: NoiseModel(least=True)),
    "noise model, accumulated": (NOISE, 1, 4, lambda: NoiseModel(least=True)),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    cases = {name: (objective, batch, accumulate) for name, (objective, batch, accumulate, _) in CASES.items()}
    (folder / "cases.json").write_text(json.dumps(cases))
    learnt = trained(folder / "learnt", compute_loss_func(NLL()), None, max_steps=40).model
    torch.save(learnt.state_dict(), folder / "learnt.pt")
    run_ranks(Path(__file__).parent / "trainer_worker.py", folder)
    return folder


def result(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(root / f"{name}.pt", weights_only=True)
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_the_run_by_hand(name: str, root: Path) -> None:
    gate_of = CASES[name][-1]()
    weights, figures = by_hand(gate_of)
    found = result(root, name)
    for one, other in zip(found["weights"], weights, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=5e-5)
    logged = [entry for entry in found["log"] if "loss" in entry]
    assert len(logged) == STEPS
    for entry, figure in zip(logged, figures, strict=True):
        assert {tag: entry[tag] for tag in figure} == pytest.approx(figure, rel=1e-4)
    if isinstance(gate_of, NoiseModel):
        told = [(entry["noise/estimated"], entry["noise/estimated_tokens"]) for entry in logged]
        assert told == [pytest.approx(pair, rel=1e-4) for pair in gate_of.told]


def test_two_ranks_resume_to_the_bit(root: Path) -> None:
    for one, other in zip(result(root, "whole")["weights"], result(root, "cut")["weights"], strict=True):
        assert torch.equal(one, other)


def test_an_evaluation_adds_up_over_ranks(root: Path) -> None:
    """Three rows on two ranks are four: the first one fills up the last batch, and counts twice."""
    found = result(root, "evaluated")
    model = tiny_model()
    for weight, value in zip(model.parameters(), found["weights"], strict=True):
        weight.data.copy_(value)
    batch = collate([*token_rows()[:3], token_rows()[0]])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert [entry["eval_nll"] for entry in found["log"] if "eval_loss" in entry][-1] == pytest.approx(
        float(nll), rel=1e-5
    )


def test_the_sample_before_the_first_step_is_of_both_ranks(root: Path) -> None:
    model = tiny_model()
    model.load_state_dict(torch.load(root / "learnt.pt", weights_only=True))
    rate = first_rate(model, wrong_rows())
    assert 0.2 < rate < 0.6
    assert result(root, "sampled")["log"][0]["noise/estimated"] == pytest.approx(rate, abs=1e-3)
