"""Prepared data on disk: used again when nothing changed, made again when anything did, and never half of it."""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from instruction_rows import write

from deft_lightning.data import InstructionDataModule, Noise, ResponseNoise, ResponseSwap, TokenReplace
from deft_lightning.data.encoding.tokenizer import build_tokenizer
from deft_lightning.data.noise.edits import Edit
from deft_lightning.data.prepared.spool import Tokens
from deft_lightning.errors import UserError


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"question": f"What is {i}?", "answer": f"It is {i}." + "!" * (i % 4), "other": f"Not {i}."}
        for i in range(start, start + count)
    ]


BASE: dict[str, Any] = {"validation_fraction": 0.25, "batch_size": 4, "tokenizer_size": 300, "max_length": 64}


def ready(folder: Path, **options: Any) -> InstructionDataModule:
    """Set up on ``rows.jsonl`` of the folder, with prepared data in ``cache`` beside it."""
    source = folder / "rows.jsonl"
    if not source.exists():
        write(source, rows(40))
    data = InstructionDataModule(str(source), **{**BASE, "cache_dir": str(folder / "cache"), **options})
    data.prepare_data()
    data.setup("fit")
    return data


def prepared(cache: Path) -> dict[str, tuple[int, int]]:
    """Every prepared folder: which file its train table is, and when that was written."""
    tables = {path.parent.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.rglob("train.arrow")}
    assert all(len(name) > 20 and name[0] != "." for name in tables)
    return tables


def batches(data: InstructionDataModule) -> list[dict[str, Any]]:
    validation = data.val_dataloader()
    loaders = [data.train_dataloader(), *(validation if isinstance(validation, list) else [validation])]
    return [batch for loader in loaders for batch in loader]


def assert_same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name], name


# --- the key ---------------------------------------------------------------------------------------------------------


def test_the_second_run_takes_what_the_first_prepared(tmp_path: Path) -> None:
    noise = Noise(splits=["train", "validation"], ops=[ResponseSwap(0.3), TokenReplace(0.2)])
    first = ready(tmp_path, noise=noise)
    before = prepared(tmp_path / "cache")
    assert len(before) == 1
    second = ready(tmp_path, noise=noise)
    assert prepared(tmp_path / "cache") == before
    assert_same(batches(first), batches(second))
    assert first.reports == second.reports
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()


def same_size_and_time(path: Path, change: Callable[[str], str]) -> None:
    """Rewrite a file so that nothing but its content tells."""
    known, content = path.stat(), path.read_text(encoding="utf-8")
    path.write_text(change(content), encoding="utf-8")
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    now = path.stat()
    assert (now.st_size, now.st_mtime_ns) == (known.st_size, known.st_mtime_ns) and path.read_text() != content


def flipped(folder: Path) -> dict[str, Any]:
    same_size_and_time(folder / "rows.jsonl", lambda text: text.replace("It is 7.", "It is 8."))
    return {}


def other_validation(folder: Path) -> dict[str, Any]:
    same_size_and_time(folder / "validation.jsonl", lambda text: text.replace("It is 107.", "It is 108."))
    return {"validation_source": str(folder / "validation.jsonl")}


def tokenizer(folder: Path, name: str, size: int) -> str:
    build_tokenizer([json.dumps(row) for row in rows(40)], size).save_pretrained(folder / name)
    return str(folder / name)


def other_template(folder: Path) -> dict[str, Any]:
    same_size_and_time(folder / "template.jinja", lambda text: text.replace("Q: ", "P: "))
    return {"chat_template": str(folder / "template.jinja")}


