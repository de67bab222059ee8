"""Running a study: what is missing is run, then everything is told."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from deft_lightning.annotations import JsonObject
from deft_lightning.study import cells as work
from deft_lightning.study.draw import draw
from deft_lightning.study.files import write_json, write_text
from deft_lightning.study.plan import Cell, Study
from deft_lightning.study.pool import Pool
from deft_lightning.study.report import chosen_rates, summary
from deft_lightning.study.tables import text
from deft_lightning.study.tasks import task_files
from deft_lightning.terminal import visible


def run_study(study: Study, root: Path, workers: int) -> JsonObject:
    """Run what is missing of a study and write its report, tables and figures.

    Args:
        study: The grid.
        root: Where everything goes: `cells` (a JSON file for each finished run), `runs` (TensorBoard), `bases`
            (models that regimes start from), `report.json`, `report.md`, and figures.
        workers: Processes.

    Returns:
        The report.
    """
    for regime in study.regimes.values():
        for part in (regime, regime.base):
            if part is not None:
                rows = study.rows if part is regime.base else regime.rows or study.rows
                task_files(part.source, rows, study.held_out, root, regime.split_by)
    with Pool(workers, root) as pool:
        bases: dict[Path, Cell] = {}
        for cell in (*study.shared(), *study.tuning()):
            if (folder := work.base_folder(cell, root)) is not None:
                bases.setdefault(folder, cell)
        missing = [cell for folder, cell in bases.items() if not (folder / "base.json").exists()]
        pool.run("bases", work.train_base, missing, lambda cell: cell.setting.base.steps if cell.setting.base else 0)
        _run(pool, "shared rate", study.shared(), root)
        _run(pool, "second rounding", study.rounded(), root)
        _run(pool, "choosing rates", study.tuning(), root)
        rates = chosen_rates(study, _results(study.tuning(), root))
        _run(pool, "tuned rates", study.tuned(rates), root)
    everything = [*study.shared(), *study.rounded(), *study.tuning(), *study.tuned(rates)]
    results = _results(everything, root)
    report = summary(study, results)
    report["bases"] = [
        {"regime": cell.regime, **json.loads((folder / "base.json").read_text(encoding="utf-8"))}
        for folder, cell in bases.items()
    ]
    write_json(root / "report.json", report)
    write_text(root / "report.md", visible(text(report)))
    draw(study, report, results, root)
    return report


def _run(pool: Pool, stage: str, cells: Iterable[Cell], root: Path) -> None:
    unique = {cell.id: cell for cell in cells}
    missing = [cell for cell in unique.values() if not work.cell_file(cell, root).exists()]
    pool.run(stage, work.run_cell, missing, lambda cell: cell.setting.steps)


def _results(cells: Iterable[Cell], root: Path) -> dict[str, JsonObject]:
    return {cell.id: json.loads(work.cell_file(cell, root).read_text(encoding="utf-8")) for cell in cells}
