"""Prepared data that somebody or something has changed is prepared again, runs nothing, and leaves nothing behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kill_preparation
import numpy as np
import pyarrow as pa
import pytest

from deft_lightning.data import InstructionDataModule, Noise, TokenReplace
from deft_lightning.data.prepared import cache as cache_module
from deft_lightning.data.prepared import folder as folder_module
from deft_lightning.data.prepared.cache import FILES, _seal, cached
from deft_lightning.data.prepared.workers import in_order
from deft_lightning.errors import UserError

pytestmark = pytest.mark.slow

NOISE = Noise(ops=[TokenReplace(rate=0.2)])


def ready(folder: Path, **options: Any) -> InstructionDataModule:
    source = folder / "rows.jsonl"
    if not source.exists():
        rows = ({"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(40))
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {"validation_fraction": 0.25, "batch_size": 4, "tokenizer_size": 300, "max_length": 64, "noise": NOISE}
    data = InstructionDataModule(str(source), **{**known, "cache_dir": str(folder / "cache"), **options})
    data.prepare_data()
    data.setup("fit")
    return data


def prepared(folder: Path) -> Path:
    (found,) = (path.parent for path in (folder / "cache").rglob("meta.json"))
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_flipped_bit_in_any_file_is_noticed_and_told(tmp_path: Path) -> None:
    ready(tmp_path)
    folder, draw = prepared(tmp_path), random.Random(0)
    before = content(folder)
    assert {FILES, "meta.json", "train.arrow", "counts.npy", "tokenizer/tokenizer.json"} <= before.keys()
    for name, whole in before.items():
        path, known = folder / name, (folder / name).stat()
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
        with pytest.warns(UserWarning, match="has changed since it was written; the data is prepared again") as told:
            ready(tmp_path)
        assert [str(path) in str(warning.message) for warning in told].count(True) == 1
        assert content(folder) == before, name


@pytest.mark.parametrize("seed", range(3))
def test_many_flipped_bits_of_the_list_of_files(tmp_path: Path, seed: int) -> None:
    def build(folder: Path) -> None:
        (folder / "a").write_text("1")

    folder, draw = cached(tmp_path, ["x"], build), random.Random(seed)
    whole = (folder / FILES).read_bytes()
    for _ in range(30):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        (folder / FILES).write_bytes(flipped)
        with pytest.warns(UserWarning, match=r"has changed since it was written"):
            cached(tmp_path, ["x"], build)
        assert (folder / FILES).read_bytes() == whole


def link(folder: Path) -> None:
    (folder / "train.arrow").rename(folder.parent / "elsewhere")
    (folder / "train.arrow").symlink_to(folder.parent / "elsewhere")


def linked_folder(folder: Path) -> None:
    (folder / "more").symlink_to("/")


def listed_elsewhere(folder: Path) -> None:
    known = json.loads((folder / FILES).read_text())["files"]
    known["../../marker"] = known["meta.json"]
    (folder / FILES).write_text(json.dumps(cache_module._signed(known), indent=1))


def pipe(folder: Path) -> None:
    (folder / "meta.json").unlink()
    os.mkfifo(folder / "meta.json")


CHANGES: dict[str, Callable[[Path], Any]] = {
    "a link to a file": link,
    "a link to a folder": linked_folder,
    "a list of files elsewhere": listed_elsewhere,
    "a pipe": pipe,
    "one file more": lambda folder: (folder / "more.py").write_text("1"),
    "no list": lambda folder: (folder / FILES).unlink(),
    "a list of another kind": lambda folder: (folder / FILES).write_text("[1]"),
    "an endless list": lambda folder: (folder / FILES).write_text("[" * 100_000),
    "no text": lambda folder: (folder / FILES).write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_not_written_is_not_followed(tmp_path: Path, change: Callable[[Path], Any]) -> None:
    ready(tmp_path)
    folder = prepared(tmp_path)
    before = content(folder)
    change(folder)
    with pytest.warns(UserWarning, match="has changed since it was written"):
        ready(tmp_path)
    assert content(folder) == before and not any(path.is_symlink() for path in folder.rglob("*"))


# --- folders that a stranger has made, digests and all ---------------------------------------------------------------


class Marks:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def pickled_counts(folder: Path, marker: Path) -> None:
    for name in ("counts.npy", "all_counts.npy"):
        np.save(folder / name, np.array([Marks(marker)], dtype=object), allow_pickle=True)


def plain_pickle(folder: Path, marker: Path) -> None:
    for name in ("counts.npy", "all_counts.npy"):
        (folder / name).write_bytes(pickle.dumps(Marks(marker)))


def extension_type(folder: Path, marker: Path) -> None:
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    metadata[b"ARROW:extension:metadata"] = pickle.dumps(Marks(marker))
    schema = pa.schema([pa.field("id", pa.large_string(), metadata=metadata)])
    with pa.OSFile(str(folder / "train.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(["a"], pa.large_string())], schema=schema))


def meta(**changes: Any) -> Callable[[Path, Path], None]:
    def change(folder: Path, marker: Path) -> None:
        known = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**known, **changes}))

    return change


STRANGERS: dict[str, Callable[[Path, Path], Any]] = {
    "pickled counts": pickled_counts,
    "a pickle for counts": plain_pickle,
    "an extension type": extension_type,
    "splits elsewhere": meta(reports={"../../x": {}}),
    "reports of another form": meta(reports={"train": {"name": "train"}, "validation": {"nonsense": 1}}),
    "reports that are none": meta(reports=3),
    "no report": lambda folder, marker: (folder / "meta.json").write_text("[]"),
    "a table cut short": lambda folder, marker: os.truncate(folder / "train.arrow", 500),
    "text for a table": lambda folder, marker: (folder / "held_out.arrow").write_text("rows"),
    "a tokenizer with code": lambda folder, marker: (
        (folder / "tokenizer" / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}})
        )
        and (folder / "tokenizer" / "own.py").write_text(f"open({str(marker)!r}, 'w')")
    ),
}


@pytest.mark.parametrize("change", STRANGERS.values(), ids=STRANGERS)
def test_a_strangers_folder_runs_nothing_and_is_one_line(
    tmp_path: Path, change: Callable[[Path, Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    ready(tmp_path)
    folder = prepared(tmp_path)
    change(folder, tmp_path / "marker")
    (folder / FILES).unlink()
    _seal(folder)
    with pytest.raises(UserError) as caught:
        ready(tmp_path)
    assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "marker").exists()


def test_rows_that_change_while_they_are_read_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = folder_module.build

    def build(*args: Any) -> None:
        prepare(*args)
        with (tmp_path / "rows.jsonl").open("a") as file:
            file.write('{"question": "a", "answer": "b"}\n')

    monkeypatch.setattr(folder_module, "build", build)
    with pytest.raises(UserError, match="changed while it was being read"):
        ready(tmp_path)
    assert not list((tmp_path / "cache" / "data").iterdir())
    monkeypatch.undo()
    ready(tmp_path)


# --- preparations that are killed ------------------------------------------------------------------------------------

forks = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, and read from /proc")


class Fork:
    """A preparation in a process that is forked: it begins at once."""

    def __init__(self, root: Path, which: int, cache: bool) -> None:
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(root, which, cache))
        self._process.start()
        self.pid: int = self._process.pid  # type: ignore[assignment]

    def _run(self, root: Path, which: int, cache: bool) -> None:
        os.setsid()
        tempfile.tempdir = str(root / "tmp")
        options = {"num_proc": 2, "max_length": 500 + which, "cache": cache, "cache_dir": str(root / "cache")}
        InstructionDataModule(str(root / "rows.jsonl"), tokenizer_size=300, **options).prepare_data()

    def ended(self, seconds: float) -> int | None:
        """Wait for the process; return its status, None if it still runs."""
        self._process.join(seconds)
        return self._process.exitcode


@forks
def test_of_a_killed_preparation_the_next_run_leaves_nothing(tmp_path: Path) -> None:
    kill_preparation.write_rows(tmp_path, 1200)
    found = kill_preparation.kill_and_go_on(tmp_path, Fork, kills=5, seed=1)
    assert len(set(found["ways"])) > 1


@forks
def test_sigterm_cleans_up_at_once_and_tells_the_status(tmp_path: Path) -> None:
    kill_preparation.write_rows(tmp_path, 3000)
    for cache in (True, False):
        process = Fork(tmp_path, 0, cache)
        kill_preparation.until(lambda: kill_preparation.half(tmp_path), 60, "it does not begin")
        os.kill(process.pid, signal.SIGTERM)
        assert process.ended(60) in (143, -signal.SIGTERM)
        assert cache is False or not kill_preparation.half(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def _dies(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@forks
def test_a_killed_worker_is_one_line_that_names_the_option() -> None:
    jobs = ((number,) for number in range(20))
    with pytest.raises(UserError, match=r"worker process was killed.*--data.num_proc 1"):
        list(in_order(_dies, jobs, 2, "fork", int, ()))
    assert list(in_order(_dies, ((number,) for number in (1, 2, 5)), 2, "fork", int, ())) == [1, 2, 5]
