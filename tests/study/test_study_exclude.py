"""Cells that leave out the training rows that an audit by the model they start from ranks worst."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from worlds import ROOT, save_tiny_llama, write_rows

from deft_lightning.errors import UserError
from deft_lightning.objectives import DEFT, NLL
from deft_lightning.study import Regime, Study
from deft_lightning.study.audits import audit
from deft_lightning.study.cells import audit_file, run_cell, start
from deft_lightning.study.plan import Cell
from deft_lightning.study.report import summary
from deft_lightning.study.tables import text

CONFIG = ROOT / "configs" / "study" / "exclude.yaml"


@pytest.fixture(autouse=True)
def cells_are_quiet_in_processes_of_their_own() -> Iterator[None]:
    """Put back what a cell silences: elsewhere its process ends with the study."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning_utilities.core.rank_zero")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    transformers.utils.logging.enable_progress_bar()


def made(tmp_path: Path) -> Study:
    rows = [{"prompt": f"say {i}", "completion": "yes " * (1 + i % 7) + str(i)} for i in range(60)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    options: dict[str, Any] = {"judge": "nll", "batch_size": 4, "noise": [0.5], "headline": [0.5], "looks": 1}
    regimes = {
        "all": Regime(source, 2, 1e-2, **options), "half": Regime(source, 2, 1e-2, exclude_top="50%", **options),
        "three": Regime(source, 3, 1e-2, exclude_top=3, **options),
    }  # fmt: skip
    model = save_tiny_llama(tmp_path / "model", 0.3)
    return Study(regimes, {}, objectives=[NLL(), DEFT()], headline_seeds=1, rows=20, held_out=8, pretrained=model)


def test_rows_are_audited_once_whatever_is_trained_on_them(tmp_path: Path) -> None:
    cells = list(made(tmp_path).shared())
    by_regime: dict[str, set[Path | None]] = {}
    for cell in cells:
        by_regime.setdefault(cell.regime, set()).add(audit_file(cell, tmp_path))
    assert by_regime["all"] == {None}
    assert len(by_regime["half"]) == 1 and None not in by_regime["half"]
    half = next(cell for cell in cells if cell.regime == "half")
    assert {audit_file(other, tmp_path) for other in varied(half)} == {audit_file(half, tmp_path)}
    assert audit_file(replace(half, seed=7), tmp_path) != audit_file(half, tmp_path)
    assert audit_file(replace(half, noise=0.2), tmp_path) != audit_file(half, tmp_path)


def varied(cell: Cell) -> list[Cell]:
    setting = replace(cell.setting, exclude_top=5)
    return [replace(cell, objective=DEFT()), replace(cell, rate=3.0), replace(cell, head="dense"),
            replace(cell, setting=setting)]  # fmt: skip


def test_a_cell_on_all_rows_is_known_by_what_it_was_known_by(tmp_path: Path) -> None:
    whole, half = (next(c for c in made(tmp_path).shared() if c.regime == name) for name in ("all", "half"))
    assert replace(half, setting=replace(half.setting, exclude_top=None)).id == whole.id != half.id
    assert replace(half, setting=replace(half.setting, exclude_top="40%")).id != half.id


def test_the_worst_rows_are_left_out_and_the_result_says_so(tmp_path: Path) -> None:
    study, root = made(tmp_path), tmp_path / "out"
    cells = {(cell.regime, repr(cell.objective)): cell for cell in study.shared()}
    results = {}
    for (regime, name), cell in cells.items():
        if regime == "three":
            continue
        if (file := audit_file(cell, root)) is not None and name == "NLL()":
            audit(cell, root)
            ranked = [json.loads(line) for line in file.read_text().splitlines()]
            before = file.stat().st_mtime_ns
            audit(cell, root)
            assert file.stat().st_mtime_ns == before
            _, data, _ = start(cell, root)
            data.prepare_data()
            data.setup("fit")
            left = {data.example("train", at).id for at in range(data.size("train"))}
            assert len(ranked) == 20 and left == {line["id"] for line in ranked[10:]}
            assert {line["noisy"] for line in ranked} == {True, False}
            noisy = sum(line["noisy"] for line in ranked[:10]) / 10
        results[cell.id] = run_cell(cell, root)
    whole, half = (results[cells[name, "NLL()"].id]["test"] for name in ("all", "half"))
    assert (half["left_out/share"], half["left_out/noisy"]) == (0.5, noisy)
    assert "left_out/share" not in whole and whole["nll"] != half["nll"]
    two = replace(study, regimes={name: study.regimes[name] for name in ("all", "half")})
    table = text(summary(two, results))
    assert "left out | noise among them |" in table
    assert f"| 0.500 | {noisy:.3f} |" in table


def test_what_cannot_be_audited_is_refused() -> None:
    with pytest.raises(UserError, match="regime a: exclude_top asks the model that a cell starts from"):
        Study({"a": Regime("a", 5, 1e-3, exclude_top="10%")}, {})
    with pytest.raises(UserError, match=r"^regime: exclude_top must be a share such as 5% or a count such as 50, not"):
        Regime("a", 5, 1e-3, exclude_top="tenth")


def test_the_configuration_differs_from_that_of_the_noise_model_in_what_is_left_out_alone() -> None:
    own, other = (yaml.safe_load((ROOT / "configs" / "study" / f"{name}.yaml").read_text()) for name in
                  ("exclude", "noise_model"))  # fmt: skip
    for name, regime in own["regimes"].items():
        kind = name.partition(",")[0]
        known = {key: value for key, value in other["regimes"][kind].items() if key != "rates"}
        assert {key: value for key, value in regime.items() if key != "exclude_top"} == known
    assert [regime.get("exclude_top") for regime in own["regimes"].values()] == [None, "10%", "60%", None, "10%", "40%"]
    assert own["architecture"] == other["architecture"] and own["rows"] == other["rows"]
