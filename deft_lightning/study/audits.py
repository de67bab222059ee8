"""Audits by which cells leave out training rows: made once by the model that they start from."""

from __future__ import annotations

import logging
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

from deft_lightning.annotations import JsonObject
from deft_lightning.study.cells import audit_file, start
from deft_lightning.study.files import complete_folder
from deft_lightning.study.plan import Cell


def audit(cell: Cell, root: Path) -> JsonObject:
    """Audit all training rows of a cell through the model that it starts from, unless that is done."""
    target = audit_file(cell, root)
    assert target is not None
    if not target.exists():
        module, data, trainer = start(replace(cell, setting=replace(cell.setting, exclude_top=None)), root)
        logging.getLogger("lightning_utilities.core.rank_zero").setLevel(logging.ERROR)
        with complete_folder(target.parent) as folder, redirect_stdout(StringIO()):
            trainer.probe(module, data, output=str(folder), audit=str(folder / target.name))
    return {"audit": target.parent.name}
