"""Where records come from: files, folders, the hub, and tasks generated on the spot."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from deft_lightning.errors import UserError, did_you_mean

Located = Iterator[tuple[str, Any]]
OnBadRow = Callable[[UserError], None]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read(
    source: str, *, subset: str | None = None, split: str = "train", on_bad_row: OnBadRow | None = None
) -> Located:
    """Yield ``(where, record)`` of every row, where being "file, row N" (from 1) for messages.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, ``reasoning_gym:<task>[?option=value&...]``, a folder that
            ``datasets`` can load, or a hub id.
        subset: Configuration name of a hub dataset.
        split: Split of a hub dataset or folder; ``name[test]`` as the source names another one.
        on_bad_row: Told of a line that is no record, which is then left out; default: raise.

    Raises:
        UserError: The source does not exist, is empty or cannot be read.
    """
    rows = _open(source, subset, split, on_bad_row)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{source}: is empty (--data.source)")
    yield first
    yield from rows


def _open(source: str, subset: str | None, split: str, on_bad_row: OnBadRow | None) -> Located:
    if source.startswith("reasoning_gym:"):
        return _reasoning_gym(source)
    if found := re.fullmatch(r"(.+)\[([\w.:%+-]+)\]", source):
        source, split = found[1], found[2]
    path = Path(source).expanduser()
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".jsonl":
            return _jsonl(path, on_bad_row)
        readers = {".json": _json, ".csv": _csv, ".parquet": _parquet}
        if suffix not in readers:
            raise UserError(
                f"{source}: unknown file type {path.suffix!r}; known: {', '.join(SUFFIXES)} (--data.source)"
            )
        return readers[suffix](path)
    # "data/rows.txt" reads like a hub id, unless there is such a folder here.
    beside = len(path.parts) > 1 and path.parent.is_dir()
    if path.is_dir() or (_looks_like_hub_id(source) and not beside):
        return _datasets(str(path) if path.is_dir() else source, subset, split)
    raise UserError(f"{source}: no such file or folder (--data.source)")


def _looks_like_hub_id(source: str) -> bool:
    parts = source.split("/")
    return len(parts) <= 2 and all(parts) and not source.startswith((".", "~")) and not source.endswith(SUFFIXES)


def _jsonl(path: Path, on_bad_row: OnBadRow | None) -> Located:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, row {number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: is not UTF-8 text ({error.reason})") from None
            except json.JSONDecodeError as error:
                problem = UserError(f"{where}: is not JSON ({error})")
                if on_bad_row is None:
                    raise problem from None
                on_bad_row(problem)
                continue
            yield where, record


def _json(path: Path) -> Located:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig") or "[]")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not JSON ({error}); one object a line is .jsonl") from None
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise UserError(f"{path}: expected a list of rows, or an object that holds one list")
        content = lists[0]
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of rows, or an object that holds one list")
    for number, record in enumerate(content, 1):
        yield f"{path}, row {number}", record


def _csv(path: Path) -> Located:
    # The default field limit of 128 KiB is shorter than some answers.
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        number, records = 0, csv.DictReader(lines)
        while True:
            number += 1
            try:
                record = next(records)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: is not UTF-8 text ({error.reason})") from None
            if None in record:
                raise UserError(f"{path}, row {number}: has more fields than the header")
            yield f"{path}, row {number}", record


def _parquet(path: Path) -> Located:
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except Exception as error:
        raise UserError(f"{path}: is not a parquet file ({error})") from None
    number = 0
    for batch in file.iter_batches():
        for record in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", record


def _datasets(source: str, subset: str | None, split: str) -> Located:
    from datasets import load_dataset

    try:
        rows = load_dataset(source, subset, split=split)
    except Exception as error:  # datasets raises a dozen kinds; each first line says what is wrong
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{source}: no such file, and loading it as a dataset failed: {reason}"
            " (--data.source, --data.subset, --data.split)"
        ) from None
    for number, record in enumerate(rows, 1):
        yield f"{source}[{split}], row {number}", record


def _reasoning_gym(source: str) -> Located:
    """Questions and answers of a reasoning_gym task.

    Options go to the task, but for ``question`` and ``answer``: they name another field of its rows to take instead,
    for example ``metadata.word``.
    """
    import reasoning_gym
    import yaml
    from reasoning_gym.factory import DATASETS

    task, _, query = source.removeprefix("reasoning_gym:").partition("?")
    if task not in DATASETS:
        raise UserError(f"{source}: reasoning_gym has no task {task!r}.{did_you_mean(task, DATASETS)} (--data.source)")
    try:
        options = {key: yaml.safe_load(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    except yaml.YAMLError as error:
        raise UserError(f"{source}: an option is no value: {error} (--data.source)") from None
    fields = {name: str(options.pop(name)).split(".") for name in ("question", "answer") if name in options}
    try:
        dataset = reasoning_gym.create_dataset(task, **{"size": 1000, "seed": 0, **options})
        size = len(dataset)
    except Exception as error:  # whatever the task's own code meets
        raise UserError(f"{source}: {task} refuses these options: {error} (--data.source)") from None
    for number in range(size):
        try:
            record = dataset[number]
        except Exception as error:
            raise UserError(f"{source}: {task} refuses these options: {error} (--data.source)") from None
        for name, path in fields.items():
            value: Any = record
            for part in path:
                value = value.get(part) if isinstance(value, dict) else None
            record[name] = value
        yield f"{source}, row {number + 1}", record
