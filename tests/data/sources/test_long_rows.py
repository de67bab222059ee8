"""Rows without end, and values that unpack to gigabytes: one line each, in bounded memory, and reading goes on."""

from __future__ import annotations

import gzip
import json
import lzma
import multiprocessing
import os
import resource
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deft_lightning.data.sources.read import read
from deft_lightning.data.sources.rows import LONGEST, BadRows
from deft_lightning.errors import UserError

pytestmark = pytest.mark.slow

PART = 16 << 20
PARTS = 5  # 80 MiB: more than a row may have
GOOD = b'{"question": "a", "answer": "b"}\n'
linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")


def squeezed(path: Path, head: bytes, tail: bytes, fill: bytes = b"x", parts: int = PARTS) -> None:
    """Write a text whose middle is 16 MiB again and again, as .gz or .zst of a few KB."""
    middle = fill * (PART // len(fill))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(head) + gzip.compress(middle, 1) * parts + gzip.compress(tail))
        return
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(head)
        for _ in range(parts):
            file.write(middle)
        file.write(tail)


def one_value(path: Path) -> pa.Table:
    """A table whose rows share a value of 20 MiB: 1.2 GiB once each has its own."""
    value = pa.DictionaryArray.from_arrays(pa.array([0] * 60, pa.int32()), pa.array(["x" * (20 << 20)]))
    return pa.table({"question": ["a"] * 60, "answer": value})


def parquet(path: Path) -> None:
    pq.write_table(one_value(path), path, dictionary_pagesize_limit=1 << 30)


def arrow(path: Path, table: pa.Table | None = None) -> None:
    table = one_value(path) if table is None else table
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def long_row(path: Path) -> None:
    """Three rows, the second of them too long as a list that refers to one value again and again."""
    words = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array(["x" * (1 << 20)]))
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 299, 300], pa.int32()), words)
    arrow(path, pa.table({"question": ["a"] * 3, "answer": lists}))


OPEN = b'{"question": "a", "answer": "'
SKIPPED: dict[str, tuple[str, Callable[[Path], Any], int, list[int]]] = {
    "a line": ("a.jsonl.gz", lambda path: squeezed(path, GOOD + OPEN, b'"}\n' + GOOD), 2, [2]),
    "a line, zstd": ("a.jsonl.zst", lambda path: squeezed(path, GOOD + OPEN, b'"}\n' + GOOD), 2, [2]),
    "a last line": ("a.jsonl.gz", lambda path: squeezed(path, GOOD + OPEN, b""), 1, [2]),
    "a field": ("a.csv.gz", lambda path: squeezed(path, b"question,answer\na,b\na,", b"\nc,d\n"), 2, [2]),
    "a field in quotes": (
        "a.tsv.gz", lambda path: squeezed(path, b'question\tanswer\na\tb\na\t"', b'"\nc\td\n'), 2, [2],
    ),
    "a value of all rows, parquet": ("a.parquet", parquet, 60, []),
    "a value of all rows, arrow": ("a.arrow", arrow, 60, []),
    "a list of one value": ("a.arrow", long_row, 2, [2]),
}  # fmt: skip
FATAL: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a quote that is never closed": (
        "a.csv.gz", lambda path: squeezed(path, b'question,answer\na,b\na,"', b"\n", b"x" * 1023 + b"\n"), "row 2",
    ),
    "a header": ("a.csv.gz", lambda path: squeezed(path, b"question,answer", b"\n"), "header"),
    "a value of a list": (
        "a.json.gz", lambda path: squeezed(path, b"[" + GOOD + b"," + OPEN, b'"}]'), "row 2",
    ),
    "an object": (
        "a.json.gz", lambda path: squeezed(path, b'{"rows": [' + OPEN, b'"}]}', parts=17), "too long to be read",
    ),
}  # fmt: skip


def peak(work: Callable[[], Any]) -> tuple[Any, int]:
    """Return what work gives, and the bytes that it needed beyond what was there."""

    def known(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10

    def inside() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = known("VmRSS")
        found = work()
        sender.send((found, known("VmHWM") - before))

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=inside)
    process.start()
    sender.close()
    result: tuple[Any, int] = receiver.recv()
    process.join()
    return result


def skipping(path: Path) -> tuple[int, list[str]]:
    bad = BadRows()
    kept = sum(1 for _ in read(str(path), on_bad_row=bad))
    return kept, bad.first


def stopping(path: Path) -> str:
    try:
        return f"{sum(1 for _ in read(str(path)))} rows"
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("name", SKIPPED)
def test_reading_goes_on_behind_a_row_that_is_too_long(tmp_path: Path, name: str) -> None:
    file, make, rows, bad = SKIPPED[name]
    path = tmp_path / file
    make(path)
    assert path.stat().st_size < 50 << 20
    kept, told = skipping(path)
    assert kept == rows
    assert told == [
        f"{path}, row {row}: is longer than {LONGEST:,} characters, the most that a row may have" for row in bad
    ]


