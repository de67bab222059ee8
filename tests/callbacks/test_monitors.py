"""Monitors against numpy on the concatenated tokens, fed with statistics of their own."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deft_lightning.callbacks import EntropyMonitor, GateMonitor, NoiseMonitor, TokenMonitor, drawings
from deft_lightning.callbacks.occupancy import occupancy
from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats, token_stats
from deft_lightning.objectives import DEFT, DFT, EAFT, NLL, Cayley, Likelihood, Objective, Tsallis

VOCABULARY = 40
COUNTS = (17, 0, 301, 182)


def micro_batches() -> list[tuple[TokenStats, torch.Tensor, torch.Tensor]]:
    """Statistics from flat to concentrated predictions, which tokens are noisy, and what their clean labels are."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for count in COUNTS:
        scale = 6 * torch.rand(count, 1, generator=generator)
        logits = scale * torch.randn(count, VOCABULARY, generator=generator)
        guess = logits.argmax(-1) if count else torch.zeros(0, dtype=torch.long)
        other = torch.randint(0, VOCABULARY, (count,), generator=generator)
        targets = torch.where(torch.rand(count, generator=generator) < 0.6, guess, other)
        noisy = (torch.rand(count, generator=generator) < 0.3).long()
        # Of noisy tokens: the first choice, the second, or nobody knows.
        clean = logits.topk(2, dim=-1).indices.gather(-1, torch.randint(2, (count, 1), generator=generator)).squeeze(-1)
        clean = torch.where(torch.rand(count, generator=generator) < 0.7, clean, -100)
        found.append((token_stats(logits, targets), noisy, torch.where(noisy > 0, clean, targets)))
    return found


class Columns:
    """The same tokens, concatenated, in float64."""

    def __init__(self) -> None:
        parts = micro_batches()
        stats = [np.concatenate([part[0][i].numpy() for part in parts]) for i in range(4)]
        log_p, self.c, self.h = (column.astype(np.float64) for column in stats[:3])
        self.correct, self.noisy = stats[3], np.concatenate([part[1].numpy() for part in parts]) > 0
        self.first = np.concatenate([part[0].arg_max.numpy() for part in parts])
        self.clean = np.concatenate([part[2].numpy() for part in parts])
        self.log_p, self.p = log_p, np.exp(log_p)
        self.gate = np.exp(self.c * log_p)  # of DEFT
        self.mass = self.gate * (1 - self.p)


class Run(SimpleNamespace):
    """What a monitor asks of trainer and module, and what it wrote."""

    def __init__(self, objective: Objective) -> None:
        super().__init__(
            objective=objective, current_objective=objective, loggers=[self], scalars={}, histograms={}, grids=[]
        )
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY))
        self.model, self.is_global_zero, self.device = SimpleNamespace(config=config), True, "cpu"
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0))

    def log(self, tag: str, value: float) -> None:
        assert tag not in self.scalars
        self.scalars[tag] = value

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            self.log(tag, value)


def watch(monitor: TokenMonitor, objective: Objective, monkeypatch: pytest.MonkeyPatch) -> Run:
    run: Any = Run(objective)
    monkeypatch.setattr(monitor, "write_histogram", lambda _, tag, row: run.histograms.update({tag: row}))
    monkeypatch.setattr(monitor, "write_figure", lambda _, tag, draw: run.grids.append((tag, draw())))
    monitor.setup(run, run, "fit")
    packed = monitor.open(run, run)
    for stats, noisy, clean in micro_batches():
        monitor.observe(packed, run, stats, noisy, clean)
    monitor.report(run, run, packed.rows())
    return run


def ess(gate: np.ndarray) -> float:
    return float(gate.sum() ** 2 / (len(gate) * np.square(gate).sum()))


def test_means_of_gate_focus_and_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    run, tokens = watch(GateMonitor(), DEFT(), monkeypatch), Columns()
    expected = {"gate/mean": tokens.gate.mean(), "gate/ess": ess(tokens.gate), "prob/mean": tokens.p.mean(),
                "focus/mean": tokens.c.mean()}  # fmt: skip
    for tag, value in expected.items():
        assert run.scalars[tag] == pytest.approx(value, rel=1e-6), tag


def test_the_entropies_and_the_collision_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    run, tokens = watch(EntropyMonitor(bins=30), DEFT(), monkeypatch), Columns()
    named = {"entropy/shannon": tokens.h, "entropy/renyi2": -np.log(tokens.c), "collision/mean": tokens.c}
    for tag, values in named.items():
        assert run.scalars[tag] == pytest.approx(values.mean(), rel=1e-6, abs=1e-7), tag
    top = math.log(VOCABULARY)
    for tag, values, high in (("entropy/hist", tokens.h, top), ("entropy/renyi2_hist", -np.log(tokens.c), top),
                              ("collision/hist", tokens.c, 1.0)):  # fmt: skip
        row = run.histograms[tag]
        assert row.counts == np.histogram(values, 30, (0, high))[0].tolist(), tag
        assert (row.sum, row.sum_squares) == pytest.approx((values.sum(), np.square(values).sum()), rel=1e-6), tag


