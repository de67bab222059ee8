"""What the tests of several rooms need: a file of rows, and a data module as a rank would have it."""

from __future__ import annotations

from types import SimpleNamespace

from worlds import write_rows as write

from deft_lightning.data import InstructionDataModule

__all__ = ["on_rank", "write"]


def on_rank(data: InstructionDataModule, rank: int, world: int) -> InstructionDataModule:
    """Make the loaders of a data module those of one rank of several."""
    trainer = SimpleNamespace(lightning_module=None, strategy=None, global_rank=rank, world_size=world)
    data.trainer = trainer  # type: ignore[assignment]
    return data
