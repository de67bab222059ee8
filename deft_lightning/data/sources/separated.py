"""Rows of CSV and of its relatives: a header, and a record with as many fields as it has names."""

from __future__ import annotations

import csv
from typing import IO, Self

from deft_lightning.data.sources.json_rows import rest_of_line
from deft_lightning.data.sources.remarks import Remark
from deft_lightning.data.sources.rows import LONGEST, Located, RowError, check_names, is_text, too_long
from deft_lightning.data.sources.separators import SEPARATORS, Dialect
from deft_lightning.errors import UserError


class _TooLong(Exception):
    """A record is longer than a row may be."""

    def __init__(self, line: str) -> None:
        super().__init__()
        self.quotes = line.count('"')


class _Lines:
    """The lines of a record of CSV, as long as they fit into a row; ``room`` is for the next one."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.read, self.room, self.number = file, file.readline, 0, 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = self.read(self.room + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.room -= len(line)
        if self.room < 0:
            raise _TooLong(line)
        return line


def read_separated(name: str, file: IO[str], usual: str, dialect: Dialect) -> Located:
    """Yield the rows of a file with a header.

    Args:
        name: Of the file, for messages.
        file: At its start, with its line ends as they are.
        usual: The separator that the name of the file promises.
        dialect: How its fields are separated.
    """
    kind = "TSV" if usual == "\t" else "CSV"
    if dialect.separator != usual:
        yield name, Remark("separator", f"{name}: read with fields separated by {dialect.plural}")
    if dialect.blanks:
        yield name, Remark("blanks", f"{name}: spaces after the {dialect.plural} are left out")
    # The default field limit of 128 KiB is shorter than some answers.
    csv.field_size_limit(LONGEST)
    lines = _Lines(file)
    if dialect.declared:
        file.readline()
        lines.number += 1
    # Strict: a quote that is never closed would take all further rows into one field, without a word.
    rows = csv.reader(lines, delimiter=dialect.separator, strict=True, skipinitialspace=dialect.blanks)
    header, number, before = None, 0, lines.number
    while True:
        where = f"{name}, row {number + 1}" if header else f"{name}, header"
        lines.room = LONGEST
        try:
            row = next(rows)
        except _TooLong as error:
            # One line is a whole record if every quote in it is closed in it.
            one_line = lines.number == before + 1 and (error.quotes + rest_of_line(file)) % 2 == 0
            if header is None or not one_line:  # no end of the record is known
                reason = "" if header is None else "; a quote that opens in it is not closed"
                raise UserError(f"{where}, after line {before}: {too_long('').problem}{reason}") from None
            number, row = number + 1, []
            yield where, too_long(where)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None or "end of data" in str(error):
                reason = "a quote that opens in it is never closed" if "end of data" in str(error) else str(error)
                raise UserError(f"{where}, after line {before}: is not {kind} ({reason})") from None
            number, row = number + 1, []
            yield where, RowError(where, f"is not {kind} ({error})", kind="ragged")
        before = lines.number
        if not row:
            continue
        if header is None:
            header = row
            _check_header(name, header, dialect)
            continue
        number += 1
        if len(row) > len(header):
            problem = f"has more fields than the header: {len(row)} to {len(header)}, separated by {dialect.plural}"
            yield where, RowError(where, problem, kind="ragged")
        elif not all(map(is_text, row)):
            yield where, RowError(where, "is not UTF-8 text", kind="not UTF-8")
        else:
            yield where, dict(zip(header, [*row, *[None] * (len(header) - len(row))], strict=True))


def _check_header(name: str, header: list[str], dialect: Dialect) -> None:
    if not all(map(is_text, header)):
        raise UserError(f"{name}, header: is not UTF-8 text")
    check_names(name, header)
    marks = [mark for mark in SEPARATORS if mark != dialect.separator and mark in header[0]]
    if len(header) == 1 and marks:
        raise UserError(
            f"{name}: has one column, {header[0][:80]!r}, which holds {marks[0]!r}, and its rows are not separated by"
            f" {SEPARATORS[marks[0]]} alike: put fields that hold {marks[0]!r} into quotes"
        )
