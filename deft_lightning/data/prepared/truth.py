"""What a column says of the training rows, beside what is learnt from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deft_lightning.data.prepared.recipe import Recipe, title
from deft_lightning.data.records.formats import detect_format, normalise
from deft_lightning.data.sources.layouts import Expected
from deft_lightning.data.sources.read import read_many
from deft_lightning.data.sources.remarks import Remarks
from deft_lightning.data.sources.rows import BadRows
from deft_lightning.errors import UserError

WORDS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def flags(recipe: Recipe, field: str) -> dict[str, bool]:
    """Return what a column of the training rows says of each example, by id. The rows are read once more.

    Rows that share an id get new ones when they are prepared; of such rows nothing is known.

    Args:
        recipe: Says which rows.
        field: The column, dotted for nested ones: true or false, 1 or 0, in every row that has it.

    Raises:
        UserError: No row has it, or it holds something else.
    """
    wrong: dict[str, bool] = {}
    formats: dict[str, str] = {}
    rows = read_many(
        recipe.source, subset=recipe.subset, split=recipe.split, on_bad_row=BadRows(), seed=recipe.seed,
        expected=Expected(recipe.format, recipe.column_map), on_remark=Remarks(),
    )  # fmt: skip
    for where, record, name in rows:
        value: Any = record
        for part in field.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            continue
        if str(value).lower() not in WORDS:
            raise UserError(f"--truth {field}: {where} has {value!r}, not true or false")
        ignored = {*recipe.ignore_columns, field}
        try:
            if name not in formats:
                auto = recipe.format == "auto"
                formats[name] = (
                    detect_format(record, where, recipe.column_map, ignore=ignored) if auto else recipe.format
                )
            wrong[normalise(record, where, formats[name], recipe.column_map, ignore=ignored).id] = WORDS[
                str(value).lower()
            ]
        except UserError:  # left out of the training rows as well
            continue
    if not wrong:
        raise UserError(f"--truth {field}: no row of {title(recipe.source)} has it")
    return wrong
