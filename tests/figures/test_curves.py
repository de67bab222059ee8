"""Curves against formulas written out, and where a prediction can have p and C at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.figures import gate_curves, loss_curves
from deft_lightning.figures.curves import possible
from deft_lightning.functional import TokenStats
from deft_lightning.objectives import DEFT, EAFT, NLL, Cayley, Contaminated, Likelihood, Objective, Truncated, Tsallis
from deft_lightning.objectives.parse import label


def curves(figure: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Points of each curve by its legend; thin and thick parts of one are put together."""
    (axes,) = figure.axes
    lines = [found for found in axes.get_lines() if len(found.get_xdata())]
    result: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for one, after in zip(lines, [*lines[1:], None], strict=True):
        if one.get_label().startswith("_"):
            continue
        x, y = one.get_data()
        if after is not None and after.get_label().startswith("_"):
            y = np.where(np.isnan(y), after.get_ydata(), y)
        result[one.get_label()] = (x, y)
    return result


@pytest.mark.slow
def test_an_objective_that_compares_with_chance_has_a_line_for_each(tmp_path: Path, drawn: list[Any]) -> None:
    gate_curves([NLL(), Contaminated(level="token", start=0.2)], tmp_path / "g.png", chance=(0.1, 0.001))
    lines = curves(drawn[0])
    name = "Contaminated(level=token, start=0.2), u = "
    assert set(lines) == {"NLL", f"{name}0.1", f"{name}0.001"}
    for chance in (0.1, 0.001):
        p, gate = lines[f"{name}{chance:g}"]
        assert gate == pytest.approx(0.8 * p / (0.8 * p + 0.2 * chance), rel=1e-9)
    with pytest.raises(UserError, match=r"chances must be in \(0, 1\), got 0"):
        gate_curves([Contaminated()], tmp_path / "g.png", chance=0.0)


@pytest.mark.slow
def test_gates_and_losses_are_those_of_the_formulas(tmp_path: Path, drawn: list[Any]) -> None:
    chosen = [NLL(), Likelihood(), DEFT(), Cayley(), Tsallis(q=0.25)]
    gate_curves(chosen, tmp_path / "g.png", collision=(0.1, 0.5))
    loss_curves(chosen, tmp_path / "l.png", collision=(0.1, 0.5))
    gates, losses = (curves(figure) for figure in drawn)
    focus = {
        "NLL": lambda p: 0 * p, "Likelihood": lambda p: 0 * p + 1, "Cayley": lambda p: p / (2 - p),
        "DEFT, C = 0.1": lambda p: 0 * p + 0.1, "DEFT, C = 0.5": lambda p: 0 * p + 0.5,
        "Tsallis(q=0.25)": lambda p: 0 * p + 0.75,
    }  # fmt: skip
    assert set(gates) == set(losses) == set(focus)
    for name, alpha in focus.items():
        p, gate = gates[name]
        assert gate == pytest.approx(p ** alpha(p), rel=1e-9), name
        p, loss = losses[name]
        power = alpha(p)
        wanted = np.where(power > 1e-9, (1 - p**power) / np.where(power > 1e-9, power, 1), -np.log(p))
        assert loss == pytest.approx(wanted, rel=1e-3, abs=1e-9), name
        assert p[0] < 0.001 and p[-1] > 0.999
    assert drawn[1].axes[0].get_ylim() == (0, 5) and drawn[0].axes[0].get_ylim() == pytest.approx((0, 1.03))
    gate_curves([Tsallis(q=3.0)], tmp_path / "wild.png")
    assert drawn[2].axes[0].get_ylim() == (0, 5)


def test_curves_are_thick_where_a_prediction_exists(tmp_path: Path, drawn: list[Any]) -> None:
    gate_curves([DEFT()], tmp_path / "g.png", collision=0.5)
    thick, thin = drawn[0].axes[0].get_lines()[:2]
    assert thick.get_linewidth() > thin.get_linewidth()
    x, y = thick.get_data()
    assert x[~np.isnan(y)].max() == pytest.approx(math.sqrt(0.5), abs=2e-3)
    assert not (np.isnan(y) ^ np.isnan(thin.get_ydata())).sum() < len(x)


@pytest.mark.parametrize("collision", [0.1, 0.5, 0.9])
def test_possible_is_what_predictions_show(collision: float) -> None:
    """Predictions over a large vocabulary whose collision probability is the wanted one, found by search."""
    for p in np.linspace(0.01, 0.99, 50):
        # Beside the target: one token with a share of the rest, and the remainder spread thin.
        shares = np.linspace(0, 1, 2001)
        found = p**2 + (shares * (1 - p)) ** 2 + ((1 - shares) * (1 - p)) ** 2 / 100_000
        reached = found.min() <= collision <= found.max()
        assert bool(possible(torch.tensor(p), collision)) == reached or abs(collision - found.min()) < 1e-4, p


@pytest.mark.slow
def test_every_line_is_in_the_legend(tmp_path: Path, texts: Callable[[Path], list[str]]) -> None:
    _, svg = gate_curves([NLL(), DEFT(), EAFT(), Truncated(threshold=0.4, base=Likelihood())], tmp_path / "g")
    found = texts(svg)
    for text in (
        "NLL", "DEFT, C = 0.1", "DEFT, C = 0.5", "DEFT, C = 0.9", "EAFT, C = 0.9", "target probability p", "gate",
        "Truncated(threshold=0.4, base=Likelihood)", "Gate of a token",
    ):  # fmt: skip
        assert text in found, text


@pytest.mark.slow
def test_a_long_legend_takes_nothing_from_the_panel(tmp_path: Path, drawn: list[Any]) -> None:
    short, long = [NLL(), DEFT()], [NLL(), Truncated(threshold=0.123456789, keep="below", normalize_by="kept")]
    images = [imread(gate_curves(objectives, tmp_path / "x.png")[0]) for objectives in (short, long)]
    assert images[1].shape[1] > images[0].shape[1] + 200
    widths = [figure.axes[0].get_window_extent().width for figure in drawn]
    assert widths[1] == pytest.approx(widths[0], rel=0.05)
    many = [Tsallis(q=i / 40) for i in range(40)]
    gate_curves(many, tmp_path / "many.png")
    legend, figure = drawn[2].axes[0].get_legend().get_window_extent(), drawn[2].bbox
    assert figure.y0 <= legend.y0 and legend.y1 <= figure.y1 and legend.x1 <= figure.x1


def test_legends_name_what_departs_from_the_defaults() -> None:
    @dataclass(frozen=True)
    class Own(Objective):
        power: float = 2.0

        def __call__(self, stats: TokenStats) -> Tensor:
            return -stats.log_prob

    assert label(Own()).endswith("Own(power=2.0)")
    assert label(EAFT(k=5)) == "EAFT(k=5)" and label(Truncated()) == "Truncated"
    assert label(Truncated(base=Truncated(threshold=0.1))) == "Truncated(base=Truncated(threshold=0.1))"


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one objective"):
        gate_curves([], tmp_path / "x.png")
    for wrong in (0.0, 1.5, math.nan, []):
        with pytest.raises(UserError, match=r"in \(0, 1\]"):
            loss_curves([NLL()], tmp_path / "x.png", collision=wrong)
