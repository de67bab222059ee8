"""What the tests of several rooms need: a file of rows, and a data module as a rank would have it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

from deft_lightning.data import InstructionDataModule


def write(path: Path, rows: Iterable[object]) -> str:
    """Write rows as JSON, one a line, and return where they are."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def on_rank(data: InstructionDataModule, rank: int, world: int) -> InstructionDataModule:
    """Make the loaders of a data module those of one rank of several."""
    trainer = SimpleNamespace(lightning_module=None, strategy=None, global_rank=rank, world_size=world)
    data.trainer = trainer  # type: ignore[assignment]
    return data
