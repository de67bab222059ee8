"""Rows on disk: Arrow files that are written in batches and read back memory-mapped, one row at a time."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa

from deft_lightning.data.examples import Example, Ints, Prepared, weight_of
from deft_lightning.data.lazy import Lazy, T
from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX

TEXT = pa.large_string()  # a batch may hold more than the 2 GiB of a string column
ROWS = pa.schema([("id", TEXT), ("digest", TEXT), ("where", TEXT), ("content", TEXT)])
TOKENS = pa.schema(
    [
        ("id", TEXT),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("noise_code", pa.list_(pa.int8())),
        ("length", pa.int32()),  # before truncation
        ("skipped", pa.int32()),  # supervised tokens cut off in front
        ("source", pa.int32()),  # its place among the sources
        ("cut", pa.list_(pa.int32())),  # some of the tokens that were cut off, those nearest to the cut
        ("weight", pa.list_(pa.float32())),  # of each label; empty where all count 1
    ]
)
BATCH = 1000


class Writer:
    """Writes an Arrow file batch by batch; memory holds one batch.

    Args:
        path: File to create.
        schema: Its columns.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._rows: list[tuple[Any, ...]] = []
        self._writer = pa.ipc.new_file(str(path), schema)
        self.count = 0

    def add(self, row: tuple[Any, ...]) -> None:
        """Add a row: one value a column."""
        self._rows.append(row)
        self.count += 1
        if len(self._rows) == BATCH:
            self._flush()

    def write(self, batch: pa.RecordBatch) -> None:
        """Write a whole batch, after the rows so far."""
        self._flush()
        self._writer.write_batch(batch)
        self.count += batch.num_rows

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_batch(record_batch(self._rows, self._schema))
            self._rows = []

    def __enter__(self) -> Self:
        """Return the writer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is left, and the end of the file."""
        self._flush()
        self._writer.close()


def record_batch(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.RecordBatch:
    """Return rows as a batch of columns."""
    columns = zip(*rows, strict=True)
    arrays = [_array(list(column), field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.record_batch(arrays, schema=schema)


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Return a column, from its buffers: ``pa.array`` imports pandas, and takes lists apart entry by entry."""
    if pa.types.is_large_string(kind):
        parts = [text.encode() for text in values]
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(parts))]
        return pa.Array.from_buffers(kind, len(values), buffers)
    if pa.types.is_list(kind):
        offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
        flat = np.concatenate(values)
        return pa.ListArray.from_arrays(_numbers(offsets, pa.int32()), _numbers(flat, kind.value_type), type=kind)
    return _numbers(np.array(values), kind)


def _numbers(values: np.ndarray[Any, Any], kind: pa.DataType) -> pa.Array:
    same = np.ascontiguousarray(values, dtype=np.dtype(kind.to_pandas_dtype()))
    return pa.Array.from_buffers(kind, len(same), [None, pa.py_buffer(same)])


def _mapped(numbers: pa.Array) -> np.ndarray[Any, Any]:
    """Return a view of a column of numbers; pyarrow's own would import pandas, half a second."""
    if not len(numbers):
        return np.zeros(0, dtype=np.dtype(numbers.type.to_pandas_dtype()))
    stored = np.frombuffer(numbers.buffers()[1], dtype=np.dtype(numbers.type.to_pandas_dtype()))
    return stored[numbers.offset : numbers.offset + len(numbers)]


def _mapped_text(column: pa.Array) -> tuple[np.ndarray[Any, Any], memoryview]:
    """Return a view of a column of texts: where each begins, with the end of the last, and their bytes."""
    _, starts, text = column.buffers()
    ends = np.frombuffer(starts, dtype=np.int64)[column.offset : column.offset + len(column) + 1]
    return ends, memoryview(text if text is not None else b"")


class Table(Lazy[T]):
    """An Arrow file, memory-mapped; worker processes open it again.

    Args:
        path: File that :class:`Writer` wrote.

    Raises:
        ValueError: It is another file.
    """

    schema: ClassVar[pa.Schema]

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if not reader.schema.equals(self.schema):
            raise ValueError(f"{path.name} has other columns")
        self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        for batch in self.batches:
            batch.validate()  # that the buffers are as long as they say; what they hold, the digest guards
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)]).tolist()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path alone."""
        return type(self), (self.path,)

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._starts[-1])

    def place(self, index: int) -> tuple[int, int]:
        """Return batch and row of an index."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        batch = bisect_right(self._starts, index) - 1
        return batch, index - self._starts[batch]

    def column(self, name: str) -> Iterator[Any]:
        """Yield the values of a column, batch by batch."""
        for batch in self.batches:
            yield from batch.column(name).to_pylist()


