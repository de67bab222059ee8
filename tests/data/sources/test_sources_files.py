"""Compression, shards, folders, options and long files: rows come one at a time, in order of name, with their place."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deft_lightning.data.sources import json_window
from deft_lightning.data.sources.read import read
from deft_lightning.errors import UserError

ROWS: list[dict[str, Any]] = [{"question": f'{i} + {i}, "roughly"?\n', "answer": f"é {2 * i}"} for i in range(25)]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def separated(rows: list[dict[str, Any]], delimiter: str, folder: Path) -> bytes:
    with (folder / "scratch").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return (folder / "scratch").read_bytes()


def arrow(rows: list[dict[str, Any]], new: Callable[..., Any]) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return bytes(sink.getvalue())


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return bytes(sink.getvalue())


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=7)
    return bytes(sink.getvalue())


WRITERS: dict[str, Callable[[Path], bytes]] = {
    "rows.ndjson": lambda _: jsonl(ROWS),
    "rows.jsonl.gz": lambda _: gzip.compress(jsonl(ROWS)),
    "rows.ndjson.gz": lambda _: gzip.compress(jsonl(ROWS)),
    "two gzip members.jsonl.gz": lambda _: gzip.compress(jsonl(ROWS[:9])) + gzip.compress(jsonl(ROWS[9:])),
    "rows.jsonl.zst": lambda _: zstd(jsonl(ROWS)),
    "two frames.jsonl.zst": lambda _: zstd(jsonl(ROWS[:9])) + zstd(jsonl(ROWS[9:])),
    "rows.jsonl.bz2": lambda _: bz2.compress(jsonl(ROWS)),
    "two streams.jsonl.bz2": lambda _: bz2.compress(jsonl(ROWS[:9])) + bz2.compress(jsonl(ROWS[9:])),
    "rows.csv.bz2": lambda folder: bz2.compress(separated(ROWS, ",", folder)),
    "rows.jsonl.xz": lambda _: lzma.compress(jsonl(ROWS)),
    "rows.json.xz": lambda _: lzma.compress(json.dumps(ROWS).encode()),
    "two streams.jsonl.xz": lambda _: (
        lzma.compress(jsonl(ROWS[:9])) + bytes(8) + lzma.compress(jsonl(ROWS[9:])) + bytes(4)
    ),
    "rows.json.gz": lambda _: gzip.compress(json.dumps(ROWS).encode()),
    "rows.json.zst": lambda _: zstd(json.dumps({"data": ROWS}).encode()),
    "rows.tsv": lambda folder: separated(ROWS, "\t", folder),
    "rows.tsv.gz": lambda folder: gzip.compress(separated(ROWS, "\t", folder)),
    "rows.csv.gz": lambda folder: gzip.compress(separated(ROWS, ",", folder)),
    "ROWS.CSV.ZST": lambda folder: zstd(separated(ROWS, ",", folder)),
    "rows.parquet": lambda _: parquet(ROWS),
    "stream.arrow": lambda _: arrow(ROWS, pa.ipc.new_stream),
    "file.arrow": lambda _: arrow(ROWS, pa.ipc.new_file),
}
every_type = pytest.mark.parametrize("name", WRITERS)


@every_type
def test_a_file_of_any_type_gives_its_rows_in_order_with_file_and_row(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(WRITERS[name](tmp_path))
    assert list(read(str(path))) == [(f"{path}, row {i}", row) for i, row in enumerate(ROWS, 1)]


@every_type
def test_a_limit_takes_the_first_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(WRITERS[name](tmp_path))
    assert [row for _, row in read(f"{path}?limit=7")] == ROWS[:7] == [row for _, row in read(str(path), limit=7)]
    assert [row for _, row in read(f"{path}?limit=99")] == ROWS


def test_bad_rows_count_against_the_limit_so_that_it_means_the_same_rows_always(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n{"a": 3}\n{"a": 4}\n')
    bad: list[UserError] = []
    assert [row for _, row in read(f"{tmp_path}/rows.jsonl?limit=3", on_bad_row=bad.append)] == [{"a": 1}, {"a": 3}]
    assert len(bad) == 1


def test_a_file_of_bad_rows_alone_is_not_called_empty(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": \nhello\n')
    bad: list[UserError] = []
    assert list(read(f"{tmp_path}/rows.jsonl", on_bad_row=bad.append)) == []
    assert ["row 1" in str(bad[0]), "row 2" in str(bad[1])] == [True, True]


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("limt=3", "Did you mean limit"),
        ("limit=0", "at least 1"),
        ("limit=-1", "whole number"),
        ("limit=many", "whole number"),
        ("limit=", "whole number"),
        ("streaming=perhaps", "true or false"),
        ("limit=3&colour=red", "'colour'"),
    ],
)
def test_an_option_that_means_nothing_is_one_line(tmp_path: Path, options: str, says: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(ROWS))
    with pytest.raises(UserError) as caught:
        list(read(f"{tmp_path}/rows.jsonl?{options}"))
    assert says in str(caught.value) and "--data.source" in str(caught.value)


class Hub:
    """Stands for ``datasets.load_dataset``: notes what it is asked for, and loses the network after some rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int = 100, breaks: bool = False) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.read = 0
        self.rows, self.breaks = rows, breaks
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def load(self, name: str, subset: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        self.asked.append((name, subset, split, streaming))
        return self.iterate()

    def iterate(self) -> Iterator[dict[str, Any]]:
        for i in range(self.rows):
            self.read = i + 1
            yield {"question": f"q{i}", "answer": "a", "extra": {"x": 1, "fill": None}}
        if self.breaks:
            raise ConnectionError("the network is gone\nand a second line")


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("org/name", ("org/name", "main", "train", False)),
        ("name", ("name", "main", "train", False)),
        ("org/name[test]", ("org/name", "main", "test", False)),
        ("org/name?split=test", ("org/name", "main", "test", False)),
        ("org/name?subset=socratic&split=test&streaming=true", ("org/name", "socratic", "test", True)),
        ("org/name?split=train[:10%25]", ("org/name", "main", "train[:10%]", False)),
        ("hub:org/name?streaming=false", ("org/name", "main", "train", False)),
    ],
)
def test_options_of_a_hub_id_reach_the_loader(
    monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[Any, ...]
) -> None:
    hub = Hub(monkeypatch)
    where, record = next(read(source, subset="main"))
    assert hub.asked == [asked]
    assert where == f"{asked[0]}[{asked[2]}], row 1" and record["extra"] == {"x": 1}


