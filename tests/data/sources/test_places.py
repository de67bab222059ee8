"""Files at addresses: over a real server, in memory, by file://; fetched anew when they change, refused in a line."""

from __future__ import annotations

import gzip
import importlib.util
import json
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deft_lightning.data import InstructionDataModule
from deft_lightning.data.sources import places
from deft_lightning.data.sources.read import read
from deft_lightning.errors import UserError
from deft_lightning.training.resume.settings import content

QA = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(30)]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Site(ThreadingHTTPServer):
    """A server of some files; counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        self.asked: Counter[str] = Counter()
        self.seen: list[str] = []
        self.short = False  # break off in the middle
        self.status = 200
        self.head = True

    def at(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that goes."""


class Answer(BaseHTTPRequestHandler):
    server: Site

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        self.server.asked[self.command] += 1
        self.server.seen.append(self.path)
        if name == "moved.jsonl":
            self.send_response(302)
            self.send_header("Location", "/rows.jsonl")
            self.end_headers()
            return
        if name not in self.server.files or self.server.status != 200 or not (body or self.server.head):
            self.send_error(404 if self.server.status == 200 and self.server.head else max(self.server.status, 403))
            return
        data = self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        for header, value in self.server.headers.items():
            self.send_header(header, value)
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if self.server.short else data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.files["rows.jsonl"] = jsonl(QA)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def rows_of(source: str) -> list[Any]:
    return [record for _, record in read(source)]


def left() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f".{places.PREFIX}-*/rows*"))


# --- reading --------------------------------------------------------------------------------------------------------


def test_files_of_every_type_are_read_over_http_and_nothing_is_left(site: Site, tmp_path: Path) -> None:
    before = left()
    table = pa.Table.from_pylist(QA)
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    site.files |= {
        "a/rows.jsonl.gz": gzip.compress(jsonl(QA)), "rows.json": json.dumps(QA).encode(),
        "rows.csv": b"question;answer\n" + b"".join(f"q{i};a{i}\n".encode() for i in range(30)),
        "rows.parquet": (tmp_path / "rows.parquet").read_bytes(), "rows.arrow": (tmp_path / "rows.arrow").read_bytes(),
    }  # fmt: skip
    for name in site.files:
        found = list(read(site.at(name)))
        assert [record for _, record in found] == QA
        assert found[2][0] == f"{site.at(name)}, row 3"
    assert left() == before


def test_a_file_is_removed_when_nobody_reads_on(site: Site) -> None:
    before = left()
    rows = read(site.at("rows.jsonl"))
    next(rows)
    assert len(left()) == len(before) + 1
    rows.close()  # type: ignore[attr-defined]
    assert left() == before
    assert len(rows_of(site.at("rows.jsonl?limit=3"))) == 3 and left() == before


def test_a_query_belongs_to_the_server_unless_it_is_of_our_options(site: Site) -> None:
    assert len(rows_of(site.at("rows.jsonl?limit=4"))) == 4
    assert all("?" not in path for path in site.seen)
    found = list(read(site.at("rows.jsonl?signature=secret&limit=4")))
    assert len(found) == 30 and any("signature=secret&limit=4" in path for path in site.seen)
    assert not any("secret" in where for where, _ in found)


def test_a_redirect_is_followed(site: Site) -> None:
    assert rows_of(site.at("moved.jsonl")) == QA


def test_a_server_that_answers_no_head_is_read(site: Site) -> None:
    site.head = False
    assert rows_of(site.at("rows.jsonl")) == QA


@pytest.mark.parametrize("how", ["missing", "refused", "short", "page", "gone", "type"])
def test_what_cannot_be_fetched_is_one_line_without_secrets(site: Site, how: str) -> None:
    name, says = "rows.jsonl", "credentials"
    if how == "missing":
        name, says = "none.jsonl", "there is no such file"
    elif how == "refused":
        site.status = 403
    elif how == "short":
        site.short = True
    elif how == "page":
        name, says = "org/name/blob/main/rows.jsonl", "/resolve/ instead of /blob/"
        site.files[name] = b"\n<!DOCTYPE html><html></html>"
    elif how == "type":
        name, says = "rows.txt", "unknown file type '.txt'"
    address = site.at(name).replace("://", "://me:password@") + "?signature=secret"
    if how == "gone":
        address = "http://me:password@127.0.0.1:9/rows.jsonl?signature=secret"
    with pytest.raises(UserError) as caught:
        rows_of(address)
    told = str(caught.value)
    assert says in told and "--data.source" in told and name in told and len(told.splitlines()) == 1
    assert "secret" not in told and "password" not in told


