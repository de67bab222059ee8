"""Figures of a study: bars per regime, focus over training, and where the gradient comes from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from deft_lightning.annotations import Record
from deft_lightning.figures import comparison_bars, focus_trajectories, gradient_scatter
from deft_lightning.figures.runs import Scalars
from deft_lightning.figures.style import dress, legend_beside, line, panels, save, styled
from deft_lightning.objectives import DEFT, NLL, Cayley, Likelihood
from deft_lightning.objectives.parse import readable
from deft_lightning.study.cells import start, start_from
from deft_lightning.study.files import file_name
from deft_lightning.study.plan import Study
from deft_lightning.study.tables import JUDGED

SEEN = (NLL(), Likelihood(), Cayley(), DEFT())
EXAMPLES = 200


def draw(study: Study, report: Record, results: Mapping[str, Record], root: Path) -> None:
    """Write `bars`, `locked`, `focus` and `gradients-REGIME-NOISE` as PNG and SVG."""
    headline = [tuple(place) for place in report["headline"]]
    if not headline:
        return
    table: dict[str, dict[str, list[float]]] = {}
    for row in report["grid"]:
        if (row["regime"], row["noise"]) in headline and row["objective"] in report["objectives"]:
            group = f"{row['regime']}\nnoise {row['noise']:g}"
            table.setdefault(group, {})[readable(row["objective"])] = row["values"]
    ordered = {f"{regime}\nnoise {noise:g}": table[f"{regime}\nnoise {noise:g}"] for regime, noise in headline}
    if study.judge == "nll":  # what is kept is larger where it is better
        ordered = {group: {name: [-v for v in row] for name, row in rows.items()} for group, rows in ordered.items()}
    comparison_bars(ordered, root / "bars", value=JUDGED[study.judge])
    _locked(study, results, headline, root / "locked")
    runs: dict[str, list[Scalars]] = {}
    looked = []
    for cell in study.shared():
        if (cell.regime, cell.noise) not in headline or cell.objective != DEFT():
            continue
        label = f"{cell.regime}, noise {cell.noise:g}"
        runs.setdefault(label, []).append(results[cell.id]["curves"])
        if cell.seed == study.first_seed and start_from(cell, root) is not None:  # random weights are one point
            looked.append(cell)
    if not runs:
        return
    focus_trajectories(runs, root / "focus", progress="share")
    for cell in looked:
        folder = root / "probes" / cell.folder
        if not (folder / "tokens.npz").exists():
            module, data, trainer = start(cell, root)
            logging.getLogger("lightning_utilities.core.rank_zero").setLevel(logging.ERROR)
            with redirect_stdout(StringIO()):
                trainer.probe(module, data, examples=EXAMPLES, output=str(folder), unprompted=False)
        gradient_scatter(folder, SEEN, root / f"gradients-{file_name(cell.regime)}-noise{cell.noise:g}")


@styled
def _locked(study: Study, results: Mapping[str, Record], headline: list[Any], output: Path) -> None:
    """Draw the share of locked tokens with clean labels over training: mean over seeds, within their range."""
    shown = [objective for objective in (NLL(), DEFT(), *study.remedies) if objective in study.everything]
    figure, axes = panels(len(headline), 3.0, 2.7, sharey=True)
    for panel, (regime, noise) in zip(axes, headline, strict=True):
        for index, objective in enumerate(shown):
            curves = [
                results[cell.id]["curves"]
                for cell in study.shared()
                if (cell.regime, cell.noise, cell.objective) == (regime, noise, objective)
            ]
            locked = [curve.get("gate/locked_clean") or curve.get("gate/locked") for curve in curves]
            rows = [row for row in locked if row and row[0] == locked[0][0]]
            if not rows:
                continue
            steps, values = rows[0][0], np.array([row[1] for row in rows])
            panel.plot(steps, values.mean(0), **line(index), label=readable(repr(objective)))
            panel.fill_between(steps, values.min(0), values.max(0), color=line(index)["color"], alpha=0.15, linewidth=0)
        dress(panel, f"{regime}, noise {noise:g}", "optimizer step", "locked tokens")
        panel.label_outer(remove_inner_ticks=False)
        panel.set_xlabel("optimizer step")
    axes[0].set_ylim(bottom=0)  # of all, once they share their limits
    handles = axes[0].get_legend_handles_labels()
    if handles[0] and len(headline) == 1:
        legend_beside(figure, axes[0])
    elif handles[0]:
        figure.legend(*handles, loc="outside lower center", ncols=min(len(headline) - 1, 2))
    save(figure, output)