_JSON = json.JSONEncoder(ensure_ascii=False)


def row_of(example: Example) -> tuple[str, ...]:
    """Return an example as a row of :data:`ROWS`."""
    content = {name: getattr(example, name) for name in ("messages", "text", "tokens", "tools", "token_weights")}
    known = {name: value for name, value in content.items() if value is not None}
    if example.weight != 1:
        known["weight"] = example.weight
    if example.source:
        known["source"] = example.source
    return example.id, example.digest, example.where, _JSON.encode(known)


class SpooledExamples(Table[Example]):
    """Normalised examples on disk, in the order they were read."""

    schema = ROWS

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._texts = [[_mapped_text(column) for column in batch.columns] for batch in self.batches]

    def __getitem__(self, at: int) -> Example:
        """Return one example."""
        batch, row = self.place(at)
        columns = self._texts[batch]
        id, digest, where, content = (str(text[starts[row] : starts[row + 1]], "utf-8") for starts, text in columns)
        fields = json.loads(content)
        for name in ("messages", "tokens", "tools"):
            if name in fields:
                fields[name] = tuple(fields[name])
        return Example(id, digest, where, **fields)


NO_WEIGHT = np.zeros(0, dtype=np.float32)


def row_of_prepared(example: Prepared, length: int, cut: Ints) -> tuple[Any, ...]:
    """Return an example as a row of :data:`TOKENS`.

    Weights that are all 1 are none: data in which labels are either learnt or not is data without weights.

    Args:
        example: As it is trained on.
        length: Its tokens before truncation.
        cut: Some of those that were cut off.

    Raises:
        UserError: A weight that is not finite in float32, or that breaks the promise of :class:`Prepared`.
    """
    learnt, weight = example.labels != IGNORE_INDEX, NO_WEIGHT
    if example.weight is not None:
        weight = weight_of(example.labels, example.weight)
        if not (np.isfinite(weight).all() and (weight[learnt] > 0).all()):
            raise UserError(f"{example.id}: weights must be finite in float32, and above 0 where a label is learnt")
        weight = NO_WEIGHT if (weight[learnt] == 1).all() else weight
    return (
        example.id, example.input_ids, example.labels, example.noise_code, length, example.skipped, example.source, cut,
        weight,
    )  # fmt: skip


class Tokens(Table[Prepared]):
    """Prepared examples on disk.

    Attributes:
        weighted: Whether any of them has weights.
    """

    schema = TOKENS

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        names = ("input_ids", "labels", "noise_code", "weight")
        # Views of the file: a row is a few look-ups and slices.
        self._lists = [
            [(_mapped(batch.column(name).offsets), _mapped(batch.column(name).values)) for name in names]
            for batch in self.batches
        ]
        self._ids = [_mapped_text(batch.column("id")) for batch in self.batches]
        self._numbers = [(_mapped(batch.column("skipped")), _mapped(batch.column("source"))) for batch in self.batches]
        self.weighted = any(len(lists[-1][1]) for lists in self._lists)

    def __getitem__(self, at: int) -> Prepared:
        """Return one example; its arrays are copies, integers in int64."""
        batch, row = self.place(at)
        *lists, (starts, weights) = self._lists[batch]
        ids, labels, codes = (values[offsets[row] : offsets[row + 1]].astype(np.int64) for offsets, values in lists)
        weight = weights[starts[row] : starts[row + 1]].copy() if starts[row] < starts[row + 1] else None
        begins, text = self._ids[batch]
        id = str(text[begins[row] : begins[row + 1]], "utf-8")
        skipped, source = (int(column[row]) for column in self._numbers[batch])
        return Prepared(id, ids, labels, codes, skipped=skipped, weight=weight, source=source)

    def cut(self, at: int) -> tuple[int, list[int]]:
        """Return how many tokens an example had before truncation, and some of those that were cut off."""
        batch, row = self.place(at)
        columns = self.batches[batch]
        return columns.column("length")[row].as_py(), columns.column("cut")[row].as_py()

    def untruncated_lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the number of tokens that every example had before truncation."""
        parts = [_mapped(batch.column("length")).astype(np.int64) for batch in self.batches]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the number of tokens of every example."""
        parts = [np.diff(lists[0][0]).astype(np.int64) for lists in self._lists]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
