"""Rows on disk while they are prepared, and which of them are held out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deft_lightning.data.examples import Example, Ints
from deft_lightning.data.lazy import Lazy
from deft_lightning.data.prepared.findings import Findings
from deft_lightning.data.prepared.ids import unique_ids
from deft_lightning.data.prepared.recipe import Recipe, read_examples, title
from deft_lightning.data.prepared.spool import ROWS, SpooledExamples, Writer, row_of
from deft_lightning.data.sources.given import Settled
from deft_lightning.errors import UserError
from deft_lightning.hashing import uniform
from deft_lightning.progress import progress


@dataclass
class View(Lazy[Example]):
    """Some rows of a spool, read when they are asked for."""

    rows: SpooledExamples
    places: Ints
    renamed: dict[int, str]

    def __len__(self) -> int:
        """Return how many."""
        return len(self.places)

    def __getitem__(self, at: int) -> Example:
        """Return one example under its unique id."""
        row = int(self.places[at])
        example = self.rows[row]
        return replace(example, id=self.renamed[row]) if row in self.renamed else example


def _view(rows: SpooledExamples) -> View:
    renamed = unique_ids(lambda: rows.column("id"), lambda at: rows[at].digest)
    return View(rows, np.arange(len(rows)), renamed)


def split_rows(recipe: Recipe, folder: Path, found: Findings) -> dict[str, View]:
    """Read the rows into a folder and return those of each split.

    Args:
        recipe: What to read.
        folder: Where the rows are kept while they are prepared.
        found: Takes note of what is found on the way.

    Raises:
        UserError: A row that cannot be used (file, row, field), or nothing is left to train on.
    """
    every = _view(_spool(recipe.source, recipe, folder / "rows.arrow", found))
    if recipe.validation_source is not None:
        validation = _view(_spool(recipe.validation_source, recipe, folder / "validation_rows.arrow", found))
        return {"train": every, "validation": validation}
    draws = (uniform(recipe.seed, "split", digest) for digest in every.rows.column("digest"))
    held_out = np.fromiter(draws, dtype=np.float64) < recipe.validation_fraction
    parts = {"train": np.flatnonzero(~held_out), "validation": np.flatnonzero(held_out)}
    splits = {name: replace(every, places=places) for name, places in parts.items()}
    if not len(splits["train"]):
        raise UserError(f"{title(recipe.source)}: no row is left to train on; lower --data.validation_fraction")
    return splits


def _spool(source: Settled, recipe: Recipe, path: Path, found: Findings) -> SpooledExamples:
    bad = found.bad
    examples = read_examples(source, recipe, recipe.skip(bad), on_remark=found.remarks, report=found.columns)
    with Writer(path, ROWS) as out:
        for example in progress(examples, f"reading {title(source)}"):
            out.add(row_of(example))
    if not out.count:
        problem = f"no usable row; the first problem: {bad.first[0]}" if bad.first else "no row (--data.source)"
        raise UserError(f"{title(source)}: {problem}")
    return SpooledExamples(path)
