"""Figures of objectives, runs and probes; ``python -m deft_lightning figures --help`` draws them from a terminal.

Every function takes ``output``, one path or several: one that ends in a format (``.png``, ``.svg``, ``.pdf`` ...) is
written in it, one without is written as PNG and as SVG. It returns what it wrote. Needs matplotlib
(``pip install 'deft-lightning[figures]'``), without pyplot, whose backend belongs to the user. The names load on first
use: what draws runs needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deft_lightning.figures.bars import comparison_bars
    from deft_lightning.figures.curves import gate_curves, loss_curves
    from deft_lightning.figures.runs import read_run
    from deft_lightning.figures.scatter import gradient_scatter
    from deft_lightning.figures.tokens import TokenSample
    from deft_lightning.figures.trajectories import focus_trajectories, run_figure
    from deft_lightning.objectives.parse import parse_objective

_HOMES = {
    "TokenSample": "figures.tokens",
    "comparison_bars": "figures.bars",
    "focus_trajectories": "figures.trajectories",
    "gate_curves": "figures.curves",
    "gradient_scatter": "figures.scatter",
    "loss_curves": "figures.curves",
    "parse_objective": "objectives.parse",
    "read_run": "figures.runs",
    "run_figure": "figures.trajectories",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"deft_lightning.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'deft_lightning.figures' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


__all__ = [
    "TokenSample",
    "comparison_bars",
    "focus_trajectories",
    "gate_curves",
    "gradient_scatter",
    "loss_curves",
    "parse_objective",
    "read_run",
    "run_figure",
]
