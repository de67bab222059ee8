"""Figures of a study: bars per regime, focus over training, and where the gradient comes from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from deft_lightning.figures import comparison_bars, focus_trajectories, gradient_scatter
from deft_lightning.objectives import DEFT, NLL, Cayley, Likelihood
from deft_lightning.study.cells import start, start_from
from deft_lightning.study.plan import Study
from deft_lightning.study.tables import short

SEEN = (NLL(), Likelihood(), Cayley(), DEFT())
EXAMPLES = 200


def draw(study: Study, report: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], root: Path) -> None:
    """Write `bars`, `focus` and `gradients` as PNG and SVG."""
    headline = [tuple(place) for place in report["headline"]]
    if not headline:
        return
    table: dict[str, dict[str, list[float]]] = {}
    for row in report["grid"]:
        if (row["regime"], row["noise"]) in headline and row["objective"] in report["objectives"]:
            group = f"{row['regime']}\nnoise {row['noise']:g}"
            table.setdefault(group, {})[short(row["objective"])] = row["values"]
    ordered = {f"{regime}\nnoise {noise:g}": table[f"{regime}\nnoise {noise:g}"] for regime, noise in headline}
    comparison_bars(ordered, root / "bars", value="exact match")
    runs: dict[str, list[Path]] = {}
    looked = []
    for cell in study.shared():
        if (cell.regime, cell.noise) not in headline or cell.objective != DEFT():
            continue
        label = f"{cell.regime}, noise {cell.noise:g}"
        runs.setdefault(label, []).append(root / "runs" / cell.label)
        if cell.seed == 0 and start_from(cell, root) is not None:  # random weights are one point
            looked.append(cell)
    if not runs:
        return
    focus_trajectories(runs, root / "focus", progress="share")
    for cell in looked:
        folder = root / "probes" / cell.label
        if not (folder / "tokens.npz").exists():
            module, data, trainer = start(cell, root)
            logging.getLogger("lightning_utilities.core.rank_zero").setLevel(logging.ERROR)
            with redirect_stdout(StringIO()):
                trainer.probe(module, data, examples=EXAMPLES, output=str(folder))
        gradient_scatter(folder, SEEN, root / f"gradients-{cell.regime}")
