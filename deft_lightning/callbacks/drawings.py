"""Figures drawn while a run goes on; without pyplot, whose backend belongs to the user."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import torch

from deft_lightning.functional import TokenStats
from deft_lightning.objectives import Objective

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = (("#000000", "-"), ("#0072B2", "--"), ("#D55E00", "-."))


def _axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(textwrap.fill(title, 60), fontsize=10, loc="left")  # legends of nested objectives are long
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def gate_curve(objective: Objective) -> Figure:
    """Draw the gate against p, for predictions with collision probability 0.1, 0.5 and 0.9 where that matters.

    Args:
        objective: One that looks at the batch sees each curve as one.
    """
    p = torch.linspace(1e-4, 1 - 1e-6, 400, dtype=torch.float64)
    curves = {}
    for collision in (0.1, 0.5, 0.9):
        flat = torch.full_like(p, collision)
        # A prediction with this collision probability has about the entropy of 1 / C equal alternatives.
        curves[collision] = objective.gate(TokenStats(p.log(), flat, -flat.log(), p > 0.5, -flat.log()))
    same = all(torch.allclose(gate, curves[0.5]) for gate in curves.values())
    figure, axes = _axes(f"Gate of {objective!r}", "target probability p", "gate")
    for (collision, gate), (colour, dash) in zip(curves.items(), LINES, strict=True):
        if same and collision != 0.5:
            continue
        label = None if same else f"collision probability {collision:g}"
        axes.plot(p.numpy(), gate.numpy(), color=colour, linestyle=dash, label=label)
    axes.grid(True, linewidth=0.3)
    if not same:
        axes.legend(fontsize=8, frameon=False)
    return figure


def occupancy(counts: list[list[float]]) -> Figure:
    """Draw how many tokens lie where in p (to the right) and alpha (up), on a logarithmic scale of grey.

    Args:
        counts: Tokens in bins of p over [0, 1], for each band of alpha over [0, 1] from below.
    """
    from matplotlib.colors import LogNorm

    figure, axes = _axes("Tokens by probability and focus", "target probability p", "focus alpha")
    table = torch.tensor(counts)
    # Cells without tokens stay white.
    shown = torch.where(table > 0, table, torch.nan).numpy()
    scale = LogNorm(1, max(2.0, float(table.max())))
    image = axes.imshow(shown, origin="lower", extent=(0, 1, 0, 1), aspect="auto", cmap="Greys", norm=scale)
    figure.colorbar(image, label="tokens")
    return figure
