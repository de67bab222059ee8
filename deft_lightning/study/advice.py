"""Whether the probe recommends well: what it says before a headline cell, against what training then gives."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import median

from deft_lightning.annotations import JsonObject
from deft_lightning.objectives.parse import parse_objective
from deft_lightning.study.cells import start
from deft_lightning.study.files import complete_folder, digest
from deft_lightning.study.plan import Cell, Study
from deft_lightning.study.report import Grid

EXAMPLES = 200  # of the training rows
NEAR = 0.05  # of the best objective: a recommendation that is no worse has served its user


def asked(study: Study) -> list[Cell]:
    """Return a cell for each headline place and seed: the same start, rows and noise for every objective."""
    first = repr(study.objectives[0])
    return [cell for cell in study.shared() if cell.noise in cell.setting.headline and repr(cell.objective) == first]


def probe_folder(cell: Cell, root: Path) -> Path:
    """Return where the probe of a cell's start is; it depends on nothing that is trained."""
    return root / "probes" / digest([cell.id, EXAMPLES])


def advise(cell: Cell, root: Path) -> JsonObject:
    """Probe the training rows of a cell through the model that it starts from, unless that is done."""
    target = probe_folder(cell, root)
    if not target.is_dir():
        module, data, trainer = start(cell, root)
        logging.getLogger("lightning_utilities.core.rank_zero").setLevel(logging.ERROR)
        with complete_folder(target) as folder, redirect_stdout(StringIO()):
            trainer.probe(module, data, examples=EXAMPLES, output=str(folder))
    return {"probe": target.name}


def advice(values: Grid, cells: Iterable[Cell], reports: dict[str, JsonObject]) -> list[JsonObject]:
    """Return what the probe recommended for each place, and how far that is from the best objective there.

    Args:
        values: What the study found, by place, objective and seed; larger is better.
        cells: Those of :func:`asked`.
        reports: `probe.json` by the id of its cell.

    Returns:
        A row a place: ``recommended`` with the number of seeds by objective (empty: it cannot tell), the ``best``
        objective by its median, and ``behind``: how far the median of what was recommended most is below it; None where
        it cannot tell, or names what the study has not run.
    """
    by_place: dict[tuple[str, float], list[str]] = {}
    for cell in cells:
        named = reports[cell.id]["recommendation"]["objective"]
        by_place.setdefault((cell.regime, cell.noise), []).append("" if named is None else repr(parse_objective(named)))
    rows = []
    for place, names in by_place.items():
        medians = {name: median(by_seed.values()) for name, by_seed in values[place].items()}
        most = max(sorted(set(names)), key=names.count)
        best = max(medians, key=lambda name: (medians[name], name == most))
        counts = {name: names.count(name) for name in sorted(set(names))}
        rows.append({
            "regime": place[0], "noise": place[1], "recommended": counts, "best": best,
            "behind": medians[best] - medians[most] if most in medians else None,
        })  # fmt: skip
    return rows


def served(rows: Sequence[JsonObject]) -> int:
    """Return in how many places the recommendation is near the best, or says that it cannot tell."""
    return sum(
        max(row["recommended"], key=lambda name: row["recommended"][name]) == ""
        if row["behind"] is None
        else row["behind"] <= NEAR
        for row in rows
    )
