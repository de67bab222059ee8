"""What a column says of the training rows, beside what is learnt from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deft_lightning.data.prepared.recipe import Recipe, title
from deft_lightning.data.sources.layouts import Expected
from deft_lightning.data.sources.read import read_many
from deft_lightning.data.sources.remarks import Remarks
from deft_lightning.data.sources.rows import BadRows
from deft_lightning.errors import UserError

WORDS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def flags(recipe: Recipe, field: str) -> dict[str, bool]:
    """Return what a column says of each row, by file and row number. The rows are read once more.

    Args:
        recipe: Says which rows.
        field: The column, dotted for nested ones: true or false, 1 or 0, in every row that has it.

    Raises:
        UserError: No row has it, or it holds something else.
    """
    noisy: dict[str, bool] = {}
    rows = read_many(
        recipe.source, subset=recipe.subset, split=recipe.split, on_bad_row=BadRows(), seed=recipe.seed,
        expected=Expected(recipe.format, recipe.column_map), on_remark=Remarks(),
    )  # fmt: skip
    for where, record, _ in rows:
        value: Any = record
        for part in field.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            continue
        if str(value).lower() not in WORDS:
            raise UserError(f"--truth {field}: {where} has {value!r}, not true or false")
        noisy[where] = WORDS[str(value).lower()]
    if not noisy:
        raise UserError(f"--truth {field}: no row of {title(recipe.source)} has it")
    return noisy
