"""Cross-fitting: every row is read by the model with an adapter that was trained on other rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deft_lightning.annotations import JsonObject, Record
from deft_lightning.data.examples import Floats
from deft_lightning.errors import UserError
from deft_lightning.probe.adapter import RANK, adapted
from deft_lightning.probe.bare import Bare
from deft_lightning.probe.folds import digest_of, folds_of
from deft_lightning.probe.kept import Kept

COST = 3.0  # passes without a gradient that one with a gradient takes


class Part(NamedTuple):
    """Rows that one model reads.

    Attributes:
        positions: Of the rows in the training split.
        kept: Where their results are kept.
        model: A context in which the module has that model.
        steps: Optimizer steps of its adapter; 0 without one.
    """

    positions: list[int]
    kept: Kept
    model: AbstractContextManager[None]
    steps: int = 0


def parts_of(
    module: Any, data: Any, positions: Sequence[int], precision: Any, device: torch.device, folds: int | None,
    output: Path | None, about: tuple[object, ...],
) -> list[Part]:  # fmt: skip
    """Return which rows are read by which model: all by the model as it is, or each fold by one of its own.

    Args:
        module: SFTModule with its model built.
        data: InstructionDataModule, set up.
        positions: Of the rows that are read.
        precision: Lightning's precision plugin.
        device: Where the model is.
        folds: How many; None reads with the model as it is.
        output: Folder of the report; None keeps nothing.
        about: What the results depend on beside the rows.

    Raises:
        UserError: The folds cannot be made, or the model cannot be given adapters here.
    """
    if folds is None:
        return [Part(list(positions), Kept(output, about), nullcontext())]
    _check(module, precision)
    about = (*about, folds)
    folder, parts = Kept(output, about).folder, []
    for fold in folds_of(data, positions, folds):
        # An adapter that has learnt other rows is another model.
        own = None if folder is None else folder / f"fold-{fold.number}"
        kept = Kept(own, (*about, digest_of(data, fold.others)))
        model = adapted(module, data, fold, precision, device, kept.folder)
        parts.append(Part(fold.positions, kept, model, fold.steps))
    return parts


def _check(module: Any, precision: Any) -> None:
    if hasattr(module.model, "get_base_model"):
        raise UserError(
            "probe: --folds trains adapters of its own, and the model has some already (--model.lora); export the"
            " checkpoint, which merges them, and probe that folder as --model.pretrained with --model.lora null"
        )
    if str(precision.precision).startswith("16"):
        raise UserError(
            f"probe: --folds does not train in float16 (--trainer.precision {precision.precision}); use 32-true,"
            " bf16-mixed or bf16-true"
        )


def joined(parts: Iterable[Bare]) -> Bare:
    """Return what models have said without prompts as if one of them had read all rows."""
    values, whole, read = dict[int, Floats](), frozenset[int](), 0
    for part in parts:
        values, whole, read = {**values, **part.log_prob}, whole | part.whole, read + part.read
    return Bare(values, whole, read)


def fold_record(parts: Sequence[Part]) -> JsonObject:
    """Return what a report says of folds: how many, their rows, the optimizer steps of each adapter and its rank."""
    return {
        "count": len(parts), "rows": [len(part.positions) for part in parts], "steps": [part.steps for part in parts],
        "rank": RANK,
    }  # fmt: skip


def folds_text(record: Record) -> str:
    """Return what the table says of folds."""
    low, high = min(record["steps"]), max(record["steps"])
    steps = f"{low}" if low == high else f"{low} to {high}"
    return (
        f"read in {record['count']} folds, each by an adapter (rank {record['rank']}, {steps} steps) that was trained"
        " on the others. All numbers are of these models, not of the model that training starts from, so no objective"
        " is recommended"
    )