@pytest.mark.parametrize("bins", [50, 1])
def test_quantiles_are_those_of_numpy(bins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, scalars = Columns(), {}
    for monitor in (GateMonitor(bins=bins), EntropyMonitor(bins=bins)):
        scalars |= watch(monitor, DEFT(), monkeypatch).scalars
    for name, values in (("gate", tokens.gate), ("prob", tokens.p), ("entropy", tokens.h)):
        for percent in (10, 50, 90):
            exact = np.quantile(values, percent / 100, method="inverted_cdf")
            assert scalars[f"{name}/q{percent}"] == pytest.approx(exact, rel=1e-6), (name, percent)
    assert scalars["gate/q10"] < scalars["gate/q50"] < scalars["gate/q90"]


def test_quantiles_of_gates_above_one_are_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    run, tokens = watch(GateMonitor(), Tsallis(q=2.0), monkeypatch), Columns()
    exact = np.quantile(1 / tokens.p, 0.9, method="inverted_cdf")
    assert exact > 100 and run.scalars["gate/q90"] == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("bins", [50, 20])
def test_histograms_of_gate_focus_and_probability_count_and_sum_as_numpy_does(
    bins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tokens = watch(GateMonitor(bins=bins), DEFT(), monkeypatch), Columns()
    for tag, values in (("gate/hist", tokens.gate), ("focus/hist", tokens.c), ("prob/hist", tokens.p)):
        row = run.histograms[tag]
        assert row.counts == np.histogram(values, bins, (0, 1))[0].tolist(), tag
        assert row.total == sum(COUNTS)
        assert (row.sum, row.sum_squares) == pytest.approx((values.sum(), np.square(values).sum()), rel=1e-6), tag


@pytest.mark.parametrize("bins", [50, 20])
def test_shares_of_the_gradient_by_probability(bins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run, tokens = watch(GateMonitor(bins=bins), DEFT(), monkeypatch), Columns()
    shares = []
    for low, high in ((0, 10), (10, 50), (50, 90), (90, 101)):
        inside = (tokens.p >= low / 100) & (tokens.p < high / 100)
        share = tokens.mass[inside].sum() / tokens.mass.sum()
        shares.append(run.scalars[f"gradient/p{low}_{min(high, 100)}"])
        assert shares[-1] == pytest.approx(share, rel=1e-5) and share > 0.002, low
    assert sum(shares) == pytest.approx(1.0, abs=1e-12)
    weighed = np.histogram(tokens.p, bins, (0, 1), weights=tokens.mass)[0]
    assert run.histograms["gradient/hist"].counts == pytest.approx(weighed, rel=1e-5, abs=1e-9)


def test_occupancy_counts_every_token_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[Any] = []
    monkeypatch.setattr("deft_lightning.callbacks.gate.occupancy", tables.append)
    run, tokens = watch(GateMonitor(bins=20), DEFT(), monkeypatch), Columns()
    assert [tag for tag, _ in run.grids] == ["occupancy/p_alpha"]
    expected = np.histogram2d(tokens.c, tokens.p, (10, 20), ((0, 1), (0, 1)))[0]
    assert np.array_equal(np.array(tables[0]), expected) and expected.sum() == sum(COUNTS)
    assert (expected.sum(1) > 0).sum() > 5, "several bands of alpha are in use"


def test_an_objective_without_focus_has_no_occupancy(monkeypatch: pytest.MonkeyPatch) -> None:
    run = watch(GateMonitor(), DFT(), monkeypatch)
    assert not run.grids and "focus/mean" not in run.scalars and "focus/hist" not in run.histograms


def test_counterfactual_gates_are_those_of_the_other_objectives(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[Objective] = [NLL(), Likelihood(), Cayley(), Tsallis(q=0.5)]
    run, tokens = watch(GateMonitor(others=others), DEFT(), monkeypatch), Columns()
    p = tokens.p
    gates = {"NLL": np.ones_like(p), "Likelihood": p, "Cayley": p ** (p / (2 - p)),
             "Tsallis_q_0.5": np.sqrt(p)}  # fmt: skip
    tags = {tag for tag in run.scalars if tag.startswith("counterfactual/")}
    assert tags == {f"counterfactual/{name}/{what}" for name in gates for what in ("gate", "ess")}
    for name, gate in gates.items():
        assert run.scalars[f"counterfactual/{name}/gate"] == pytest.approx(gate.mean(), rel=1e-6), name
        assert run.scalars[f"counterfactual/{name}/ess"] == pytest.approx(ess(gate), rel=1e-6), name
    alone = watch(GateMonitor(), DEFT(), monkeypatch).scalars
    assert {tag: value for tag, value in run.scalars.items() if tag not in tags} == alone


def test_another_objective_needs_what_the_head_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"gate_monitor\.others: EAFT\(k=20, .* DEFT\(\)"):
        watch(GateMonitor(others=[EAFT()]), DEFT(), monkeypatch)
    with pytest.raises(UserError, match=r"gate_monitor\.others: .*NLL.* twice"):
        GateMonitor(others=[NLL(), NLL()])


def test_memorised_is_the_share_of_noisy_labels_that_are_the_first_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    run, tokens = watch(NoiseMonitor(), DEFT(), monkeypatch), Columns()
    share = tokens.correct[tokens.noisy].mean()
    assert 0.3 < share < 0.9 and share != tokens.correct[~tokens.noisy].mean()
    assert run.scalars["noise/memorised"] == pytest.approx(share, rel=1e-12)
    assert run.scalars["gate/noisy"] == pytest.approx(tokens.gate[tokens.noisy].mean(), rel=1e-6)
    spent = tokens.mass[tokens.noisy].sum() / tokens.mass.sum()
    assert run.scalars["noise/gradient_share"] == pytest.approx(spent, rel=1e-5)


def test_recovered_is_the_share_of_noisy_labels_seen_through_of_those_known(monkeypatch: pytest.MonkeyPatch) -> None:
    run, tokens = watch(NoiseMonitor(), DEFT(), monkeypatch), Columns()
    known = tokens.noisy & (tokens.clean != -100)
    share = (tokens.first == tokens.clean)[known].mean()
    assert 0.3 < share < 0.7 and 60 < known.sum() < tokens.noisy.sum()
    assert run.scalars["noise/recovered"] == pytest.approx(share, rel=1e-12)
    assert share != tokens.correct[tokens.noisy].mean()


@pytest.mark.parametrize("lacking", ["clean labels", "arg-max", "known ones"])
def test_without_clean_labels_nothing_is_said_of_recovery(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_all = micro_batches()
    without = {
        "clean labels": [(stats, noisy, None) for stats, noisy, _ in with_all],
        "arg-max": [(stats._replace(arg_max=None), noisy, clean) for stats, noisy, clean in with_all],
        "known ones": [(s, noisy, torch.where(noisy > 0, -100, clean)) for s, noisy, clean in with_all],
    }
    whole = watch(NoiseMonitor(), DEFT(), monkeypatch).scalars
    monkeypatch.setattr(f"{__name__}.micro_batches", lambda: without[lacking])
    found = watch(NoiseMonitor(), DEFT(), monkeypatch).scalars
    assert found == {tag: value for tag, value in whole.items() if tag != "noise/recovered"} != whole


def test_a_step_without_tokens_has_no_quantiles_or_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = [(stats.select(stats.correct & False), *(part[:0] for part in rest)) for stats, *rest in micro_batches()]
    monkeypatch.setattr(f"{__name__}.micro_batches", lambda: empty)
    run = watch(GateMonitor(), DEFT(), monkeypatch)
    assert run.scalars.keys() == {"gate/mean", "gate/ess", "gate/locked", "prob/mean", "focus/mean"}


def test_the_curve_of_an_objective_says_what_it_depends_on() -> None:
    """One line for what depends on p alone, three with a legend for what depends on the prediction."""
    axes = {type(o).__name__: drawings.gate_curve(o).axes[0] for o in (NLL(), DEFT(), Likelihood())}
    assert [found.get_title("left") for found in axes.values()] == [f"Gate of {name}" for name in axes]
    assert len(axes["NLL"].get_lines()) == 1 and axes["NLL"].get_legend() is None
    x, y = (np.asarray(part) for part in axes["Likelihood"].get_lines()[0].get_data())
    assert y == pytest.approx(x, abs=1e-9)
    texts = [text.get_text() for text in axes["DEFT"].get_legend().get_texts()]
    assert texts[:3] == ["DEFT, C = 0.1", "DEFT, C = 0.5", "DEFT, C = 0.9"]
    for collision in (0.1, 0.5, 0.9):
        (line,) = [found for found in axes["DEFT"].get_lines() if found.get_label().endswith(f"= {collision}")]
        x, y = (np.asarray(part) for part in line.get_data())
        drawn = ~np.isnan(y)  # where a prediction has that p and C
        assert drawn.any() and y[drawn] == pytest.approx(x[drawn] ** collision, rel=1e-9)


def test_occupancy_is_darker_where_more_tokens_are() -> None:
    image = occupancy([[0.0, 0.0], [1.0, 1000.0]]).astype(int)
    height, width = image.shape[:2]
    # Well inside the four cells, bar and labels left out.
    low = image[int(0.65 * height), [int(0.28 * width), int(0.6 * width)]].sum(-1)
    high = image[int(0.25 * height), [int(0.28 * width), int(0.6 * width)]].sum(-1)
    assert low.tolist() == [765, 765] and high[1] < 100 < high[0] < 765, "one token is not white"


def test_occupancy_needs_no_matplotlib_and_has_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    few, many = (occupancy([[most] * 4] * 3) < 128 for most in (5.0, 5000.0))
    for part in (few[:30, :200], few[300:, 60:400], few[38:290, :50], few[:30, 410:], few[38:300, 432:]):
        assert part.any(), "title, p, alpha, and of the scale its name and numbers"
    assert many[:, 432:].sum() > few[:, 432:].sum(), "1 to 1,000 beside the scale, where it was 1 alone"