def other_template_of_a_tokenizer(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer" / "chat_template.jinja"
    path.write_text(path.read_text().replace("'<|end|>'", "' <|end|>'"))
    return {"tokenizer": str(folder / "tokenizer")}


def other_noise(**options: Any) -> Noise:
    return dataclasses.replace(NOISE, **options)


TEMPLATE = (
    "{% for m in messages %}{{ 'Q: ' if m['role'] == 'user' else 'A: ' }}{{ m['content'] }}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
NOISE = Noise(ops=[TokenReplace(rate=0.2)])
Change = tuple[Callable[[Path], dict[str, Any]], Callable[[Path], dict[str, Any]]]


def options(before: dict[str, Any], **after: Any) -> Change:
    return lambda folder: before, lambda folder: {**before, **after}


def validated(folder: Path) -> dict[str, Any]:
    return {"validation_source": write(folder / "validation.jsonl", rows(9, start=100))}


def templated(folder: Path) -> dict[str, Any]:
    (folder / "template.jinja").write_text(TEMPLATE)
    return {"chat_template": str(folder / "template.jinja")}


CHANGES: dict[str, Change] = {
    "content of the source": (lambda folder: {}, flipped),
    "content of the validation source": (validated, other_validation),
    "content of a template file": (templated, other_template),
    "another tokenizer": (
        lambda folder: {"tokenizer": tokenizer(folder, "one", 300)},
        lambda folder: {"tokenizer": tokenizer(folder, "two", 280)},
    ),
    "template of the tokenizer": (
        lambda folder: {"tokenizer": tokenizer(folder, "tokenizer", 300)},
        other_template_of_a_tokenizer,
    ),
    "column_map": options({}, column_map={"answer": "other"}),
    "format": options({}, format="question_answer"),
    "validation_fraction": options({}, validation_fraction=0.5),
    "seed": options({}, seed=1),
    "max_length": options({}, max_length=40),
    "keep": options({"max_length": 14}, keep="end"),
    "supervise": options({}, supervise="all"),
    "chat_template": options({}, chat_template="chatml"),
    "tokenizer_size": options({}, tokenizer_size=270),
    "rate of the noise": options({"noise": NOISE}, noise=other_noise(ops=[TokenReplace(rate=0.3)])),
    "target of the noise": options({"noise": NOISE}, noise=other_noise(ops=[TokenReplace(rate=0.2, target="text")])),
    "one more operation": options({"noise": NOISE}, noise=other_noise(ops=[*NOISE.ops, ResponseSwap(0.5)])),
    "seed of the noise": options({"noise": NOISE}, noise=other_noise(seed=1)),
    "splits of the noise": options({"noise": NOISE}, noise=other_noise(splits=["train", "validation"])),
    "trusted_fraction": options({"noise": NOISE}, noise=other_noise(trusted_fraction=0.5)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), CHANGES.values(), ids=CHANGES.keys())
def test_what_changes_the_result_is_prepared_again(tmp_path: Path, before: Any, after: Any) -> None:
    write(tmp_path / "rows.jsonl", rows(40))
    ready(tmp_path, **before(tmp_path))
    known = prepared(tmp_path / "cache")
    changed = after(tmp_path)
    found = ready(tmp_path, **changed)
    now = prepared(tmp_path / "cache")
    assert len(now) == 2 and known.items() <= now.items()
    # It is what a run without any cache gives.
    assert_same(batches(found), batches(ready(tmp_path, **{**changed, "cache": False})))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 7}, {"eval_batch_size": 2}, {"num_workers": 1}, {"num_proc": 2}, {"packing": True},
        {"max_tokens_per_batch": 200}, {"group_by_length": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_change_the_result_is_not(tmp_path: Path, change: dict[str, Any]) -> None:
    ready(tmp_path)
    known = prepared(tmp_path / "cache")
    data = ready(tmp_path, **change)
    assert prepared(tmp_path / "cache") == known and len(known) == 1
    assert sorted(id for batch in data.train_dataloader() for id in batch["example_id"])


def test_the_place_of_the_cache_does_not_enter_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ready(tmp_path, cache_dir=str(tmp_path / "one"))
    monkeypatch.setenv("DEFT_LIGHTNING_CACHE", str(tmp_path / "two"))
    again = ready(tmp_path, cache_dir=None)
    monkeypatch.delenv("DEFT_LIGHTNING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "three"))
    ready(tmp_path, cache_dir=None)
    names = [set(prepared(tmp_path / name)) for name in ("one", "two", "three")]
    assert len(names[0]) == 1 and names[0] == names[1] == names[2]
    assert_same(batches(data), batches(again))


def test_a_tokenizer_whose_file_cuts_and_pads_is_prepared_for_once(tmp_path: Path) -> None:
    # Many a tokenizer.json says how its author cut and padded; it does not matter here, and must not matter to the key.
    folder = tokenizer(tmp_path, "tokenizer", 300)
    path = Path(folder) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }  # fmt: skip
    path.write_text(json.dumps(content))
    data = ready(tmp_path, tokenizer=folder)
    assert all(len(labels) > 6 for batch in data.train_dataloader() for labels in batch["labels"])
    assert len(prepared(tmp_path / "cache")) == 1
    ready(tmp_path, tokenizer=folder)
    assert len(prepared(tmp_path / "cache")) == 1


def test_using_the_tokenizer_between_two_stages_prepares_nothing_again(tmp_path: Path) -> None:
    data = ready(tmp_path, tokenizer=tokenizer(tmp_path, "tokenizer", 300))
    known = prepared(tmp_path / "cache")
    data.tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    data.prepare_data()
    data.setup("fit")
    assert prepared(tmp_path / "cache") == known


@pytest.mark.parametrize("name", ["{folder}", "{folder}[train]"])
def test_a_changed_file_of_a_folder_is_noticed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "folder").mkdir()
    source = name.format(folder=tmp_path / "folder")
    found = []
    for start in (0, 50):
        write(tmp_path / "folder" / "train.jsonl", rows(20, start=start))
        data = InstructionDataModule(source, **{**BASE, "cache_dir": str(tmp_path / "cache")})
        data.setup("fit")
        found.append({id for batch in batches(data) for id in batch["example_id"]})
    assert len(found[0]) == len(found[1]) == 20 and not found[0] & found[1]


# --- builds that are cut short, or two at once -----------------------------------------------------------------------

forks = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, which is safe on Linux")


def work(folder: Path, wait: float) -> None:
    """What a process does once it is told to go."""

    @dataclasses.dataclass(frozen=True)
    class Slow(ResponseNoise):  # here, so that no other test knows of it
        """Changes nothing, takes its time, and leaves a note of who is building."""

        rate: float = 1.0

        def edits(self, *args: Any) -> dict[int, list[Edit]]:
            with (folder / "notes").open("a") as notes:
                notes.write(f"{os.getpid()}\n")
            time.sleep(wait)
            return {}

    (folder / f"ready-{os.getpid()}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    data = ready(folder, noise=Noise(ops=[Slow()]))
    (folder / f"done-{os.getpid()}").write_bytes(pickle.dumps(batches(data)))


def start(folder: Path, wait: float) -> Any:
    process = multiprocessing.get_context("fork").Process(target=work, args=(folder, wait))
    process.start()
    return process


def wait_for(condition: Callable[[], Any], process: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.02)


def finished(folder: Path, process: Any) -> list[Any]:
    process.join(60)
    assert process.exitcode == 0
    found: list[Any] = pickle.loads((folder / f"done-{process.pid}").read_bytes())
    return found


def notes(folder: Path) -> list[str]:
    path = folder / "notes"
    return path.read_text().split() if path.exists() else []


@forks
def test_a_killed_build_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", rows(40))
    (tmp_path / "go").touch()
    killed = start(tmp_path, 60.0)
    wait_for(lambda: notes(tmp_path), killed)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    left = [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".arrow"]
    assert left and not list((tmp_path / "cache").rglob("meta.json"))  # it was in the middle
    found = finished(tmp_path, start(tmp_path, 0.0))
    assert len(set(notes(tmp_path))) == 2  # built again
    assert not [path for path in left if path.exists()]
    assert not list((tmp_path / "cache" / "data").glob(".*-*"))
    assert len(list((tmp_path / "cache").rglob("meta.json"))) == 1
    # All of it, as in a folder of its own.
    fresh = batches(ready(tmp_path, cache_dir=str(tmp_path / "fresh")))
    assert len({id for batch in fresh for id in batch["example_id"]}) == 40
    assert_same(found[: len(fresh)], fresh)
    assert_same(finished(tmp_path, start(tmp_path, 0.0)), found)
    assert len(set(notes(tmp_path))) == 2  # and that was used


@pytest.mark.slow
@forks
def test_of_two_that_prepare_at_once_one_builds_and_both_go_on(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", rows(40))
    both = [start(tmp_path, 0.5) for _ in range(2)]
    for process in both:
        wait_for((tmp_path / f"ready-{process.pid}").exists, process)
    (tmp_path / "go").touch()
    first, second = (finished(tmp_path, process) for process in both)
    assert_same(first, second)
    assert len(set(notes(tmp_path))) == 1 and len(prepared(tmp_path / "cache")) == 1


def test_an_error_while_preparing_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [*rows(30), {"question": "why?", "answer": ""}])
    with pytest.raises(UserError, match="row 31"):
        ready(tmp_path)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock" and path.is_file()]
    write(tmp_path / "rows.jsonl", rows(30))
    assert len(batches(ready(tmp_path))) > 3


# --- places that cannot be written, and runs that leave nothing ------------------------------------------------------


def unwritable(folder: Path, kind: str) -> Path:
    if kind == "a file":
        (folder / "taken").write_text("")
        return folder / "taken"
    if kind == "below a file":
        (folder / "taken").write_text("")
        return folder / "taken" / "cache"
    if kind == "/proc":
        if not Path("/proc/self").exists():
            pytest.skip("there is no /proc here")
        return Path("/proc/deft_lightning")
    (folder / "locked").mkdir(mode=0o555)
    if os.access(folder / "locked", os.W_OK):
        pytest.skip("this user may write everywhere")
    return folder / "locked"


@pytest.mark.parametrize("kind", ["a file", "below a file", "/proc", "read-only"])
def test_a_folder_that_cannot_be_written_is_one_line_that_names_the_option(tmp_path: Path, kind: str) -> None:
    place = unwritable(tmp_path, kind)
    with pytest.raises(UserError) as caught:
        ready(tmp_path, cache_dir=str(place))
    message = str(caught.value)
    assert "--data.cache_dir" in message and str(place) in message and len(message.splitlines()) == 1


@pytest.mark.slow
def test_without_a_cache_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("DEFT_LIGHTNING_CACHE", str(tmp_path / "home"))
    data = ready(tmp_path, cache=False, cache_dir=None)
    assert len(prepared(tmp_path / "temporary")) == 1  # once, not once a stage
    data.setup("test")
    assert len(batches(data)) > 5 and len(prepared(tmp_path / "temporary")) == 1
    expected = batches(ready(tmp_path))
    assert_same(batches(data), expected)
    del data
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir()) and not (tmp_path / "home").exists()


# --- what is in it ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_number_of_processes_leaves_every_byte_the_same(tmp_path: Path) -> None:
    content = rows(1300)
    write(tmp_path / "rows.jsonl", content)
    noise = Noise(splits=["train", "validation"], ops=[ResponseSwap(0.3), TokenReplace(0.1)])
    found = []
    for count in (1, 2):
        ready(tmp_path, num_proc=count, noise=noise, cache_dir=str(tmp_path / f"cache{count}"), max_length=16)
        (folder,) = (path.parent for path in (tmp_path / f"cache{count}").rglob("meta.json"))
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        found.append((folder.name, files))
    assert found[0] == found[1]
    assert {"train.arrow", "validation.arrow", "validation_noisy.arrow"} <= set(found[0][1])


SPOIL: dict[str, Callable[[Path], Any]] = {
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "empty meta": lambda folder: (folder / "meta.json").write_text(""),
    "half a table": lambda folder: os.truncate(folder / "train.arrow", (folder / "train.arrow").stat().st_size // 2),
    "an empty table": lambda folder: (folder / "train.arrow").write_bytes(b""),
    "no table": lambda folder: (folder / "train.arrow").unlink(),
    "no counts": lambda folder: (folder / "counts.npy").unlink(),
    "no tokenizer": lambda folder: shutil.rmtree(folder / "tokenizer"),
}


@pytest.mark.slow
@pytest.mark.parametrize("spoil", SPOIL.values(), ids=SPOIL.keys())
def test_what_was_damaged_is_made_again_or_said_in_one_line(tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    expected = batches(ready(tmp_path))
    gc.collect()  # the tables are mapped: a file that shrinks under a reader ends the process
    (folder,) = (path.parent for path in (tmp_path / "cache").rglob("meta.json"))
    spoil(folder)
    try:
        again = ready(tmp_path)
    except UserError as error:
        assert str(folder.parent) in str(error) and len(str(error).splitlines()) == 1
        return
    assert_same(batches(again), expected)


@pytest.mark.slow
def test_a_table_is_mapped_and_travels_to_workers_as_its_path(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [{"question": f"q{i}", "answer": f"{i} " + "word " * 150} for i in range(3000)])
    ready(tmp_path, validation_fraction=0.0, max_length=1024, tokenizer_size=0)
    (path,) = (tmp_path / "cache").rglob("train.arrow")
    assert path.stat().st_size > 5_000_000
    before = pa.total_allocated_bytes()
    table = Tokens(path)
    lengths = table.lengths()
    assert pa.total_allocated_bytes() - before < 100_000
    sent = pickle.dumps(table)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert len(again) == 3000 and (again.lengths() == lengths).all() and again[17].id == table[17].id
    assert (again[-1].input_ids == table[2999].input_ids).all()
    with pytest.raises(IndexError):
        table[3000]
