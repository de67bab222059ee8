"""Rows out of files, one at a time and each with its place: JSON, CSV, parquet and arrow, plain or compressed.

A row that cannot be read stands in the stream as the :class:`RowError` that says why; what spoils the rest of a file is
raised. Memory holds a few rows and one batch, however long the file, but for a ``.json`` file that is no list. A row of
more than :data:`~deft_lightning.data.sources.rows.LONGEST` characters is one that cannot be read: what is compressed
may be any number of times as long as its file.
"""

from __future__ import annotations

import csv
import gzip
import io
import stat
import zlib
from pathlib import Path
from typing import IO, Self, cast

from deft_lightning.data.sources.columnar import read_arrow, read_parquet
from deft_lightning.data.sources.json_rows import read_lines, read_list, rest_of_line
from deft_lightning.data.sources.rows import LONGEST, Located, RowError, check_names, is_text, too_long
from deft_lightning.errors import UserError

TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
BINARY = (".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
SUFFIXES = (*TEXT, *BINARY, *(f"{kind}{how}" for kind in TEXT for how in COMPRESSED))


def suffix(path: Path) -> str:
    """Return how the name ends, ``.jsonl.gz`` for two endings, or an empty string if no reader knows it."""
    name = path.name.lower()
    return next((known for known in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(known)), "")


def read_file(path: Path) -> Located:
    """Yield ``(where, record)`` of every row; a :class:`RowError` takes the place of a record that cannot be read.

    Raises:
        UserError: The file is of no known type, cannot be read, or is broken beyond a single row.
    """
    kind = suffix(path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "a named pipe" if stat.S_ISFIFO(mode) else "a folder" if stat.S_ISDIR(mode) else "a device or socket"
            raise UserError(f"{path}: is {what} and no file; what it gives must be saved first (--data.source)")
        if not kind:
            raise UserError(
                f"{path}: unknown file type {path.suffix!r}; known: {', '.join([*TEXT, *BINARY])}, text also as"
                f" {' and '.join(COMPRESSED)} (--data.source)"
            )
        if kind == ".parquet":
            yield from read_parquet(path)
        elif kind == ".arrow":
            yield from read_arrow(path)
        else:
            yield from _text(path, kind)
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: the compressed file is cut short or damaged ({error})") from None
    except MemoryError:
        raise UserError(
            f"{path}: a value in it needs more memory than there is; JSON of many small lists grows twentyfold"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _binary(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        import pyarrow as pa

        return pa.input_stream(str(path), compression="zstd")
    return path.open("rb")


def _text(path: Path, kind: str) -> Located:
    with _binary(path) as file:
        start = file.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
        raise UserError(f"{path}: is not UTF-8 text; it looks like UTF-16 or like a binary file: save it as UTF-8")
    reader = {".csv": _csv, ".tsv": _csv, ".json": read_list}.get("." + kind.split(".")[1], read_lines)
    # Bytes that are not UTF-8 become half surrogates, so that the row they are in can be told.
    newline = "" if reader is _csv else None
    with (
        _binary(path) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as text,
    ):
        yield from reader(path, text)


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


def _csv(path: Path, file: IO[str]) -> Located:
    tabs = suffix(path).startswith(".tsv")
    # The default field limit of 128 KiB is shorter than some answers.
    csv.field_size_limit(LONGEST)
    lines = _Lines(file)
    # Strict: a quote that is never closed would take all further rows into one field, without a word.
    rows = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
    header, number, before = None, 0, 0
    while True:
        where = f"{path}, row {number + 1}" if header else f"{path}, header"
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
                raise UserError(f"{where}, after line {before}: is not {'TSV' if tabs else 'CSV'} ({reason})") from None
            number, row = number + 1, []
            yield where, RowError(where, f"is not {'TSV' if tabs else 'CSV'} ({error})", kind="ragged")
        before = lines.number
        if not row:
            continue
        if header is None:
            header = row
            _check_header(path, header, tabs)
            continue
        number += 1
        if len(row) > len(header):
            problem = f"has more fields than the header: {len(row)} to {len(header)}"
            yield where, RowError(where, problem, kind="ragged")
        elif not all(map(is_text, row)):
            yield where, RowError(where, "is not UTF-8 text", kind="not UTF-8")
        else:
            yield where, dict(zip(header, [*row, *[None] * (len(header) - len(row))], strict=True))


def _check_header(path: Path, header: list[str], tabs: bool) -> None:
    if not all(map(is_text, header)):
        raise UserError(f"{path}, header: is not UTF-8 text")
    check_names(path, header)
    marks = [mark for mark in (";", "|", "," if tabs else "\t") if mark in header[0]]
    if len(header) == 1 and marks:
        raise UserError(
            f"{path}: has one column, {header[0][:80]!r}, which holds {marks[0]!r}: fields must be separated by"
            f" {'tabs (.csv: commas)' if tabs else 'commas (.tsv: tabs)'}"
        )
