"""Every objective of the class tree: golden numbers, closed-form gates, and what any objective has to satisfy."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import math
import pickle
import pkgutil
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import random_context

import deft_lightning.objectives as objectives_package
from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats, deformed_log, token_loss, token_stats
from deft_lightning.objectives import (
    DEFT,
    DFT,
    EAFT,
    NLL,
    BySource,
    Cayley,
    Contaminated,
    DeformedLog,
    Floored,
    Focal,
    InfoSFT,
    KLAnchor,
    Likelihood,
    Mix,
    Objective,
    Rescaled,
    RunState,
    Schedule,
    Truncated,
    Tsallis,
    known_objectives,
)
from deft_lightning.objectives.parse import parse_objective


@dataclass(frozen=True, repr=False)
class EntropyWeighted(Objective):
    """An objective of a user: nobody tells the tests about it, they have to find it and hold it to every property."""

    temperature: float = 1.0
    topk: int = 4

    def __call__(self, stats: TokenStats) -> Tensor:
        assert stats.topk_entropy is not None
        weight = (-(stats.entropy + stats.topk_entropy).detach() / self.temperature).exp()
        return -weight * stats.log_prob


# A file added to the package counts even before the package's __init__ mentions it. Classes of other test modules do
# not: whether they have been imported yet depends on which tests run.
for _module in pkgutil.iter_modules(objectives_package.__path__, objectives_package.__name__ + "."):
    importlib.import_module(_module.name)
CLASSES = {
    name: cls
    for name, cls in known_objectives().items()
    if cls.__module__.startswith("deft_lightning.") or cls.__module__ == __name__
}
PARAMETRISED: list[Objective] = [
    Tsallis(q=0.9),
    Tsallis(q=0.1),
    Tsallis(q=-9.0),
    Tsallis(q=1 - 1e-12),
    Cayley(floor=0.5),
    Cayley(floor=1.0),
    Cayley(floor=1e-9),
    DEFT(eps=1e-6),
    EAFT(k=2),
    EAFT(k=5, normalizer="three"),
    EAFT(k=5, normalizer="none"),
    Focal(gamma=0.0),
    Focal(gamma=0.1),
    Focal(gamma=0.5),
    Focal(gamma=1.0),
    Focal(gamma=5.0),
    Truncated(threshold=0.3, base=Likelihood()),
    Truncated(threshold=0.3, keep="below", base=Cayley(floor=0.5)),
    Truncated(threshold=0.4, keep="below", base=EAFT(k=3), normalize_by="kept"),
    Truncated(threshold=0.0, base=DEFT(), normalize_by="kept"),
    Schedule(first=Cayley(floor=0.5), then=EAFT(k=3), switch=0.5, blend=0.25),
    Mix(first=Cayley(floor=0.5), second=EAFT(k=3), weight=0.3),
    Mix(first=KLAnchor(base=DEFT(), weight=0.2), second=Schedule(blend=0.7)),
    KLAnchor(base=Rescaled(base=Cayley(floor=0.5)), weight=0.0),
    InfoSFT(threshold=0.5, normalize_by="none"),
    Floored(base=Likelihood(), floor=0.5),
    Floored(base=Cayley(floor=0.5), decay="linear"),
    Truncated(threshold=0.3, base=Floored()),
    Rescaled(base=Cayley(floor=0.5), decay=0.0),
    Rescaled(base=Schedule(then=EAFT(k=3), blend=0.7)),
    Schedule(then=Rescaled(base=Likelihood()), blend=0.7),
    Contaminated(level="token"),
    Contaminated(level="answer"),
    Contaminated(chance="marginal", answer_chance="least", start=0.0, opening=0.5),
    Truncated(threshold=0.3, base=Contaminated()),
    Floored(base=Contaminated(), floor=0.2),
    Schedule(then=Contaminated(level="token"), blend=0.2),
    BySource(base=DEFT(), own={"a": NLL()}),
    BySource(base=Cayley(floor=0.5), own={"a": Truncated(threshold=0.3, normalize_by="kept"), "b": EAFT(k=3)}),
    BySource(base=Contaminated(), own={"a": Contaminated(level="token"), "b": Schedule(then=Rescaled(), blend=0.2)}),
]
# What holds of an objective holds of what it is in the middle of a run.
IN_FORCE: list[Objective] = [
    objective.at(RunState(progress, mean_gate, rates=(0.3, 0.2)))
    for progress, mean_gate in ((0.0, 0.2), (0.6, 0.3))
    for objective in [*(cls() for cls in CLASSES.values()), *PARAMETRISED]
    if objective.scheduled or objective.tracks is not None
]
# Gates that grow without bound as p falls: only such an objective may overflow at p = exp(-20000).
UNBOUNDED: list[Objective] = [Tsallis(q=1.5), Tsallis(q=2.0)]
BOUNDED: list[Objective] = [*(cls() for cls in CLASSES.values()), *PARAMETRISED, *IN_FORCE]
OBJECTIVES: list[Objective] = [*BOUNDED, *UNBOUNDED]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
every_bounded_objective = pytest.mark.parametrize("objective", BOUNDED, ids=repr)
quick = settings(deadline=None, max_examples=25, derandomize=True)

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "fixtures" / "objectives.json").read_text())
SHIFTED, MILD = GOLDEN["name"].index("shifted"), GOLDEN["name"].index("mild")


def random_tokens(count: int, vocab: int, seed: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits in float64 and targets that are the arg-max half of the time, so that every range of p occurs."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, vocab, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (count,), generator=generator)
    return logits, torch.where(torch.rand(count, generator=generator) < 0.5, logits.argmax(-1), targets)


def random_stats(count: int = 60, vocab: int = 9, seed: int = 0, topk: int = 3) -> TokenStats:
    logits, targets = random_tokens(count, vocab, seed)
    stats = token_stats(logits, targets, topk=topk, reference_logits=moved_from(logits))
    return stats.within(random_context(count))


def moved_from(logits: Tensor) -> Tensor:
    """What a reference predicts: the same, less sure."""
    return logits.detach() / 2


def stats_for(objective: Objective, logits: Tensor, targets: Tensor) -> TokenStats:
    stats = token_stats(logits, targets, topk=objective.topk, reference_logits=moved_from(logits))
    return stats.within(random_context(len(targets)))


def losses(logits: Tensor, targets: Tensor, objective: Objective) -> Tensor:
    """Loss of every token, with what the objective wants to know of tokens."""
    context = random_context(len(targets))
    return token_loss(logits, targets, objective, context=context, reference_logits=moved_from(logits))


def shuffled(stats: TokenStats, seed: int) -> Tensor:
    """An order of the tokens in which those of an answer still stand together."""
    assert stats.example is not None
    answers = stats.example.unique()
    places = torch.randperm(len(answers), generator=torch.Generator().manual_seed(seed))
    parts = [(stats.example == answers[place]).nonzero().flatten() for place in places]
    return torch.cat([part[torch.randperm(len(part))] for part in parts])


def stats_of_p(*p: float, collision: float = 0.5) -> TokenStats:
    """Statistics in float64 with the target probabilities given; collision and entropy as if two entries shared."""
    log_prob = torch.tensor(p, dtype=torch.float64).log()
    same = torch.full_like(log_prob, collision)
    return TokenStats(log_prob, same, torch.full_like(log_prob, math.log(2)), log_prob > -0.5, same)


# --- the class tree -----------------------------------------------------------------------------------------------


def test_objectives_are_found_through_the_class_tree_a_users_own_included() -> None:
    @dataclass(frozen=True, repr=False)
    class Halved(NLL):
        """A concrete class below a concrete class."""

        def __call__(self, stats: TokenStats) -> Tensor:
            return super().__call__(stats) / 2

    class Unfinished(DeformedLog):
        @abstractmethod
        def extra(self) -> float: ...

    found = known_objectives()
    assert found["Halved"] is Halved and found["EntropyWeighted"] is EntropyWeighted and found["DEFT"] is DEFT
    assert not {"Objective", "DeformedLog", "Unfinished"} & set(found)
    assert list(found) == sorted(found)
    assert EntropyWeighted() in BOUNDED  # so every property below is asked of it


def test_every_objective_of_the_package_can_be_imported_from_it() -> None:
    public = {name: getattr(objectives_package, name) for name in objectives_package.__all__}
    own = {name: cls for name, cls in CLASSES.items() if cls.__module__.startswith(objectives_package.__name__)}
    assert own.items() <= public.items() and len(own) >= 9


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES.keys())
def test_every_objective_is_a_frozen_dataclass_with_defaults(cls: type[Objective]) -> None:
    objective = cls()
    assert dataclasses.is_dataclass(objective)
    for name in [field.name for field in dataclasses.fields(objective)] or ["anything"]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(objective, name, 0.25)


@every_objective
def test_repr_evaluates_back_to_an_equal_object_with_the_same_hash(objective: Objective) -> None:
    if objective in IN_FORCE:
        pytest.skip("the legend names what was chosen, at every point of a run")
    for again in (eval(repr(objective), dict(CLASSES)), parse_objective(repr(objective))):
        assert again == objective and hash(again) == hash(objective) and type(again) is type(objective)


@every_objective
def test_what_is_pickled_or_copied_is_equal_and_in_force_as_it_was(objective: Objective) -> None:
    stats = random_stats(topk=objective.topk)
    for again in (pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective)):
        assert again == objective and hash(again) == hash(objective)
        assert torch.equal(again(stats), objective(stats))


def test_repr_is_a_legend_without_the_switches_that_are_off() -> None:
    assert [repr(o) for o in (NLL(), DEFT(), Cayley())] == ["NLL()", "DEFT()", "Cayley()"]
    assert repr(Cayley(floor=0.5)) == "Cayley(floor=0.5)"
    assert repr(Tsallis()) == "Tsallis(q=0.5)" and repr(Tsallis(q=0.0)) == "Tsallis(q=0.0)"


NAN, INF = math.nan, math.inf
INVALID: list[tuple[type[Objective], str, Any]] = [
    *((Tsallis, "q", bad) for bad in (NAN, INF, -INF)),
    *((Cayley, "floor", bad) for bad in (-0.1, 1.1, NAN, INF)),
    *((DEFT, "eps", bad) for bad in (-1e-9, NAN, INF)),
    *((EAFT, "k", bad) for bad in (1, 0, -3)),
    *((EAFT, "normalizer", bad) for bad in ("log", "", "None")),
    *((Focal, "gamma", bad) for bad in (-0.1, NAN, INF)),
    *((Truncated, "threshold", bad) for bad in (-0.1, 1.5, NAN)),
    (Truncated, "keep", "middle"),
    (Truncated, "normalize_by", "none"),
    *((Schedule, "switch", bad) for bad in (-0.1, 1.1, NAN, INF)),
    *((Schedule, "blend", bad) for bad in (-0.1, 0.8, NAN, INF)),
    *((Floored, "floor", bad) for bad in (-0.1, 1.1, NAN, INF)),
    (Floored, "decay", "cosine"),
    *((Rescaled, "decay", bad) for bad in (-0.1, 1.0, NAN, INF)),
    (Rescaled, "base", Rescaled()),
    (Rescaled, "base", Schedule(then=Rescaled())),
    (Contaminated, "level", "answers"),
    *((Contaminated, name, "bigram") for name in ("chance", "answer_chance")),
    *((Contaminated, name, bad) for name in ("start", "decay") for bad in (-0.1, 1.0, NAN, INF)),
    *((Contaminated, "opening", bad) for bad in (-0.1, 1.1, NAN, INF)),
    (BySource, "base", BySource(own={"a": NLL()})),
    (BySource, "own", {"a": BySource(own={"b": NLL()})}),
    (BySource, "own", {"a": EAFT(k=3), "b": EAFT(k=4)}),
    (BySource, "own", {"a": Rescaled(), "b": Rescaled()}),
    (BySource, "own", {"a": Contaminated(chance="unigram"), "b": Contaminated()}),
    (BySource, "own", {"a": "NLL"}),
]


@pytest.mark.parametrize(("cls", "field", "bad"), INVALID)
def test_an_invalid_parameter_is_refused_in_one_line_that_names_class_and_field(
    cls: type[Objective], field: str, bad: Any
) -> None:
    with pytest.raises(ValueError) as refused:
        cls(**{field: bad})
    message = str(refused.value)
    assert cls.__name__ in message and field in message and len(message.splitlines()) == 1
    assert isinstance(refused.value, UserError)


# --- a run and its objective ----------------------------------------------------------------------------------------


@every_objective
def test_called_outright_an_objective_is_what_it_is_at_the_end_of_a_run(objective: Objective) -> None:
    if objective in IN_FORCE:
        pytest.skip("it is at another point of its run")
    stats = random_stats(topk=objective.topk)
    there = objective.at(RunState())
    assert torch.equal(there(stats), objective(stats)) and torch.equal(there.gate(stats), objective.gate(stats))
    assert there == objective and hash(there) == hash(objective)


@every_objective
def test_what_an_objective_is_at_a_point_of_a_run_depends_on_what_it_says_it_depends_on(objective: Objective) -> None:
    early, late = (objective.at(RunState(progress, 0.2)) for progress in (0.0, 1.0))
    assert objective.scheduled or early == late
    assert objective.tracks is not None or objective.at(RunState(0.4, 0.2)) == objective.at(RunState(0.4, 0.9))
    for there in (early, late):
        # Statistics and legends are those of the objective that was chosen.
        assert (there.topk, repr(there), type(there)) == (objective.topk, repr(objective), type(objective))
        assert there.at(RunState(0.4, 0.9)) == objective.at(RunState(0.4, 0.9)), "no point of a run leaves a trace"


def test_an_objective_that_needs_nothing_of_a_run_is_not_even_copied() -> None:
    for objective in (NLL(), DEFT(eps=1e-6), Cayley(floor=0.5), EAFT()):
        assert objective.at(RunState(0.3, 0.2)) is objective and not objective.parts()


def test_the_parts_of_an_objective_follow_the_run_whatever_it_is() -> None:
    @dataclass(frozen=True, repr=False)
    class Twice(Objective):
        """Of a user who has never heard of runs."""

        base: Objective = dataclasses.field(default_factory=Schedule)

        def __call__(self, stats: TokenStats) -> Tensor:
            return 2 * self.base(stats)

    stats = random_stats()
    assert Twice().scheduled and Twice().parts() == {"base": Schedule()} and not Twice(DEFT()).scheduled
    torch.testing.assert_close(Twice().at(RunState(0.1)).gate(stats), torch.full_like(stats.log_prob, 2.0))
    torch.testing.assert_close(Twice().at(RunState(0.3)).gate(stats), 2 * DEFT().gate(stats))
    truncated = Truncated(threshold=0.0, base=Schedule())
    assert torch.equal(truncated.at(RunState(0.1))(stats), NLL()(stats))
    assert torch.equal(truncated.at(RunState(0.4))(stats), DEFT()(stats))


def test_a_run_keeps_one_mean_gate_and_says_so() -> None:
    @dataclass(frozen=True, repr=False)
    class Sum(Objective):
        one: Objective = dataclasses.field(default_factory=NLL)
        other: Objective = dataclasses.field(default_factory=NLL)

        def __call__(self, stats: TokenStats) -> Tensor:
            return self.one(stats) + self.other(stats)

    assert Sum().tracks is None
    tracked = Sum(one=Rescaled(DEFT(), decay=0.5)).tracks
    assert Sum(other=Contaminated()).tracks == Contaminated().tracks
    assert tracked is not None and tracked == (DEFT(), 0.5)
    with pytest.raises(UserError, match=r"^Sum\(.*one mean gate"):
        _ = Sum(Rescaled(), Rescaled(NLL())).tracks
    with pytest.raises(UserError, match=r"^Schedule: .*both be rescaled"):
        Schedule(first=Rescaled(NLL()), then=Rescaled())


@pytest.mark.parametrize(("mean_gate", "scale"), [(1.0, 1.0), (0.25, 4.0), (2.5, 0.4), (0.01, 100.0), (0.0, 100.0)])
def test_a_rescaled_objective_is_divided_by_the_mean_gate_but_not_by_a_shut_one(mean_gate: float, scale: float) -> None:
    logits, targets = random_tokens(30, 8, seed=20)
    pi = torch.softmax(logits, dim=-1)
    p, collision = pi.gather(-1, targets.unsqueeze(-1)).squeeze(-1), pi.square().sum(-1)
    there = Rescaled().at(RunState(mean_gate=mean_gate))
    stats = token_stats(logits, targets)
    torch.testing.assert_close(there(stats), scale * (1 - p**collision) / collision)
    torch.testing.assert_close(there.gate(stats), scale * p**collision)
    assert there.tracks == (DEFT(), 0.99) and there.deformed == DEFT()


def test_what_is_tracked_is_the_base_as_it_is_in_force() -> None:
    stats = random_stats()
    rescaled = Rescaled(base=Schedule(switch=0.5))
    for progress, base in ((0.2, NLL()), (0.7, DEFT())):
        there = rescaled.at(RunState(progress, 0.5))
        assert there.tracks is not None
        assert torch.equal(there.tracks.objective.gate(stats), base.gate(stats))
        torch.testing.assert_close(there(stats), 2 * base(stats))


def test_the_focus_of_a_wrapper_is_that_of_what_it_wraps() -> None:
    assert DEFT().deformed == DEFT() and Focal().deformed is DFT().deformed is None
    assert Truncated(base=Floored(base=Tsallis(q=0.3))).deformed == Tsallis(q=0.3)
    assert Truncated(base=Focal()).deformed is None


# --- golden numbers -----------------------------------------------------------------------------------------------


def golden(name: str, key: str) -> Tensor:
    return torch.tensor(GOLDEN["objectives"][name][key], dtype=torch.float64)


def golden_values(objective: Objective, logits: Tensor) -> dict[str, Tensor]:
    stats = stats_for(objective, logits, torch.tensor(GOLDEN["target"]))
    found = {"loss": objective(stats), "gate": objective.gate(stats)}
    if isinstance(objective, DeformedLog):
        found["alpha"] = objective.focus(stats)
    return {key: value.double() for key, value in found.items()}


def gate_conditioning(name: str) -> Tensor:
    """How much a relative error of log p or alpha is amplified in ``p^alpha = exp(alpha log p)``; 0 where no alpha."""
    record = GOLDEN["objectives"][name]
    log_prob = torch.tensor(GOLDEN["log_prob"], dtype=torch.float64)
    return (golden(name, "alpha") * log_prob).abs() if "alpha" in record else torch.zeros_like(log_prob)


def violations(name: str, found: dict[str, Tensor], tolerance: dict[str, Tensor], skip: int | None = None) -> list[str]:
    wrong = []
    for key in GOLDEN["objectives"][name]:
        wanted = golden(name, key)
        over = (found[key] - wanted).abs() > tolerance[key]
        if skip is not None:
            over[skip] = False
        rows = over.nonzero().flatten().tolist()
        wrong += [f"{GOLDEN['name'][i]}.{key}: {found[key][i].item()} != {wanted[i].item()}" for i in rows]
    return wrong


# "shifted" has logits near 1000, which binary numbers hold to half an ulp. Each logit is off by at most that, log p and
# the entropies by at most twice as much, and the steepest function of them in the table is p^10.
def input_rounding(dtype: torch.dtype) -> float:
    return 10 * 2 * (512 * torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("name", GOLDEN["objectives"])
def test_golden_loss_gate_and_alpha_in_float64(name: str) -> None:
    objective = eval(name, dict(CLASSES))
    found = golden_values(objective, torch.tensor(GOLDEN["logits"], dtype=torch.float64))
    tolerance = {key: 1e-12 * golden(name, key).abs() for key in GOLDEN["objectives"][name]}
    for key, bound in tolerance.items():
        bound[SHIFTED] += input_rounding(torch.float64) * golden(name, key)[SHIFTED].abs()
    wrong = violations(name, found, tolerance)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", GOLDEN["objectives"])
def test_golden_loss_gate_and_alpha_in_float32(name: str) -> None:
    objective = eval(name, dict(CLASSES))
    logits = torch.tensor(GOLDEN["logits"], dtype=torch.float64)
    # "shifted" is "mild" plus 1000 and has its own test: as "mild" it leaves the mean over the batch what it is.
    logits[SHIFTED] = logits[MILD]
    found = golden_values(objective, logits.float())
    # 1e-30: float32 holds numbers such as the saturated token's 1 - p = 4e-39 only as subnormals, if at all.
    tolerance = {key: 2e-6 * golden(name, key).abs() + 1e-30 for key in GOLDEN["objectives"][name]}
    # Half an ulp in log p and half an ulp in the product with alpha is what exp(alpha log p) then amplifies.
    tolerance["gate"] += torch.finfo(torch.float32).eps * gate_conditioning(name) * golden(name, "gate").abs()
    wrong = violations(name, found, tolerance)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", GOLDEN["objectives"])
def test_golden_token_with_logits_near_a_thousand_loses_only_its_input_rounding(name: str) -> None:
    objective = eval(name, dict(CLASSES))
    found = golden_values(objective, torch.tensor(GOLDEN["logits"]))
    for key in GOLDEN["objectives"][name]:
        wanted = golden(name, key)[SHIFTED].item()
        rounding = input_rounding(torch.float32)
        assert found[key][SHIFTED].item() == pytest.approx(wanted, rel=2e-6 + rounding, abs=0), key


# --- closed forms -------------------------------------------------------------------------------------------------


def entropy_of_largest(logits: Tensor, k: int) -> Tensor:
    pi = torch.softmax(logits, dim=-1).topk(min(k, logits.shape[-1]), dim=-1).values
    return torch.special.entr(pi / pi.sum(-1, keepdim=True)).sum(-1)


# Objective: loss and gate from p, all probabilities pi and the logits, as the papers print them.
CLOSED_FORMS: list[tuple[Objective, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]]] = [
    (NLL(), lambda p, pi, z: (-p.log(), torch.ones_like(p))),
    (Likelihood(), lambda p, pi, z: (1 - p, p)),
    (Tsallis(q=0.3), lambda p, pi, z: ((1 - p**0.7) / 0.7, p**0.7)),
    (Tsallis(q=2.0), lambda p, pi, z: ((1 - p**-1) / -1, p**-1)),
    (Cayley(), lambda p, pi, z: ((1 - p ** (p / (2 - p))) * (2 - p) / p, p ** (p / (2 - p)))),
    (
        DEFT(),
        lambda p, pi, z: (
            (1 - p ** (pi**2).sum(-1)) / (pi**2).sum(-1),
            p ** (pi**2).sum(-1),
        ),
    ),
    (DFT(), lambda p, pi, z: (-p * p.log(), p)),
    (
        EAFT(k=4),
        lambda p, pi, z: (
            -entropy_of_largest(z, 4) / math.log(4) * p.log(),
            entropy_of_largest(z, 4) / math.log(4),
        ),
    ),
    (
        Focal(gamma=1.5),
        lambda p, pi, z: (
            -((1 - p) ** 1.5) * p.log(),
            (1 - p) ** 1.5 - 1.5 * p * (1 - p) ** 0.5 * p.log(),
        ),
    ),
    (
        Truncated(threshold=0.25),
        lambda p, pi, z: (-p.log() * (p >= 0.25), (p >= 0.25).to(p.dtype)),
    ),
    (
        Truncated(threshold=0.25, keep="below", base=Likelihood()),
        lambda p, pi, z: ((1 - p) * (p <= 0.25), p * (p <= 0.25)),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "formula"), CLOSED_FORMS, ids=[repr(o) for o, _ in CLOSED_FORMS])
@quick
@given(vocab=st.integers(2, 20), seed=st.integers(0, 10_000))
def test_loss_and_gate_are_the_published_formulas(
    objective: Objective, formula: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], vocab: int, seed: int
) -> None:
    logits, targets = random_tokens(8, vocab, seed)
    pi = torch.softmax(logits, dim=-1)
    p = pi.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    loss, gate = formula(p, pi, logits)
    stats = stats_for(objective, logits, targets)
    torch.testing.assert_close(objective(stats), loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(objective.gate(stats), gate, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@every_objective
@quick
@given(count=st.integers(1, 9), vocab=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_gradient_on_the_logits_is_the_gate_times_the_error(
    objective: Objective, count: int, vocab: int, seed: int
) -> None:
    logits, targets = random_tokens(count, vocab, seed)
    logits.requires_grad_()
    (found,) = torch.autograd.grad(losses(logits, targets, objective).sum(), logits)
    plain = logits.detach()
    error = torch.softmax(plain, dim=-1) - torch.nn.functional.one_hot(targets, vocab)
    stats = stats_for(objective, plain, targets)
    gate = objective.gate(stats)
    assert gate.shape == (count,) and not gate.requires_grad and stats.reference_kl is not None
    leaf = stats.reference_kl.clone().requires_grad_()
    loss = objective(stats._replace(log_prob=stats.log_prob.requires_grad_(), reference_kl=leaf))
    (pull,) = torch.autograd.grad(loss.sum(), leaf, materialize_grads=True)
    toward = pull.unsqueeze(-1) * (plain.softmax(-1) - moved_from(plain).softmax(-1))
    torch.testing.assert_close(found, gate.unsqueeze(-1) * error + toward, rtol=1e-9, atol=1e-14)


# Those whose loss, with collision and entropies fixed, is a plain function of log p: DFT, Cayley and Truncated hold a
# function of log p itself fixed, which differences would see and the gate must not.
@pytest.mark.parametrize(
    "objective",
    [NLL(), Likelihood(), Tsallis(q=0.5), Tsallis(q=2.0), DEFT(), DEFT(eps=1e-2), EAFT(k=3), Focal(), Focal(gamma=0.5)],
    ids=repr,
)
def test_gate_is_the_finite_difference_of_the_loss_in_log_prob(objective: Objective) -> None:
    stats = random_stats(count=8)
    step = 1e-5
    up, down = (objective(stats._replace(log_prob=stats.log_prob + sign * step)) for sign in (1, -1))
    torch.testing.assert_close(objective.gate(stats), -(up - down) / (2 * step), rtol=1e-7, atol=1e-8)


@every_objective
def test_loss_is_differentiable_in_log_prob_alone(objective: Objective) -> None:
    fields = random_stats()._asdict().items()
    leaves = {
        name: field.detach().clone().requires_grad_()
        for name, field in fields
        if field is not None and field.is_floating_point()
    }
    assert leaves.keys() > {"log_prob", "collision", "chance", "answer_chance"}
    loss = objective(random_stats()._replace(**leaves))
    assert loss.shape == leaves["log_prob"].shape and loss.requires_grad
    grads = dict(zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True), strict=True))
    assert grads.pop("log_prob") is not None
    pull = grads.pop("reference_kl")
    assert (pull is not None) is objective.needs.reference, "and in the KL to a reference, where it looks at it"
    assert all(grad is None or not grad.any() for grad in grads.values())


# --- what the head and the monitors rely on -------------------------------------------------------------------------


@every_objective
def test_tokens_are_independent_unless_the_objective_says_needs_batch(objective: Objective) -> None:
    stats = random_stats(topk=objective.topk)
    index = torch.tensor([40, 3, 17, 3])
    if not objective.needs_batch:
        torch.testing.assert_close(objective(stats.select(index)), objective(stats)[index], rtol=0, atol=0)
        torch.testing.assert_close(objective.gate(stats.select(index)), objective.gate(stats)[index], rtol=0, atol=0)
    order = shuffled(stats, seed=0)
    torch.testing.assert_close(objective(stats.select(order)), objective(stats)[order], rtol=1e-12, atol=1e-14)


def test_needs_batch_and_topk_follow_the_parameters() -> None:
    assert not Cayley().needs_batch and Cayley(floor=0.5).needs_batch
    assert not Truncated().needs_batch and Truncated(normalize_by="kept").needs_batch
    assert Truncated(base=Cayley(floor=0.5)).needs_batch
    assert EAFT(k=7).topk == 7 and Truncated(base=EAFT(k=7)).topk == 7
    assert NLL().topk == Truncated().topk == 0


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [[], [0, 3, 9], list(range(10))])
@every_objective
def test_loss_is_zero_where_ignored_and_unaffected_by_padding(objective: Objective, ignored: list[int]) -> None:
    logits, targets = random_tokens(10, 7, seed=12)
    keep = torch.ones(10, dtype=torch.bool)
    keep[ignored] = False
    known = random_context(10)
    beside = moved_from(logits)
    loss = token_loss(logits, targets.masked_fill(~keep, -100), objective, context=known, reference_logits=beside)
    assert (loss[~keep] == 0).all()
    context = known.select(keep)
    alone = token_loss(logits[keep], targets[keep], objective, context=context, reference_logits=beside[keep])
    torch.testing.assert_close(loss[keep], alone, rtol=0, atol=0)
    if keep.any():
        assert (loss != 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 5])
@every_objective
def test_a_batch_without_supervised_tokens_is_a_zero_connected_to_the_graph(objective: Objective, count: int) -> None:
    logits = torch.randn(count, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = losses(logits, torch.full((count,), -100), objective)
    assert loss.requires_grad and loss.sum().item() == 0
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert grad.shape == logits.shape and not grad.any()


@pytest.mark.slow
@every_objective
def test_gate_works_without_gradients_and_in_inference_mode(objective: Objective) -> None:
    logits, targets = random_tokens(20, 6, seed=13)
    wanted = objective.gate(stats_for(objective, logits, targets))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            stats = stats_for(objective, logits, targets)
            torch.testing.assert_close(objective.gate(stats), wanted, rtol=0, atol=0)
            assert torch.is_grad_enabled() is False
        torch.testing.assert_close(objective.gate(stats), wanted, rtol=0, atol=0)


@every_objective
def test_gate_leaves_the_graph_of_the_statistics_alone(objective: Objective) -> None:
    logits, targets = random_tokens(20, 6, seed=14)
    logits.requires_grad_()
    stats = stats_for(objective, logits, targets)
    gate = objective.gate(stats)
    assert not gate.requires_grad and stats.log_prob.requires_grad
    (grad,) = torch.autograd.grad(objective(stats).sum(), logits)
    (wanted,) = torch.autograd.grad(objective(stats_for(objective, logits, targets)).sum(), logits)
    torch.testing.assert_close(grad, wanted, rtol=0, atol=0)


def extreme_logits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    big, inf, vocab = 1e4, torch.inf, 8
    spread = [big, -big] * (vocab // 2)
    rows = [
        *([sign * big if v == 0 else -sign * big for v in range(vocab)] for sign in (1, -1)),
        spread,
        [big] * vocab,
        [-big] * vocab,
        [0.0] * vocab,
        [0.0] * 4 + [-inf] * 4,
        [big, -big, 0.0, 1.0] + [-inf] * 4,
        [0.0, 1.0] + [-inf] * 6,
        # Nearly certain: 1 - p runs through the last normal and the subnormal float32 numbers down to 0.
        *(
            [gap] + [0.0] * (vocab - 1)
            for gap in (15.0, 17.0, 60.0, 86.0, 88.0, 95.0, 100.0, 102.0, 103.0, 104.0, 200.0)
        ),
    ]
    logits = torch.tensor(rows, dtype=dtype)
    # Every row with target 0 and with target 1, so that each confident row is right once and wrong once.
    return logits.repeat(2, 1), torch.arange(2).repeat_interleave(len(rows))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_bounded_objective
def test_values_and_gradients_are_finite_for_extreme_logits(objective: Objective, dtype: torch.dtype) -> None:
    logits, targets = extreme_logits(dtype)
    logits.requires_grad_()
    loss = losses(logits, targets, objective)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    gate = objective.gate(stats_for(objective, logits.detach(), targets))
    for name, value in (("loss", loss), ("gate", gate), ("gradient", grad)):
        rows = (~torch.isfinite(value.reshape(len(targets), -1))).any(-1).nonzero().flatten().tolist()
        assert not rows, f"{name} is not finite for {[(logits[i].tolist(), targets[i].item()) for i in rows]}"
    assert (loss >= 0).all() and (gate >= 0).all()


# --- relations between objectives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Tsallis(q=1.0), NLL()),
        (Tsallis(q=0.0), Likelihood()),
        (Focal(gamma=0.0), NLL()),
        (Truncated(threshold=0.0, base=DEFT()), DEFT()),
        (Truncated(threshold=1.0, keep="below", base=DEFT()), DEFT()),
        (Truncated(threshold=0.0, base=DEFT(), normalize_by="kept"), DEFT()),
    ],
    ids=repr,
)
def test_limits_are_exact(one: Objective, other: Objective, dtype: torch.dtype) -> None:
    logits, targets = random_tokens(40, 9, seed=15, scale=6.0)
    logits[:2, 5] = 1000.0
    targets[:2] = torch.tensor([5, 6])  # certain, and right or wrong
    stats = stats_for(one, logits.to(dtype), targets)
    assert torch.equal(one(stats), other(stats))
    assert torch.equal(one.gate(stats), other.gate(stats))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_deft_on_a_one_hot_prediction_is_likelihood(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 6, dtype=dtype)
    logits[:, 2] = 1000.0
    logits[2, :2] = -torch.inf
    targets = torch.tensor([2, 4, 5])
    stats = token_stats(logits, targets)
    assert torch.equal(DEFT()(stats), Likelihood()(stats))
    assert torch.equal(DEFT().gate(stats), Likelihood().gate(stats))
    assert DEFT()(stats).tolist() == [0.0, 1.0, 1.0]


def test_dft_has_the_gradient_of_likelihood_but_not_its_value() -> None:
    logits, targets = random_tokens(30, 8, seed=16)
    logits.requires_grad_()
    losses = [token_loss(logits, targets, objective) for objective in (DFT(), Likelihood())]
    grads = [torch.autograd.grad(loss.sum(), logits)[0] for loss in losses]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-15)
    assert ((losses[0] - losses[1]).abs() > 1e-3).any()


@pytest.mark.parametrize("gap", [0.0, 1e-300, 1e-16, 1e-12])
def test_tsallis_near_one_tends_to_nll(gap: float) -> None:
    stats = random_stats()
    near, limit = Tsallis(q=1 - gap), NLL()
    torch.testing.assert_close(near(stats), limit(stats), rtol=20 * gap + 1e-15, atol=0)
    torch.testing.assert_close(near.gate(stats), limit.gate(stats), rtol=20 * gap + 1e-15, atol=0)


@pytest.mark.parametrize("p", [1e-20, 1e-300, 1e-323])
def test_cayley_with_a_tiny_or_subnormal_focus_is_nll(p: float) -> None:
    stats = stats_of_p(p)
    assert 0 < Cayley().focus(stats).item() < 1e-19
    assert Cayley()(stats).item() == pytest.approx(-math.log(p), rel=1e-14)
    assert Cayley().gate(stats).item() == pytest.approx(1.0, rel=1e-14)


def test_gate_of_deformed_objectives_is_p_to_the_focus_even_for_improbable_tokens() -> None:
    p = torch.tensor([1e-3, 1e-8, 1e-30, 1e-200], dtype=torch.float64)
    stats = stats_of_p(*p.tolist(), collision=0.9)
    for objective, alpha in [(Likelihood(), 1.0), (Tsallis(q=0.5), 0.5), (DEFT(), 0.9), (Tsallis(q=0.9), 0.1)]:
        torch.testing.assert_close(objective.gate(stats), p**alpha, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("vocab", "share"), [(151_936, 0.868), (262_144, 0.79)])
def test_deft_eps_scales_a_uniform_prediction_as_the_official_code_does(vocab: int, share: float) -> None:
    stats = stats_of_p(1 / vocab, collision=1 / vocab)
    ratio = DEFT(eps=1e-6).gate(stats) / DEFT().gate(stats)
    assert ratio.item() == pytest.approx(share, abs=0.5 * 10 ** -len(str(share)[2:]))


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_deft_eps_scales_loss_and_gradient_by_alpha_over_alpha_plus_eps(eps: float) -> None:
    logits, targets = random_tokens(30, 8, seed=17)
    logits.requires_grad_()
    losses = [token_loss(logits, targets, objective) for objective in (DEFT(eps=eps), DEFT())]
    grads = [torch.autograd.grad(loss.sum(), logits)[0] for loss in losses]
    alpha = torch.softmax(logits.detach(), dim=-1).square().sum(-1)
    torch.testing.assert_close(losses[0], losses[1] * alpha / (alpha + eps), rtol=1e-12, atol=0)
    torch.testing.assert_close(grads[0], grads[1] * (alpha / (alpha + eps)).unsqueeze(-1), rtol=1e-12, atol=0)


def test_cayley_floor_shuts_the_gate_of_an_improbable_token() -> None:
    low = 1e-4
    assert Cayley().gate(stats_of_p(low)).item() == pytest.approx(0.9995, abs=5e-5)
    for mean, gate, tolerance in [(0.5, 0.10, 5e-3), (0.9, 0.016, 5e-4)]:
        others = (20 * mean - low) / 19
        found = Cayley(floor=0.5).gate(stats_of_p(low, *[others] * 19))
        assert found[0].item() == pytest.approx(gate, abs=tolerance)


def test_cayley_floor_lifts_and_clamps_the_focus() -> None:
    p = torch.tensor([1e-9, 0.2, 0.9], dtype=torch.float64)
    stats = stats_of_p(*p.tolist())
    lift = 0.5 * p.mean()
    wanted = lift + (1 - lift) * p / (2 - p)
    torch.testing.assert_close(Cayley(floor=0.5).focus(stats), wanted, rtol=1e-13, atol=0)
    assert Cayley(floor=1e-9).focus(stats)[0].item() == 1e-3
    assert Cayley().focus(stats)[0].item() == pytest.approx(5e-10, rel=1e-6)  # no clamp without a floor
    assert Cayley(floor=1.0).focus(stats_of_p(1.0, 1.0)).tolist() == [1.0, 1.0]


def test_truncated_keeps_a_token_on_the_threshold_on_either_side() -> None:
    stats = TokenStats(*(torch.zeros(1, dtype=torch.float64),) * 4)
    assert stats.log_prob.exp().item() == 1.0
    above, below = Truncated(threshold=1.0), Truncated(threshold=1.0, keep="below")
    assert above.gate(stats).item() == below.gate(stats).item() == 1.0


@pytest.mark.parametrize("base", [NLL(), Likelihood(), DEFT()], ids=repr)
@pytest.mark.parametrize("keep", ["above", "below"])
def test_truncated_normalised_by_kept_turns_a_mean_over_all_into_the_mean_over_the_kept(
    keep: Any, base: Objective
) -> None:
    stats = random_stats()
    p = stats.log_prob.exp()
    kept = p >= 0.4 if keep == "above" else p <= 0.4
    assert 0 < kept.sum() < len(p)
    by_kept = Truncated(threshold=0.4, keep=keep, base=base, normalize_by="kept")
    by_all = Truncated(threshold=0.4, keep=keep, base=base)
    torch.testing.assert_close(by_kept(stats).mean(), base(stats)[kept].mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(by_kept.gate(stats)[kept].mean() * kept.sum() / len(p), base.gate(stats)[kept].mean())
    torch.testing.assert_close(by_all(stats).mean(), base(stats)[kept].sum() / len(p), rtol=1e-12, atol=0)
    assert not by_kept(stats)[~kept].any() and not by_all.gate(stats)[~kept].any()


@pytest.mark.parametrize("normalize_by", ["all", "kept"])
def test_truncated_with_nothing_to_keep_is_zero_with_a_zero_gradient(normalize_by: Any) -> None:
    logits, targets = random_tokens(5, 6, seed=18)
    logits.requires_grad_()
    loss = token_loss(logits, targets, Truncated(threshold=1.0, normalize_by=normalize_by))
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert not loss.any() and not grad.any()


@pytest.mark.parametrize("k", [2, 5, 50])
def test_eaft_normalizers_divide_the_same_entropy(k: int) -> None:
    logits, targets = random_tokens(20, 7, seed=19)
    entropy = entropy_of_largest(logits, k)
    for normalizer, divisor in [("log_k", math.log(k)), ("three", 3.0), ("none", 1.0)]:
        objective = EAFT(k=k, normalizer=normalizer)
        gate = objective.gate(stats_for(objective, logits, targets))
        torch.testing.assert_close(gate, entropy / divisor, rtol=1e-11, atol=0)


def test_eaft_without_the_entropy_it_needs_says_how_to_get_it() -> None:
    stats = random_stats()._replace(topk_entropy=None)
    with pytest.raises(UserError, match=r"EAFT.*topk=9") as refused:
        EAFT(k=9)(stats)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("gamma", [0.01, 0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("log_prob", [0.0, -1e-45, -1e-44, -1e-41, -1e-38, -2e-38, -1e-30, -1e-10, -1e-3])
def test_focal_gate_of_a_nearly_certain_token_follows_its_formula_in_float32(gamma: float, log_prob: float) -> None:
    lp = torch.tensor([log_prob])
    rest = -math.expm1(lp.item())
    wanted = rest**gamma - gamma * math.exp(lp.item()) * rest ** (gamma - 1) * lp.item() if rest else 0.0
    stats = TokenStats(lp, torch.ones(1), torch.zeros(1), torch.ones(1, dtype=torch.bool))
    found = Focal(gamma=gamma).gate(stats).item()
    if abs(log_prob) < torch.finfo(torch.float32).tiny:
        # A subnormal 1 - p may count as 0, as on devices that flush it; it must not make the gate exceed the formula.
        assert 0 <= found <= wanted * (1 + 1e-5)
    else:
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-37)


def test_a_member_of_the_deformed_family_states_nothing_but_its_focus() -> None:
    class Fixed(DeformedLog):
        def focus(self, stats: TokenStats) -> Tensor:
            return torch.full_like(stats.log_prob, 0.3)

    stats = random_stats()
    torch.testing.assert_close(Fixed()(stats), deformed_log(stats.log_prob, 0.3), rtol=0, atol=0)
    torch.testing.assert_close(Fixed().gate(stats), (0.3 * stats.log_prob).exp(), rtol=1e-12, atol=0)
