"""Rows that a program hands over in place of the name of a file: a list of objects, or a dataset of `datasets`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from deft_lightning.data.sources.columnar import without_fill
from deft_lightning.data.sources.rows import LONGEST, Located, RowError, too_long
from deft_lightning.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

    Source: TypeAlias = str | Sequence[str] | Mapping[str, float] | Sequence[Mapping[str, Any]] | Dataset
    TestSource: TypeAlias = Source
else:  # what the command line and files of options can say
    Source = str | list[str] | dict[str, float]
    TestSource = str

NAME = "rows"  # of a source that has none, in messages
BATCH = 1000


class GivenRows:
    """A source that is known by what it holds; read like a file of it.

    Rows of a list are kept as the lines of JSON that a file would hold: what happens to the list afterwards changes
    nothing. Those of a dataset are read where they are, as often as they are needed.
    """

    def __len__(self) -> int:
        """Return the number of rows."""
        raise NotImplementedError

    def read(self) -> Located:
        """Yield ``(where, record)`` of every row; a :class:`RowError` in place of one that cannot be read."""
        raise NotImplementedError

    def content(self) -> Iterable[bytes]:
        """Yield what the rows are told apart by."""
        raise NotImplementedError

    @cached_property
    def digest(self) -> str:
        """Hash of the content."""
        digest = hashlib.blake2b(digest_size=16)
        for part in self.content():
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    def __str__(self) -> str:
        """Return the name for messages."""
        return NAME

    def __repr__(self) -> str:
        """Return a name that stands for the content: it is a part of the key under which prepared data is kept."""
        return f"{NAME}:{self.digest}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GivenRows) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


class ListedRows(GivenRows):
    """The rows of a list.

    Args:
        rows: Objects; anything else is a bad row.
    """

    def __init__(self, rows: Iterable[Any]) -> None:
        self._lines = [_line(f"{NAME}, row {number}", row) for number, row in enumerate(rows, 1)]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._lines)

    def read(self) -> Located:
        """Yield every row as a file of JSON lines gives it."""
        for number, line in enumerate(self._lines, 1):
            yield f"{NAME}, row {number}", line if isinstance(line, RowError) else json.loads(line)

    def content(self) -> Iterator[bytes]:
        """Yield the lines."""
        return (str(line).encode() for line in self._lines)


class DatasetRows(GivenRows):
    """The rows of a dataset.

    Args:
        dataset: With a length; what its columns are formatted as does not matter.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset.with_format(None)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._dataset)

    def read(self) -> Located:
        """Yield every row without the keys that Arrow fills with None."""
        for number, record in enumerate(self._dataset, 1):
            yield f"{NAME}, row {number}", {name: without_fill(value) for name, value in record.items()}

    def content(self) -> Iterator[bytes]:
        """Yield the names of the columns, and the buffers of the rows, batch by batch."""
        import pyarrow as pa

        tables = self._dataset.with_format("arrow")
        yield json.dumps([[name, str(kind)] for name, kind in self._dataset.features.items()]).encode()
        for start in range(0, len(self), BATCH):
            sink = pa.BufferOutputStream()
            table = tables[start : start + BATCH].replace_schema_metadata(None).combine_chunks()
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            yield sink.getvalue().to_pybytes()


def _line(where: str, row: Any) -> str | RowError:
    try:
        line = json.dumps(row, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        return RowError(where, f"holds what JSON cannot write ({error})", _unwritten(row), kind="type")
    return line if len(line) <= LONGEST else too_long(where)


def _unwritten(row: Any) -> str:
    """Return the first field of a row that JSON cannot write."""
    for name, value in row.items() if isinstance(row, Mapping) else ():
        try:
            json.dumps({name: value}, default=_plain)
        except (TypeError, ValueError, RecursionError):
            return str(name)[:40]
    return ""


def _plain(value: Any) -> Any:
    """Return a value that JSON has no word for as a file of rows would hold it."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if hasattr(value, "tolist"):  # arrays and numbers of numpy and torch
        return value.tolist()
    raise TypeError(f"got {type(value).__name__}")


Settled = str | Sequence[str] | Mapping[str, float] | GivenRows


def settled(source: Source | GivenRows | None, option: str) -> Settled | None:
    """Return a source with rows that were handed over as a :class:`GivenRows`; names as they are.

    Args:
        source: A name, several, weights of several, a list of rows, a dataset, or None.
        option: Where it was given, for the error.

    Raises:
        UserError: It is none of these.
    """
    datasets = sys.modules.get("datasets")  # nobody holds a dataset who has not imported it
    if datasets is not None and isinstance(source, datasets.Dataset):
        return DatasetRows(source)
    if datasets is not None and isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise UserError(f"{option}: got a dict of splits; pass one of them: {', '.join(map(str, source))}")
    if source is None or isinstance(source, str | Mapping | GivenRows):
        return source
    if isinstance(source, list | tuple):
        names = all(isinstance(part, str) for part in source)
        return source if names else ListedRows(source)
    raise UserError(
        f"{option}: got {type(source).__name__}; known: a name, a list of names, names with weights, a list of rows"
        " (dicts), or a datasets.Dataset"
    )
