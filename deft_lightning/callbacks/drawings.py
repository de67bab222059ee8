"""Figures drawn while a run goes on, in the look of those of :mod:`deft_lightning.figures`."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

import torch

from deft_lightning.figures.curves import COLLISIONS, curve_figure
from deft_lightning.figures.style import dress, panels, styled
from deft_lightning.objectives import Objective
from deft_lightning.objectives.parse import label

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def gate_curve(objective: Objective) -> Figure:
    """Draw the gate against p, for predictions with collision probability 0.1, 0.5 and 0.9 where that matters.

    Args:
        objective: One that looks at the batch sees each curve as one.
    """
    title = textwrap.fill(f"Gate of {label(objective)}", 60)  # legends of nested objectives are long
    return curve_figure([objective], "gate", COLLISIONS, title)


@styled
def occupancy(counts: list[list[float]]) -> Figure:
    """Draw how many tokens lie where in p (to the right) and alpha (up), on a logarithmic scale of grey.

    Args:
        counts: Tokens in bins of p over [0, 1], for each band of alpha over [0, 1] from below.
    """
    from matplotlib.colors import LogNorm

    figure, (axes,) = panels(1, 5.0, 3.4)
    # In a place that is given: to be laid out takes as long as all else, and 1.5 MiB.
    figure.set_layout_engine("none")
    axes.set_position((0.12, 0.15, 0.68, 0.74))
    dress(axes, "Tokens by probability and focus", "target probability p", "focus alpha")
    axes.grid(False)
    table = torch.tensor(counts)
    # Cells without tokens stay white.
    shown = torch.where(table > 0, table, torch.nan).numpy()
    most = max(2.0, float(table.max()))
    scale = LogNorm(1, most)
    image = axes.imshow(shown, origin="lower", extent=(0, 1, 0, 1), aspect="auto", cmap="Greys", norm=scale)
    # Ticks by hand: 40 small ones and powers as formulas took half of the time.
    bar = figure.colorbar(image, cax=figure.add_axes((0.83, 0.15, 0.03, 0.74)))
    bar.ax.set_title("tokens", fontsize=10, loc="left")
    bar.set_ticks([10.0**power for power in range(int(math.log10(most)) + 1)], minor=False)
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.minorticks_off()
    return figure
