"""Objectives that open the gate first or never shut it, against the formulas written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deft_lightning.callbacks.gate import tag_of
from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats, token_loss, token_stats
from deft_lightning.objectives import DEFT, DFT, EAFT, NLL, Cayley, Floored, Likelihood, Objective, RunState, Schedule

quick = settings(deadline=None, max_examples=25, derandomize=True)


def two_tokens(count: int = 40, vocab: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, vocab, generator=generator, dtype=torch.float64)
    return logits, torch.randint(vocab, (count,), generator=generator)


def gradient_of(logits: Tensor, targets: Tensor, objective: Any) -> Tensor:
    """By autograd through the whole softmax."""
    leaf = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(token_loss(leaf, targets, objective).sum(), leaf)
    return found


def wanted_gradient(logits: Tensor, targets: Tensor, gate: Tensor) -> Tensor:
    """The gate times the error."""
    error = torch.softmax(logits, -1) - torch.nn.functional.one_hot(targets, logits.shape[-1])
    return gate.unsqueeze(-1) * error


def p_and_collision(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    pi = torch.softmax(logits, -1)
    return pi.gather(-1, targets.unsqueeze(-1)).squeeze(-1), (pi**2).sum(-1)


# --- one objective after another ------------------------------------------------------------------------------------


def test_a_schedule_switches_on_the_step_at_which_its_share_of_the_steps_is_done() -> None:
    logits, targets = two_tokens()
    p, collision = p_and_collision(logits, targets)
    for steps in (10, 100, 7):
        for step in range(steps):
            there = Schedule(switch=0.3).at(RunState(step / steps))
            gate = torch.ones_like(p) if step * 10 < 3 * steps else p**collision
            torch.testing.assert_close(gradient_of(logits, targets, there), wanted_gradient(logits, targets, gate))


@quick
@given(progress=st.floats(0, 1), switch=st.floats(0, 1), share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_a_blend_mixes_losses_and_gates_in_proportion(progress: float, switch: float, share: float, seed: int) -> None:
    blend = share * (1 - switch)
    logits, targets = two_tokens(seed=seed)
    p, collision = p_and_collision(logits, targets)
    if blend < 1e-6 and abs(progress - switch) < 1e-6:
        return  # at the jump
    weight = min(max((progress - switch) / blend, 0.0), 1.0) if blend else float(progress >= switch)
    there = Schedule(switch=switch, blend=blend).at(RunState(progress))
    gate = (1 - weight) + weight * p**collision
    loss = -(1 - weight) * p.log() + weight * (1 - p**collision) / collision
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if blend < 1e-3 else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(there(token_stats(logits, targets)), loss, **tolerance)
    torch.testing.assert_close(gradient_of(logits, targets, there), wanted_gradient(logits, targets, gate), **tolerance)


@pytest.mark.parametrize(
    ("switch", "blend"), [(0.0, 0.0), (0.3, 0.0), (0.7, 0.3), (0.9, 0.1), (0.35, 0.65), (1.0, 0.0)]
)
def test_a_schedule_starts_as_the_first_and_ends_as_the_other(switch: float, blend: float) -> None:
    schedule = Schedule(switch=switch, blend=blend)
    stats = token_stats(*two_tokens())
    assert torch.equal(schedule.at(RunState(1.0))(stats), DEFT()(stats))
    assert torch.equal(schedule(stats), DEFT()(stats))
    first: Objective = NLL() if switch else DEFT()
    assert torch.equal(schedule.at(RunState(0.0))(stats), first(stats))


def test_what_a_schedule_needs_is_what_its_parts_need_at_the_time() -> None:
    schedule = Schedule(first=Cayley(floor=0.5), then=EAFT(k=5), switch=0.4, blend=0.2)
    assert schedule.scheduled and schedule.topk == 5
    there = [schedule.at(RunState(progress)) for progress in (0.0, 0.5, 0.7)]
    assert [(at.needs_batch, at.topk) for at in there] == [(True, 5), (True, 5), (False, 5)]
    with pytest.raises(UserError, match=r"^Schedule: .*entropies of 5 and of 20"):
        Schedule(first=EAFT(k=5), then=EAFT(k=20))
    assert Schedule(first=EAFT(k=5), then=EAFT(k=5, normalizer="none")).topk == 5


def test_a_schedule_has_the_focus_of_the_one_in_force_and_a_mix_has_none() -> None:
    schedule = Schedule(switch=0.4, blend=0.2)
    assert [schedule.at(RunState(at)).deformed for at in (0.0, 0.5, 0.6, 1.0)] == [NLL(), None, DEFT(), DEFT()]
    assert Schedule(then=DFT()).at(RunState(0.9)).deformed is None


def test_schedules_inside_schedules_follow_the_same_run() -> None:
    schedule = Schedule(first=Schedule(then=Likelihood(), switch=0.2), then=DEFT(), switch=0.5)
    stats = token_stats(*two_tokens())
    for progress, there in ((0.1, NLL()), (0.2, Likelihood()), (0.4, Likelihood()), (0.5, DEFT())):
        assert torch.equal(schedule.at(RunState(progress))(stats), there(stats)), progress


def test_legends_and_tags_of_nested_objectives_can_be_read() -> None:
    assert repr(Schedule()) == "Schedule(first=NLL(), then=DEFT(), switch=0.3)"
    assert tag_of(Schedule(blend=0.2)) == "Schedule_first_NLL_then_DEFT_switch_0.3_blend_0.2"
    assert repr(Floored(decay="linear")) == "Floored(base=DEFT(), floor=0.1, decay='linear')"
    assert (
        tag_of(Schedule(then=Floored()))
        == "Schedule_first_NLL_then_Floored_base_DEFT_floor_0.1_decay_constant_switch_0.3"
    )


# --- a gate that does not shut --------------------------------------------------------------------------------------


@quick
@given(floor=st.floats(0, 1), progress=st.floats(0, 1), decay=st.sampled_from(["constant", "linear"]),
       seed=st.integers(0, 1000))  # fmt: skip
def test_the_gate_is_the_larger_of_the_bases_and_the_floor(
    floor: float, progress: float, decay: Any, seed: int
) -> None:
    logits, targets = two_tokens(seed=seed)
    p, collision = p_and_collision(logits, targets)
    there = Floored(floor=floor, decay=decay).at(RunState(progress))
    smallest = floor * (1 - progress) if decay == "linear" else floor
    gate = (p**collision).clamp_min(smallest)
    stats = token_stats(logits, targets)
    torch.testing.assert_close(there.gate(stats), gate, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient_of(logits, targets, there), wanted_gradient(logits, targets, gate))
    base = (1 - p**collision) / collision
    missing = (smallest - p**collision).clamp_min(0)
    torch.testing.assert_close(there(stats), base - missing * p.log(), rtol=1e-9, atol=1e-12)


def test_a_floor_opens_some_gates_and_leaves_others() -> None:
    stats = token_stats(*two_tokens())
    below = Floored(floor=0.3).gate(stats) > DEFT().gate(stats)
    assert 5 < int(below.sum()) < 35


def test_a_linear_floor_starts_whole_and_ends_as_the_base() -> None:
    stats = token_stats(*two_tokens())
    floored = Floored(floor=0.3, decay="linear")
    assert torch.equal(floored.at(RunState(1.0))(stats), DEFT()(stats)) and torch.equal(floored(stats), DEFT()(stats))
    torch.testing.assert_close(floored.at(RunState(0.0))(stats), Floored(floor=0.3)(stats), rtol=0, atol=0)
    assert floored.scheduled and not Floored(floor=0.3).scheduled and Floored(base=Schedule()).scheduled


def test_a_floor_of_one_is_nll_in_its_gradient() -> None:
    logits, targets = two_tokens()
    torch.testing.assert_close(gradient_of(logits, targets, Floored(floor=1.0)), gradient_of(logits, targets, NLL()))


def test_a_label_the_model_rules_out_costs_what_the_base_says_once_there_is_no_floor() -> None:
    stats = TokenStats(torch.tensor([-math.inf]), torch.ones(1), torch.zeros(1), torch.tensor([False]))
    assert Floored(base=Likelihood(), decay="linear").at(RunState(1.0))(stats).item() == 1.0


@pytest.mark.parametrize("base", [DEFT(), Cayley(floor=0.5), EAFT(k=4), Schedule()], ids=repr)
def test_a_floor_needs_what_its_base_needs(base: Objective) -> None:
    floored = Floored(base=base)
    assert (floored.topk, floored.needs_batch, floored.deformed) == (base.topk, base.needs_batch, base.deformed)
