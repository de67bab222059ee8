"""Which letter separates the fields of a file: found from its header and first rows, never guessed."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import IO, NamedTuple

from deft_lightning.data.sources.layouts import Expected
from deft_lightning.errors import UserError

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "pipes"}
SAMPLE = 1 << 16  # letters looked at
ROWS = 20  # rows looked at


class Dialect(NamedTuple):
    """How the fields of a file are separated.

    Attributes:
        separator: The letter between fields.
        blanks: Whether a blank follows each separator and belongs to no field.
        declared: Whether the first line is Excel's ``sep=;`` and no header.
    """

    separator: str
    blanks: bool = False
    declared: bool = False

    @property
    def plural(self) -> str:
        """Return what the separators are called."""
        return SEPARATORS[self.separator]


def find_dialect(name: str, file: IO[str], usual: str, expected: Expected) -> Dialect:
    """Return how fields are separated.

    The usual separator, unless it leaves the header in one piece or makes no known row of it, and another one cuts the
    header into fields that do, or into as many as each of the first rows has.

    Args:
        name: Of the file, for messages.
        file: At its start; some of it is read.
        usual: The separator that the name of the file promises.
        expected: What the rows are expected to be.

    Raises:
        UserError: Two separators are as good as each other.
    """
    sample = file.read(SAMPLE)
    whole = len(sample) < SAMPLE
    if declared := re.match(r'"?sep=(.)"?\r?\n', sample):
        if declared[1] not in SEPARATORS:
            raise UserError(f"{name}: says sep={declared[1]}; known: commas, semicolons, tabs and pipes")
        return Dialect(declared[1], declared=True)
    tables = {mark: _table(sample, mark, whole) for mark in (usual, *(mark for mark in SEPARATORS if mark != usual))}
    cut = {mark: rows for mark, rows in tables.items() if rows and len(rows[0]) > 1}
    known = [mark for mark, rows in cut.items() if expected.form(dict.fromkeys(rows[0], ""))]
    even = [mark for mark, rows in cut.items() if len(rows) > 1 and len({len(row) for row in rows}) == 1]
    # The header alone decides if it names a row: letters of the text may be separators too. Else the rows do.
    choices = known or even
    if usual in choices or not choices:
        return Dialect(usual, _blanks(tables[usual]))
    if len(choices) > 1:
        marks = " and ".join(SEPARATORS[mark] for mark in choices)
        raise UserError(f"{name}: the header can be split at {marks} alike; separate the fields by {SEPARATORS[usual]}")
    return Dialect(choices[0], _blanks(tables[choices[0]]))


def _table(sample: str, separator: str, whole: bool) -> list[list[str]]:
    """Return the first rows of a sample; of one that is cut off not the last."""
    rows: list[list[str]] = []
    lines = csv.reader(io.StringIO(sample, newline=""), delimiter=separator, strict=True)
    ended = False
    try:
        for row in lines:
            if row:
                rows.append(row)
            if len(rows) > ROWS:
                break
        else:
            ended = True
    except csv.Error:  # the sample, or the file, ends within quotes; reading it says which
        pass
    return rows[:-1] if ended and not whole else rows


def _blanks(rows: Sequence[Sequence[str]]) -> bool:
    """Return whether a blank stands before every name of a header but the first."""
    return bool(rows) and len(rows[0]) > 1 and all(name[:1] == " " for name in rows[0][1:])