def test_a_limited_stream_reads_no_more_than_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    assert len(list(read("org/name?streaming=true&limit=5"))) == 5
    assert hub.read == 5


def test_a_hub_id_wins_over_a_folder_of_its_name_if_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    Path("org/name/rows.jsonl").write_bytes(jsonl(ROWS))
    hub = Hub(monkeypatch)
    assert len(list(read("org/name"))) == len(ROWS) and not hub.asked
    assert len(list(read("hub:org/name"))) == 100


def test_a_network_that_goes_while_rows_come_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, rows=3, breaks=True)
    with pytest.raises(UserError, match=r"after row 3.*the network is gone") as caught:
        list(read("org/name?streaming=true"))
    assert len(str(caught.value).splitlines()) == 1 and "second" not in str(caught.value)


# --- folders and patterns -------------------------------------------------------------------------------------------


def shards(folder: Path, *names: str) -> Path:
    """Files of three rows each, all rows different and numbered through."""
    for n, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jsonl(ROWS[3 * n : 3 * n + 3]))
    return folder


def test_shards_come_in_order_of_name_and_rows_are_numbered_within_each(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data", "part-0.jsonl", "part-1.jsonl", "part-2.jsonl")
    os.rename(folder / "part-2.jsonl", folder / "part-00.jsonl")  # written last, named first
    patterns = ["*.jsonl", "part-*", "part-[0-9]*.jsonl", "../**/*.jsonl"]
    for source in (str(folder), *(f"{folder}/{pattern}" for pattern in patterns)):
        found = list(read(source))
        assert [row for _, row in found] == [*ROWS[:3], *ROWS[6:9], *ROWS[3:6]]
        files = [where.rpartition(",")[0] for where, _ in found]
        assert files == sorted(files) and [where.rpartition(" ")[2] for where, _ in found] == ["1", "2", "3"] * 3


@pytest.mark.parametrize("pattern", ["part-?.jsonl", "part-[12].jsonl", "part-[12]*", "{folder}/*1.jsonl"])
def test_marks_of_patterns_are_not_taken_for_options_or_splits(tmp_path: Path, pattern: str) -> None:
    folder = shards(tmp_path / "data", "part-1.jsonl", "part-2.jsonl")
    found = list(read(str(folder / pattern.replace("{folder}/", ""))))
    assert len(found) == (3 if "*1" in pattern else 6)


def test_a_pattern_takes_options_too(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data", "part-1.jsonl", "part-2.jsonl")
    assert [row for _, row in read(f"{folder}/part-?.jsonl?limit=4")] == ROWS[:4]


def test_a_pattern_without_files_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file matches.*--data\.source"):
        list(read(f"{tmp_path}/*.jsonl"))


def test_a_shard_without_rows_is_none_but_all_of_them_are_an_empty_source(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data", "a.jsonl", "c.jsonl")
    (folder / "b.jsonl").write_bytes(b"")
    assert [row for _, row in read(str(folder))] == ROWS[:6]
    for name in "ac":
        (folder / f"{name}.jsonl").write_bytes(b"\n")
    with pytest.raises(UserError, match="is empty"):
        list(read(str(folder)))


def test_a_split_is_told_by_names_of_files_or_folders_as_on_the_hub(tmp_path: Path) -> None:
    names = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test.jsonl", "val/rows.jsonl"]
    folder = shards(tmp_path / "name", *names)
    (folder / "README.md").write_text("hello")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "rows.jsonl").write_bytes(jsonl(ROWS))
    assert [row for _, row in read(str(folder))] == ROWS[:6]
    assert [row for _, row in read(f"{folder}[test]")] == ROWS[6:9] == [row for _, row in read(f"{folder}?split=test")]
    for split in ("validation", "valid", "dev"):
        assert [row for _, row in read(str(folder), split=split)] == ROWS[9:12]


def test_a_file_of_no_split_among_others_is_an_error_and_not_left_out(tmp_path: Path) -> None:
    folder = shards(tmp_path / "name", "train.jsonl", "more.jsonl")
    with pytest.raises(UserError, match=r"more\.jsonl does not name a split.*--data\.source"):
        list(read(str(folder)))


def test_a_split_without_files_is_an_error_that_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'test'; it has train, validation .*--data\.split"):
        list(read(str(shards(tmp_path / "a", "train.jsonl", "dev.jsonl")), split="test"))
    with pytest.raises(UserError, match=r"'test'.*no file is named after a split"):
        list(read(str(shards(tmp_path / "b", "rows.jsonl")), split="test"))


def test_what_datasets_saves_to_disk_is_read_without_its_cache(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": saved, "test": saved.select(range(3))}).save_to_disk(str(tmp_path / "saved"))
    shard = next((tmp_path / "saved" / "train").glob("*.arrow"))
    (shard.parent / "cache-0123.arrow").write_bytes(shard.read_bytes())
    assert [row for _, row in read(f"{tmp_path}/saved")] == ROWS
    assert [row for _, row in read(f"{tmp_path}/saved[test]")] == ROWS[:3]


def test_links_that_lead_back_do_not_repeat_rows_nor_go_on_for_ever(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data", "a.jsonl")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "more").symlink_to(shards(tmp_path / "elsewhere", "x.jsonl", "b.jsonl"), target_is_directory=True)
    assert len(list(read(str(folder)))) == 9


# --- files longer than memory ---------------------------------------------------------------------------------------

LONG = [{"question": f"What is {i}?", "answer": "x" * 480} for i in range(40_000)]  # 20 MB


def long_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(LONG), path, row_group_size=2000, use_dictionary=False)


LONG_WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_bytes(jsonl(LONG)),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(LONG), 1)),
    "rows.json": lambda path: path.write_text(json.dumps(LONG)),
    "rows.csv": lambda path: path.write_bytes(separated(LONG, ",", path.parent)),
    "rows.parquet": long_parquet,
    "rows.arrow": lambda path: path.write_bytes(arrow(LONG, pa.ipc.new_stream)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG_WRITERS)
def test_reading_does_not_hold_the_file(tmp_path: Path, name: str) -> None:
    LONG_WRITERS[name](tmp_path / name)
    rows, held = read(str(tmp_path / name)), pa.total_allocated_bytes()
    next(rows)
    tracemalloc.start()
    assert sum(1 for _ in rows) == len(LONG) - 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6 and pa.total_allocated_bytes() - held < 6e6


# --- .json through a window -----------------------------------------------------------------------------------------

VALUES: list[Any] = [
    {"a": [1, 2.5e-3, -7, True, None, {"b": 'x"y\\z\u00e9\U0001f600'}]}, 12345678901234567890, -0.5, "a\\", "", [], {},
    [[1], [2]], True, None, {"long": "y" * 200},
]  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 16, 64, 1000])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii", [True, False])
def test_a_list_reads_the_same_wherever_the_window_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None, ascii: bool
) -> None:
    monkeypatch.setattr(json_window, "CHUNK", chunk)
    text = json.dumps(VALUES, indent=indent, ensure_ascii=ascii)
    (tmp_path / "rows.json").write_text(f" \n{text}\n ", encoding="utf-8")
    assert [row for _, row in read(f"{tmp_path}/rows.json")] == VALUES


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "read_before"),
    [
        ("[", 0), ("[1", 1), ("[1,", 1), ("[1,]", 1), ("[,1]", 0), ("[1 2]", 1), ('[{"a": 1}, {"a"}]', 1), ("[1]]", 1),
        ("[1] [2]", 1), ('["a', 0), ('["\\q"]', 0), ('[{"a": tru}]', 0), ("[1, nul", 1), ("[1}", 1),
        ("[" * 50_000, 0), (f"[{'1' * 5000}]", 0),
    ],
)  # fmt: skip
def test_a_broken_list_is_one_line_after_the_rows_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, read_before: int, chunk: int
) -> None:
    monkeypatch.setattr(json_window, "CHUNK", max(chunk, len(text) // 50))
    (tmp_path / "rows.json").write_text(text)
    rows, found = read(f"{tmp_path}/rows.json"), []
    with pytest.raises(UserError, match="is not JSON") as caught:
        for _, row in rows:
            found.append(row)
    assert len(found) == read_before
    assert "rows.json" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_the_line_of_a_break_is_its_line_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_window, "CHUNK", 50)
    lines = [json.dumps({"a": "x" * (i % 70)}) + "," for i in range(200)]
    lines[150] = '{"a" 1},'
    (tmp_path / "rows.json").write_text("[\n" + "\n".join(lines) + "\n]")
    with pytest.raises(UserError, match=r"row 151: .*at line 152\)"):
        list(read(f"{tmp_path}/rows.json"))
