"""Figures: gate curves of objectives, and what a run did, read from its TensorBoard files.

    python -m deft_lightning.figures logs/version_0 run.png

Needs matplotlib (``pip install deft-lightning[figures]``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.objectives import Objective

# Dark to light and solid to dotted: the lines keep apart in print and for colour-blind readers (Okabe and Ito).
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: pip install 'deft-lightning[figures]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _dress(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, linewidth=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def gate_curves(objectives: Sequence[Objective], output: str | Path, *, collision: float = 0.9) -> Path:
    """Draw the gate against the target probability.

    Args:
        objectives: One line each, labelled with its repr; those that look at the batch see the curve as one.
        output: File; the suffix is the format.
        collision: Collision probability of every point, in (0, 1]: what DEFT takes as its focus.
    """
    plt = _pyplot()
    p = torch.linspace(1e-4, 1 - 1e-6, 400, dtype=torch.float64)
    # A prediction with this collision probability has about the entropy of 1 / C equal alternatives.
    flat = torch.full_like(p, collision)
    stats = TokenStats(p.log(), flat, -flat.log(), p > 0.5, -flat.log())
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for i, objective in enumerate(objectives):
        axes.plot(p, objective.gate(stats), color=COLOURS[i % 7], linestyle=DASHES[i % 7], label=repr(objective))
    _dress(axes, f"Gate of a token (collision probability {collision:g})", "target probability p", "gate")
    axes.legend(fontsize=8, frameon=False)
    return _save(plt, figure, output)


def read_run(run: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return steps and values of every scalar a run logged.

    Args:
        run: A folder with TensorBoard event files.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any(Path(run).glob("events.out.tfevents.*")):
        raise UserError(f"{run}: has no TensorBoard event files")
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: ([event.step for event in events.Scalars(tag)], [event.value for event in events.Scalars(tag)])
        for tag in events.Tags()["scalars"]
    }


def run_figure(run: str | Path, output: str | Path) -> Path:
    """Draw what a run did: plain NLL, the focus trajectory, and the gate on clean and noisy labels.

    Args:
        run: A folder with TensorBoard event files.
        output: File; the suffix is the format.
    """
    plt = _pyplot()
    scalars = read_run(run)
    panels: list[tuple[str, str, dict[str, str]]] = [
        ("Plain NLL", "nats a token", {"train/nll": "training (noisy labels)", "val/nll": "held out (clean)"}),
        ("Focus trajectory", "mean", {"focus/mean": "focus alpha", "prob/mean": "target probability p"}),
        ("Gate", "mean gate", {"gate/clean": "clean labels", "gate/noisy": "noisy labels"}),
    ]
    if "nll/noisy" not in scalars:
        panels[0][2]["train/nll"], panels[0][2]["val/nll"] = "training", "held out"
        panels[2] = ("Gate", "", {"gate/mean": "mean", "gate/ess": "effective sample size"})
    figure, all_axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for axes, (title, unit, tags) in zip(all_axes, panels, strict=True):
        for i, (tag, label) in enumerate(tags.items()):
            if tag in scalars:
                axes.plot(*scalars[tag], color=COLOURS[i], linestyle=DASHES[i], label=label)
        _dress(axes, title, "optimizer step", unit)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, frameon=False)
    return _save(plt, figure, output)


def _save(plt: Any, figure: Any, output: str | Path) -> Path:
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    plt.close(figure)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m deft_lightning.figures RUN OUTPUT")
    try:
        print(run_figure(sys.argv[1], sys.argv[2]))
    except UserError as error:
        sys.exit(f"error: {error}")
