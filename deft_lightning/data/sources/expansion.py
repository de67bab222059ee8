"""What Arrow and parquet unpack to: values that are stored once may stand in every row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deft_lightning.data.sources.rows import LONGEST


def fitting(batch: Any) -> Iterator[Any]:
    """Yield a batch in parts whose values take no more than the longest row together; a longer row stands alone."""
    if batch.num_rows <= 1 or expanded(batch) <= LONGEST:
        yield batch
        return
    half = batch.num_rows // 2
    yield from fitting(batch.slice(0, half))
    yield from fitting(batch.slice(half))


def expanded(batch: Any) -> int:
    """Return the bytes of the values of a batch, at most, once each of them stands for itself."""
    return sum(map(_size, batch.columns))


def _size(array: Any) -> int:
    import pyarrow as pa

    kind, count = array.type, len(array)
    if not count:
        return 0
    if isinstance(array, pa.ExtensionArray):
        return _size(array.storage)
    if pa.types.is_dictionary(kind):
        return count * _greatest(array.dictionary)
    if pa.types.is_run_end_encoded(kind):
        return count * _greatest(array.values)
    if pa.types.is_struct(kind):
        return sum(map(_size, array.flatten()))
    if pa.types.is_map(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return 8 * count + _size(array.flatten())
    if pa.types.is_fixed_size_list(kind):
        return 8 * count + _size(array.flatten())
    if kind in (pa.string_view(), pa.binary_view()):
        return _length_of_views(array)
    if pa.types.is_nested(kind):  # overlapping lists, unions
        return count * int(array.nbytes)
    return int(array.nbytes)


def _length_of_views(array: Any) -> int:
    import numpy as np

    views = np.frombuffer(array.buffers()[1], dtype=np.int32).reshape(-1, 4)  # a length, and where the letters are
    return int(views[array.offset : array.offset + len(array), 0].astype(np.int64).sum())


def _greatest(values: Any) -> int:
    """Return the bytes of the longest of some values, at most."""
    import pyarrow as pa

    kind = values.type
    if not len(values):
        return 0
    if pa.types.is_primitive(kind):
        return 8
    if any(is_one(kind) for is_one in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)):
        import pyarrow.compute as pc

        return int(pc.max(pc.binary_length(values)).as_py() or 0)
    return _size(values)


# --- parquet ---------------------------------------------------------------------------------------------------------


def dictionary_size(path: Path, metadata: Any) -> int:
    """Return the bytes of the longest page of a parquet file that holds values once, for rows to refer to."""
    longest = 0
    with path.open("rb") as source:
        for at in range(metadata.num_row_groups):
            group = metadata.row_group(at)
            for number in range(group.num_columns):
                place = group.column(number).dictionary_page_offset
                if place is not None and place >= 0:
                    source.seek(place)
                    longest = max(longest, page_size(source.read(24)))
    return longest


def page_size(header: bytes) -> int:
    """Return the unpacked size that the header of a page of parquet tells; 0 if it tells none.

    In Thrift's compact protocol: field 1, the kind of page, then field 2, the size, both zigzag numbers of 32 bits.
    """
    at, found = 0, 0
    for _ in range(2):
        if header[at : at + 1] != b"\x15":  # the next field, of that type
            return 0
        at, found, shift = at + 1, 0, 0
        while at < len(header):
            found |= (header[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if not header[at - 1] & 0x80:
                break
    return found >> 1