def test_memory_holds_files_folders_splits_and_patterns(memory: Any) -> None:
    for name, part in {"train-0": QA[:5], "train-1": QA[5:9], "test": QA[9:12], "note": QA[:1]}.items():
        memory.pipe(f"/data/{name}.{'txt' if name == 'note' else 'jsonl'}", jsonl(part))
    assert rows_of("memory://data/test.jsonl") == QA[9:12]
    assert rows_of("memory://data") == rows_of("memory://data/") == rows_of("memory://data/train-*.jsonl") == QA[:9]
    assert rows_of("memory://data[test]") == rows_of("memory://data?split=test") == QA[9:12]
    assert rows_of("memory://data/train-[0].jsonl?limit=2") == QA[:2]
    assert next(read("memory://data"))[0] == "memory://data/train-0.jsonl, row 1"
    with pytest.raises(UserError, match="no file matches"):
        rows_of("memory://data/*.csv")
    with pytest.raises(UserError, match="no such file"):
        rows_of("memory://nothing/rows.jsonl")


def test_a_file_address_is_the_file(tmp_path: Path) -> None:
    (tmp_path / "a b.jsonl").write_bytes(jsonl(QA))
    for address in (f"file://{tmp_path}/a b.jsonl", f"file://{tmp_path}/a%20b.jsonl", f"FILE://localhost{tmp_path}"):
        assert rows_of(address) == QA
    assert rows_of(f"file://{tmp_path}/*.jsonl?limit=2") == QA[:2]


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("s3://bucket/rows.jsonl", "needs the package s3fs"),
        ("gs://bucket/rows.jsonl", "needs the package gcsfs"),
        ("hf://datasets/org/name/rows.jsonl", "offline"),
        ("hf://datasets/org/name", "offline"),
        ("htp://host/rows.jsonl", "Did you mean http"),
        ("reference://refs.json", "unknown scheme reference://"),
        ("memory://a.jsonl::http://host/rows.jsonl", "chained URLs"),
    ],
)
def test_a_place_that_is_not_opened_names_the_remedy(address: str, says: str) -> None:
    package = {"s3": "s3fs", "gs": "gcsfs"}.get(address.partition(":")[0])
    if package is not None and importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(UserError) as caught:
        rows_of(address)
    assert says in str(caught.value) and "--data.source" in str(caught.value)


# --- prepared data --------------------------------------------------------------------------------------------------


def answers(source: str, cache: Path, **options: Any) -> set[str]:
    """What is learnt from a source."""
    data = InstructionDataModule(source, validation_fraction=0.0, tokenizer_size=300, cache_dir=str(cache), **options)
    data.prepare_data()
    data.setup("fit")
    return {piece.text for one in data.samples("train", 99) for piece in one.pieces if piece.kind == "supervised"}


OLD, NEW = jsonl([{"question": "q", "answer": "old"}]), jsonl([{"question": "q", "answer": "new"}])


@pytest.mark.slow
@pytest.mark.parametrize("marked", ["ETag", "weak", "time", "nothing"])
def test_a_file_that_changed_is_prepared_again_and_one_that_did_not_is_not(
    site: Site, tmp_path: Path, marked: str
) -> None:
    kind = {"ETag": ("ETag", '"{}"'), "weak": ("ETag", 'W/"same"'), "time": ("Last-Modified", "Mon, 01 Jan 2024")}
    name, value = kind.get(marked, ("X-Nothing", ""))
    site.files["rows.jsonl"], site.headers = OLD, {name: value.format(1)}
    for _ in range(2):
        assert any("old" in text for text in answers(site.at("rows.jsonl"), tmp_path))
    fetched = site.asked["GET"]
    answers(site.at("rows.jsonl"), tmp_path)
    assert (site.asked["GET"] == fetched) == (marked == "ETag")  # the mark alone was asked for
    # Of the same size, at the same time.
    site.files["rows.jsonl"], site.headers = NEW, {name: value.format(2)}
    found = answers(site.at("rows.jsonl"), tmp_path)
    assert any("new" in text for text in found) and not any("old" in text for text in found)


def test_a_file_in_memory_that_changed_is_prepared_again(memory: Any, tmp_path: Path) -> None:
    for held, word in ((OLD, "old"), (NEW, "new")):
        memory.pipe("/rows.jsonl", held)
        assert any(word in text for text in answers("memory://rows.jsonl", tmp_path))


def test_a_file_that_changes_while_it_is_read_ends_the_run(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.headers = {"ETag": '"1"'}
    read_file = places.read_file

    def slowly(*args: Any) -> Iterator[Any]:
        yield from read_file(*args)
        site.headers = {"ETag": '"2"'}

    monkeypatch.setattr(places, "read_file", slowly)
    with pytest.raises(UserError, match="changed while it was being read"):
        answers(site.at("rows.jsonl"), tmp_path)


def test_what_a_checkpoint_keeps_of_an_address_is_its_content_and_asks_nobody(site: Site, tmp_path: Path) -> None:
    site.headers = {"ETag": '"1"'}
    address = site.at("rows.jsonl")
    answers(address, tmp_path)
    asked, first = sum(site.asked.values()), content(address)
    assert "1" in first and sum(site.asked.values()) == asked
    site.headers = {"ETag": '"other"'}
    answers(address, tmp_path)
    assert content(address) != first