@pytest.mark.parametrize("name", FATAL)
def test_what_has_no_end_that_is_known_is_one_line(tmp_path: Path, name: str) -> None:
    file, make, says = FATAL[name]
    path = tmp_path / file
    make(path)
    told = stopping(path)
    assert told.startswith(str(path)) and says in told and f"{LONGEST * (4 if 'object' in name else 1):,}" in told
    assert len(told) < 400


@linux
def test_memory_stays_what_it_is_for_the_longest_row(tmp_path: Path) -> None:
    squeezed(tmp_path / "line.jsonl.gz", GOOD + OPEN, b'"}\n' + GOOD, parts=50)  # 800 MiB
    parquet(tmp_path / "value.parquet")
    arrow(tmp_path / "value.arrow")
    (kept, bad), needed = peak(lambda: skipping(tmp_path / "line.jsonl.gz"))
    assert (kept, len(bad)) == (2, 1) and needed < 300 << 20
    for file in ("value.parquet", "value.arrow"):
        (kept, bad), needed = peak(lambda file=file: skipping(tmp_path / file))  # type: ignore[misc]
        assert (kept, len(bad)) == (60, 0) and needed < 700 << 20


@linux
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_a_value_that_grows_while_it_is_read_names_its_file_when_memory_ends(tmp_path: Path, name: str) -> None:
    """In three letters of JSON, ``[],``, are 64 bytes of a list."""
    path = tmp_path / name
    path.write_bytes(gzip.compress(b'{"question": "a", "answer": "b", "more": [' + b"[]," * (3 << 20) + b"[]]}\n", 1))

    def limited() -> str:
        there = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (there + (128 << 20),) * 2)
        return stopping(path)

    told, _ = peak(limited)
    assert told.startswith(f"{path}: ") and "memory" in told and "\n" not in told


def test_a_window_of_zstd_that_takes_the_memory_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    # A frame without a size whose window is 2^41 bytes, and an empty last block.
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00\xf8" + b"\x01\x00\x00")
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: "):
        list(read(str(path)))


def test_a_window_of_xz_that_takes_the_memory_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.xz"
    content = lzma.compress(GOOD, preset=0)
    path.write_bytes(content)
    assert sum(1 for _ in read(str(path))) == 1
    at = content.index(b"\x21\x01") + 2  # LZMA2, one byte of properties
    header = bytearray(content[12 : 12 + 4 * (content[12] + 1)])
    header[at - 12] = 36  # 2^30 bytes
    header[-4:] = zlib.crc32(header[:-4]).to_bytes(4, "little")
    path.write_bytes(content[:12] + header + content[12 + len(header) :])
    with pytest.raises(UserError, match=r"a\.jsonl\.xz: .*[Mm]emory"):
        list(read(str(path)))


def test_a_header_of_10_mb_and_a_hundred_thousand_columns(tmp_path: Path) -> None:
    names = ["question", "answer", *(f"{i:0100d}" for i in range(100_000))]
    path = tmp_path / "a.csv"
    path.write_text(",".join(names) + "\na,b\n" + "x," * 200_000 + "x\nc,d\n")
    bad = BadRows()
    kept = [record["answer"] for _, record in read(str(path), on_bad_row=bad)]
    assert kept == ["b", "d"] and "more fields than the header" in bad.first[0]
    path.write_text(",".join([*names, "x" * 10_000_000, "x" * 10_000_000]) + "\na,b\n")
    with pytest.raises(UserError) as caught:
        list(read(str(path)))
    assert "two columns are named" in str(caught.value) and len(str(caught.value)) < 500


def test_pipes_and_devices_are_refused_and_waited_for_by_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    for source in (tmp_path / "rows.jsonl", tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(UserError, match=r"rows\.jsonl: is a named pipe, not a file.*--data\.source"):
            list(read(str(source)))
    with pytest.raises(UserError, match="is a device or socket, not a file"):
        list(read("/dev/zero"))
    reader, writer = os.pipe()  # what the shell makes of <(...)
    with pytest.raises(UserError, match="is a named pipe, not a file"):
        list(read(f"/dev/fd/{reader}"))
    os.close(reader)
    os.close(writer)


def test_names_of_files_are_shown_and_links_that_lead_back_are_left(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "again").symlink_to(folder)
    name = "a\x1b[2J\n\u202eb.jsonl"
    (folder / name).write_bytes(GOOD + b"{\n" + GOOD)
    bad = BadRows()
    assert len(list(read(str(folder), on_bad_row=bad))) == 2 and len(bad) == 1
    listed = bad.write(tmp_path / "bad.tsv").read_text(encoding="utf-8")
    for told in (bad.first[0], listed):
        assert "\\x1b[2J" in told and "\\u202e" in told and not set(told) & set("\x1b\u202e")
    assert len(listed.splitlines()) == 2
    (folder / "gone.jsonl").symlink_to(folder / "nowhere")
    with pytest.raises(UserError, match=r"gone\.jsonl: cannot be read"):
        list(read(str(folder / "g*.jsonl")))
    assert json.loads(GOOD)["answer"] == "b"
