"""What an audit says of the training rows: which are left out, and how much the others weigh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deft_lightning.data.prepared.audit_file import AuditLine, Top, read_audit
from deft_lightning.data.prepared.audit_match import Rows
from deft_lightning.data.prepared.recipe import Recipe
from deft_lightning.data.prepared.split import View
from deft_lightning.errors import UserError
from deft_lightning.terminal import visible

LEAST = 1e-6  # a smaller weight from an audit is 0: it would vanish in float32 beside others


@dataclass
class Audited:
    """What audits say of the training rows.

    Attributes:
        factors: Factor on the weight of each training row, shape ``(n,)``, at least 0; 0 leaves it out.
        lines: What the run says of it.
        warnings: What it warns of: rows of an audit that are not in the data.
    """

    factors: NDArray[np.float64]
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def state(self) -> dict[str, list[str]]:
        """Return what is said, as plain values."""
        return {"lines": self.lines, "warnings": self.warnings}


def apply_audits(recipe: Recipe, splits: dict[str, View]) -> Audited | None:
    """Return what the audits of a recipe say of the training rows; None without any.

    Args:
        recipe: Names the files.
        splits: The rows of each split, before noise.

    Raises:
        UserError: A file is no audit, names no training row, has no weights, or leaves no row out or over.
    """
    if recipe.exclude is None and recipe.weights_from is None:
        return None
    rows = Rows(splits["train"], splits["validation"], recipe)
    audited = Audited(np.ones(len(splits["train"])))
    if recipe.exclude is not None:
        _leave_out(audited, rows, recipe.exclude, recipe.exclude_top)
    if recipe.weights_from is not None:
        _weigh(audited, rows, recipe.weights_from)
    return audited


def _leave_out(audited: Audited, rows: Rows, name: str, top: str | int | None) -> None:
    lines, places = _matched(audited, rows, name, "--data.exclude", weighted=False)
    if all(line.rank is not None for line in lines):
        order = sorted(range(len(lines)), key=lambda at: (lines[at].rank or 0, at))
    else:
        order = list(range(len(lines)))
    count = len(lines) if top is None else Top.read(top).of(len(lines), name)
    for at in order[:count]:
        audited.factors[places[at]] = 0
    total, out = len(audited.factors), int((audited.factors == 0).sum())
    if out == total:
        raise UserError(f"--data.exclude {name}: leaves out all {total:,} training rows; set --data.exclude_top 5%")
    audited.lines.append(f"left out {out:,} of {total:,} training rows by {visible(name)} ({100 * out / total:.3g} %)")


def _weigh(audited: Audited, rows: Rows, name: str) -> None:
    lines, places = _matched(audited, rows, name, "--data.weights_from", weighted=True)
    weights = np.full(len(audited.factors), np.nan)
    for line, own in zip(lines, places, strict=True):
        assert line.weight is not None
        weight = line.weight if line.weight >= LEAST else 0.0
        before = weights[own]
        if (~np.isnan(before) & (before != weight)).any():
            raise UserError(f"--data.weights_from {line.where}: gives a second weight to the same row")
        weights[own] = weight
    known = ~np.isnan(weights) & (audited.factors > 0)
    given = weights[known]
    audited.factors[known] *= given
    if not audited.factors.any():
        raise UserError(f"--data.weights_from {name}: every training row has weight 0 or is left out")
    total, none = len(weights), int((given == 0).sum())
    text = f"weights of {len(given):,} of {total:,} training rows by {visible(name)}"
    if len(given):
        text += f": {given.min():.3g} to {given.max():.3g}, mean {given.mean():.3g}"
    audited.lines.append(text + (f"; left out {none:,} with weight 0" if none else ""))


def _matched(
    audited: Audited, rows: Rows, name: str, option: str, *, weighted: bool
) -> tuple[Sequence[AuditLine], list[list[int]]]:
    """Return the lines of an audit and the training rows that each names; say which name none."""
    lines: list[AuditLine] = []
    places: list[list[int]] = []
    missing: list[str] = []
    for line, record in read_audit(Path(name).expanduser(), name, option, weighted=weighted):
        found, problem = rows.find(record)
        if problem:
            missing.append(" ".join(visible(f"{line.where} ({_named(record)}): {problem}").split()))
        lines.append(line)
        places.append(found)
    if len(missing) == len(lines):
        raise UserError(
            f"{option} {name}: none of its {len(lines):,} rows is a training row; was another source audited? The"
            f" first: {missing[0]}"
        )
    if missing:
        audited.warnings.append(
            f"{visible(name)}: {len(missing):,} of its {len(lines):,} rows {'is' if len(missing) == 1 else 'are'} not"
            f" among the training rows; the first: {missing[0]}"
        )
    return lines, rows.with_copies(places)


def _named(record: dict[str, Any]) -> str:
    if isinstance(record.get("file"), str) and record.get("row") is not None:
        return f"{record['file']}, row {record['row']}"
    return f"id {record.get('id')}"
