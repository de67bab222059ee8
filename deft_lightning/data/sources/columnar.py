"""Rows of parquet and arrow files, a batch at a time, without what Arrow fills in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from deft_lightning.data.sources.expansion import dictionary_size, expanded, fitting
from deft_lightning.data.sources.rows import LONGEST, Located, RowError, check_names, too_long
from deft_lightning.errors import UserError

BATCH = 1000  # rows turned into objects together
EXPANDED = 1 << 28  # bytes that the values of a parquet file which are stored once may take in a batch


def read_parquet(path: Path, name: str) -> Located:
    """Yield the rows of a parquet file, of one batch of a row group after the other."""
    import pyarrow.parquet as pq

    with path.open("rb") as source:
        try:
            file = pq.ParquetFile(source)
        except Exception as error:  # Arrow has a dozen kinds
            raise UserError(f"{name}: is not a parquet file ({error})") from None
        rows = max(1, min(BATCH, EXPANDED // max(1, dictionary_size(path, file.metadata))))
        yield from _batches(name, file.schema_arrow.names, lambda: file.iter_batches(batch_size=rows))


def read_arrow(path: Path, name: str) -> Located:
    """Yield the rows of an arrow file or stream, which is mapped and not loaded."""
    import pyarrow as pa

    with path.open("rb") as file:
        magic = file.read(6)
    if not magic:
        raise UserError(f"{name}: is not an arrow file (it has no bytes)")
    with pa.memory_map(str(path)) as source:
        try:
            # Files end with a table of contents; streams, as datasets writes them, have none.
            file = pa.ipc.open_file(source) if magic == b"ARROW1" else pa.ipc.open_stream(source)
        except Exception as error:
            raise UserError(f"{name}: is not an arrow file ({error})") from None
        stored = (file.get_batch(i) for i in range(file.num_record_batches)) if magic == b"ARROW1" else file
        parts = (batch.slice(at, BATCH) for batch in stored for at in range(0, batch.num_rows, BATCH))
        yield from _batches(name, file.schema.names, lambda: parts)


def _batches(name: str, names: list[str], batches: Callable[[], Iterable[Any]]) -> Located:
    check_names(name, names)
    number = 0
    following = iter(batches())
    while True:
        try:
            batch = next(following)
        except StopIteration:
            return
        except Exception as error:  # damaged pages and buffers
            raise UserError(f"{name}, after row {number}: cannot be read ({error})") from None
        for record in _records(name, number, batch):
            number += 1
            if not isinstance(record, RowError):
                record = {column: without_fill(value) for column, value in record.items()}
            yield f"{name}, row {number}", record


def _records(name: str, before: int, batch: Any) -> Iterator[Any]:
    try:
        batch.validate(full=True)  # an offset that is wrong would be followed to anywhere in memory
    except Exception:
        pieces: Iterator[Any] = (batch.slice(i, 1) for i in range(batch.num_rows))
    else:
        pieces = fitting(batch)
    for piece in pieces:
        try:
            yield from piece.to_pylist() if piece.num_rows > 1 else [_single(name, before + 1, piece)]
        except Exception:  # a value that Python has no object for: find its row
            yield from (_single(name, before + 1 + i, piece.slice(i, 1)) for i in range(piece.num_rows))
        before += piece.num_rows


def _single(name: str, number: int, row: Any) -> Any:
    try:
        row.validate(full=True)
        if expanded(row) > LONGEST:
            return too_long(f"{name}, row {number}")
        return row.to_pylist()[0]
    except Exception as error:  # text that is not UTF-8, dates out of range
        return RowError(f"{name}, row {number}", f"cannot be read ({error})", kind="not readable")


def without_fill(value: Any) -> Any:
    """Return a nested value without the keys that hold None.

    All objects of a column have the same keys in Arrow: None fills those that a row did not have, so that a call with
    one argument would have the arguments of every other call in the file.
    """
    if isinstance(value, dict):
        return {key: without_fill(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        # One look spares lists of numbers, which may be long.
        first = next((inner for inner in value if inner is not None), None)
        return [without_fill(inner) for inner in value] if isinstance(first, dict | list) else value
    return value
