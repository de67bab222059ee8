"""What runs did: focus and probability over training, and one run at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deft_lightning.errors import UserError
from deft_lightning.figures.runs import Scalars, labels, read_run, scalar
from deft_lightning.figures.style import (
    COLOURS,
    DASHES,
    MARKERS,
    Output,
    count_steps,
    dress,
    legend_beside,
    line,
    panels,
    save,
    styled,
)

PAIR = (("focus/mean", "focus alpha"), ("prob/mean", "target probability p"))
APART, LOWEST, HIGHEST = 0.1, 0.03, 0.96  # labels at the ends of lines, in units of the axis
FEW = 12  # points of a line that are marked: a single one would not be seen
Run = str | Path | Scalars
Progress = Literal["steps", "share"]


class Curve(NamedTuple):
    """A scalar over training: mean, lowest and highest of several runs."""

    at: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@styled
def run_figure(run: str | Path, output: Output) -> list[Path]:
    """Draw what a run did: plain NLL, the focus trajectory, and the gate on clean and noisy labels.

    Args:
        run: A folder with TensorBoard event files.
        output: File or files.

    Returns:
        The files.
    """
    scalars = read_run(run)
    shown: list[tuple[str, str, dict[str, str]]] = [
        ("Plain NLL", "nats per token", {"train/nll": "training (noisy labels)", "val/nll": "held out (clean)"}),
        ("Focus trajectory", "mean", {tag: name for tag, name in PAIR}),
        ("Gate", "mean gate", {"gate/clean": "clean labels", "gate/noisy": "noisy labels"}),
    ]
    if "nll/noisy" not in scalars:
        shown[0][2]["train/nll"], shown[0][2]["val/nll"] = "training", "held out"
        shown[2] = ("Gate", "", {"gate/mean": "mean", "gate/ess": "effective sample size"})
    if not any(tag in scalars for *_, tags in shown for tag in tags):
        scalar(run, "prob/mean", scalars)  # says what the run has
    figure, all_axes = panels(3, 10 / 3, 3)
    for axes, (title, unit, tags) in zip(all_axes, shown, strict=True):
        for i, (tag, label) in enumerate(tags.items()):
            if tag in scalars:
                few = len(scalars[tag][0]) <= FEW
                marker = MARKERS[i] if few else None
                # A point at 0 or at the last step is drawn in full.
                axes.plot(*scalars[tag], label=label, marker=marker, markersize=4, clip_on=False, zorder=3, **line(i))
        dress(axes, title, "optimizer step", unit)
        count_steps(axes)
        axes.set_ylim(bottom=0)
        if axes.get_lines():
            axes.legend()
    return save(figure, output)


@styled
def focus_trajectories(
    runs: Mapping[str, Run | Sequence[Run]] | Sequence[str | Path],
    output: Output,
    *,
    progress: Progress = "steps",
    together: bool = False,
) -> list[Path]:
    """Draw mean focus alpha (solid) and mean target probability p (dashed) over training, a panel for each run.

    The numbers beside the lines are their means over the last tenth of the run: a single step is noisy.

    Args:
        runs: Folders with TensorBoard event files, or what :func:`read_run` makes of one, by label; several of one
            label, such as seeds, are drawn as their mean within the range from lowest to highest. Without labels, the
            ends of their paths.
        output: File or files.
        progress: Training to the right in optimizer steps, or as the share of each run that is done.
        together: One panel for all, told apart by colour and marker.

    Returns:
        The files.

    Raises:
        UserError: No run there, or one whose objective has no focus index.
    """
    named: dict[str, list[Run]] = (
        {name: [run] if isinstance(run, (str, Path, dict)) else list(run) for name, run in runs.items()}
        if isinstance(runs, Mapping)
        else {label: [run] for label, run in zip(labels(runs), runs, strict=True)}
    )
    if not named or not all(named.values()):
        raise UserError("a figure of focus trajectories needs at least one run for each label")
    curves = {label: _curves(of_label, progress) for label, of_label in named.items()}
    x = "optimizer step" if progress == "steps" else "share of the run"
    if together:
        figure, (axes,) = panels(1, 4.4, 3.4)
        for index, (label, pair) in enumerate(curves.items()):
            for dashed, curve in enumerate(pair):
                style = {
                    "color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 5,
                    "linestyle": DASHES[dashed], "markerfacecolor": "white" if dashed else None,
                    "markevery": (0.03 + 0.04 * index, 0.2), "label": f"{label}: {'p' if dashed else 'alpha'}",
                }  # fmt: skip
                _draw(axes, curve, style)
        dress(axes, "Focus and probability", x, "mean")
        legend_beside(figure, axes)
        all_axes = [axes]
    else:
        figure, all_axes = panels(len(curves), 3.0, 2.7, sharey=True)
        for axes, (label, pair) in zip(all_axes, curves.items(), strict=True):
            for index, (curve, (_, name)) in enumerate(zip(pair, PAIR, strict=True)):
                _draw(axes, curve, {**line(index), "label": name})
            _mark_ends(axes, pair)
            dress(axes, label, x, "mean")
            axes.label_outer(remove_inner_ticks=False)
            axes.set_xlabel(x)
        handles = all_axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=2)
    for axes in all_axes:
        if progress == "steps":
            count_steps(axes)
        axes.set_ylim(0, 1.02)  # a line at 1 is drawn in full
        axes.set_xlim(left=0)
    return save(figure, output)


def _curves(runs: Sequence[Run], progress: Progress) -> list[Curve]:
    """Return focus and probability of runs that belong together, over the steps that all of them have."""
    series: list[list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = [[] for _ in PAIR]
    for run in runs:
        scalars, name = (run, "the run") if isinstance(run, dict) else (read_run(run), run)
        last = max(max(scalar(name, tag, scalars)[0]) for tag, _ in PAIR)
        for rows, (tag, _) in zip(series, PAIR, strict=True):
            steps, values = (np.asarray(part, dtype=np.float64) for part in scalar(name, tag, scalars))
            rows.append((steps / (last or 1) if progress == "share" else steps, values))
    result = []
    for rows in series:
        low, high = max(at[0] for at, _ in rows), min(at[-1] for at, _ in rows)
        grid = np.unique(np.concatenate([at for at, _ in rows]))
        grid = grid[(grid >= low) & (grid <= high)]
        if not len(grid):
            names = ", ".join("a run" if isinstance(run, dict) else str(run) for run in runs)
            raise UserError(f"{names}: have no training steps in common")
        values = np.stack([np.interp(grid, at, value) for at, value in rows])
        result.append(Curve(grid, values.mean(0), values.min(0), values.max(0)))
    return result


def _draw(axes: Any, curve: Curve, style: dict[str, Any]) -> None:
    if (curve.high > curve.low).any():
        axes.fill_between(curve.at, curve.low, curve.high, color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(curve.at, curve.mean, clip_on=False, zorder=3, **style)  # points at the edge are drawn in full


def _mark_ends(axes: Any, pair: Sequence[Curve]) -> None:
    """Write beside each line its mean over the last tenth of the run, moved apart where they would overlap."""
    ends = [float(curve.mean[curve.at >= 0.9 * curve.at[-1]].mean()) for curve in pair]
    # Within the panel: beyond its corners they would stand beside the title of the next one.
    low, high = max(min(ends), LOWEST), min(max(ends), HIGHEST)
    if high - low < APART:
        middle = min(max((low + high) / 2, LOWEST + APART / 2), HIGHEST - APART / 2)
        low, high = middle - APART / 2, middle + APART / 2
    places = (low, high) if ends[0] < ends[1] else (high, low)
    for index, (curve, end, place) in enumerate(zip(pair, ends, places, strict=True)):
        axes.annotate(
            f"{end:.2f}", (curve.at[-1], place), (4, 0), textcoords="offset points", va="center", fontsize=8,
            color=COLOURS[index], annotation_clip=False,
        )  # fmt: skip


__all__ = ["focus_trajectories", "run_figure"]
