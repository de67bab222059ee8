"""Running a study: what is missing is run, then everything is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from deft_lightning.annotations import JsonObject
from deft_lightning.study import advice, audits, tasks
from deft_lightning.study import cells as work
from deft_lightning.study.draw import draw
from deft_lightning.study.files import write_json, write_text
from deft_lightning.study.plan import Cell, Study
from deft_lightning.study.pool import Workers
from deft_lightning.study.report import chosen_rates, grid, summary
from deft_lightning.study.tables import text
from deft_lightning.terminal import visible


def run_study(study: Study, root: Path, start: Callable[[Path], Workers]) -> JsonObject:
    """Run what is missing of a study and write its report, tables and figures.

    Args:
        study: The grid.
        root: Where everything goes: `cells` (a JSON file for each finished run), `runs` (TensorBoard), `bases`
            (models that regimes start from), `audits` (of rows of which the worst are left out), `report.json`,
            `report.md`, and figures.
        start: Makes what runs the cells, once their rows are there.

    Returns:
        The report.
    """
    for name, regime in study.regimes.items():
        cell = study.cell(name, study.objectives[0], regime.noise[0], regime.rate, 0)
        for write in (tasks.rows_of, tasks.base_rows, tasks.rows_apart):  # before several processes want them
            write(cell, root)
    with start(root) as pool:
        bases, starts, audited = dict[Path, Cell](), dict[Path, Cell](), dict[Path, Cell]()
        for cell in (*study.shared(), *study.tuning()):
            if (folder := work.base_folder(cell, root)) is not None:
                bases.setdefault(folder, cell)
            if (file := work.start_file(cell, root)) is not None:
                starts.setdefault(file, cell)
            if (file := work.audit_file(cell, root)) is not None:
                audited.setdefault(file, cell)
        missing = [cell for folder, cell in bases.items() if not (folder / "base.json").exists()]
        pool.run("bases", work.train_base, missing, lambda cell: cell.setting.base.steps if cell.setting.base else 0)
        unscored = [cell for file, cell in starts.items() if not file.exists()]
        pool.run("before training", work.score_start, unscored, lambda _: 0)
        unread = [cell for file, cell in audited.items() if not file.exists()]
        pool.run("auditing", audits.audit, unread, lambda _: 0)
        _run(pool, "shared rate", study.shared(), root)
        _run(pool, "second rounding", study.rounded(), root)
        probed = advice.asked(study)
        unprobed = [cell for cell in probed if not advice.probe_folder(cell, root).is_dir()]
        pool.run("probing", advice.advise, unprobed, lambda _: 0)
        _run(pool, "choosing rates", study.tuning(), root)
        rates = chosen_rates(study, _results(study.tuning(), root))
        _run(pool, "tuned rates", study.tuned(rates), root)
    everything = [*study.shared(), *study.rounded(), *study.tuning(), *study.tuned(rates)]
    results = _results(everything, root)
    report = summary(study, results)
    report["bases"] = [
        {"regime": cell.regime, **_read(file)}
        for file, cell in {**{folder / "base.json": cell for folder, cell in bases.items()}, **starts}.items()
    ]
    probes = {cell.id: _read(advice.probe_folder(cell, root) / "probe.json") for cell in probed}
    report["advice"] = advice.advice(grid(study.shared(), results), probed, probes)
    write_json(root / "report.json", report)
    write_text(root / "report.md", visible(text(report)))
    draw(study, report, results, root)
    return report


def _run(pool: Workers, stage: str, cells: Iterable[Cell], root: Path) -> None:
    unique = {cell.id: cell for cell in cells}
    missing = [cell for cell in unique.values() if not work.cell_file(cell, root).exists()]
    pool.run(stage, work.run_cell, missing, lambda cell: cell.setting.steps)


def _results(cells: Iterable[Cell], root: Path) -> dict[str, JsonObject]:
    return {cell.id: _read(work.cell_file(cell, root)) for cell in cells}


def _read(file: Path) -> JsonObject:
    content: JsonObject = json.loads(file.read_text(encoding="utf-8"))
    return content
