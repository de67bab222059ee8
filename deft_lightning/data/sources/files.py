"""Rows out of files, one at a time and each with its place: JSON, CSV, parquet and arrow, plain or compressed.

A row that cannot be read stands in the stream as the :class:`RowError` that says why; what spoils the rest of a file is
raised. Memory holds a few rows and one batch, however long the file, but for a ``.json`` file that is no list. A row of
more than :data:`~deft_lightning.data.sources.rows.LONGEST` characters is one that cannot be read: what is compressed
may be any number of times as long as its file.
"""

from __future__ import annotations

import io
import lzma
import stat
import zlib
from pathlib import Path, PurePath
from typing import IO

from deft_lightning.data.sources.columnar import read_arrow, read_parquet
from deft_lightning.data.sources.compressed import COMPRESSED, opened
from deft_lightning.data.sources.json_rows import read_lines, read_list
from deft_lightning.data.sources.layouts import Expected
from deft_lightning.data.sources.rows import Located
from deft_lightning.data.sources.separated import read_separated
from deft_lightning.data.sources.separators import find_dialect
from deft_lightning.errors import UserError

TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
BINARY = (".parquet", ".arrow")
ANY = Expected()
SUFFIXES = (*TEXT, *BINARY, *(f"{kind}{how}" for kind in TEXT for how in COMPRESSED))


def suffix(path: PurePath) -> str:
    """Return how the name ends, ``.jsonl.gz`` for two endings, or an empty string if no reader knows it."""
    name = path.name.lower()
    return next((known for known in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(known)), "")


def check_type(name: str, file: str) -> None:
    """Refuse a file whose type no reader knows.

    Args:
        name: What it is called in messages.
        file: The name that its type is the end of.

    Raises:
        UserError: Names the types that are known.
    """
    if not suffix(PurePath(file)):
        raise UserError(
            f"{name}: unknown file type {PurePath(file).suffix!r}; known: {', '.join([*TEXT, *BINARY])}, text also as"
            f" {', '.join(COMPRESSED)} (--data.source)"
        )


def read_file(path: Path, name: str | None = None, expected: Expected = ANY) -> Located:
    """Yield ``(where, record)`` of every row; a :class:`RowError` takes the place of a record that cannot be read.

    A :class:`~deft_lightning.data.sources.remarks.Remark` among them says what was decided about the file.

    Args:
        path: The file.
        name: What it is called in messages; default: its path.
        expected: What the rows are expected to be.

    Raises:
        UserError: The file is of no known type, cannot be read, or is broken beyond a single row.
    """
    kind, name = suffix(path), name or str(path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "a named pipe" if stat.S_ISFIFO(mode) else "a folder" if stat.S_ISDIR(mode) else "a device or socket"
            raise UserError(f"{name}: is {what}, not a file; save its content to a file first (--data.source)")
        check_type(name, path.name)
        if kind == ".parquet":
            yield from read_parquet(path, name)
        elif kind == ".arrow":
            yield from read_arrow(path, name)
        else:
            yield from _text(path, name, kind, expected)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{name}: the compressed file is cut short or damaged ({error})") from None
    except MemoryError:
        raise UserError(
            f"{name}: a value in it needs more memory than is available; JSON of many small lists grows twentyfold"
        ) from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error})") from None


def _text(path: Path, name: str, kind: str, expected: Expected) -> Located:
    with opened(path) as file:
        start = file.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
        raise UserError(f"{name}: is not UTF-8 text; it looks like UTF-16 or like a binary file: save it as UTF-8")
    kind = kind.split(".")[1]
    if kind in ("csv", "tsv"):
        usual = "\t" if kind == "tsv" else ","
        with _decoded(path, newline="") as text:
            dialect = find_dialect(name, text, usual, expected)
        with _decoded(path, newline="") as text:
            yield from read_separated(name, text, usual, dialect)
        return
    with _decoded(path) as text:
        yield from (read_list if kind == "json" else read_lines)(name, text, expected)


def _decoded(path: Path, newline: str | None = None) -> IO[str]:
    # Bytes that are not UTF-8 become half surrogates, so that the row they are in can be told.
    return io.TextIOWrapper(opened(path), encoding="utf-8-sig", errors="surrogateescape", newline=newline)
