"""Where records come from: files, folders, the hub, and tasks generated on the spot."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from deft_lightning.errors import UserError, did_you_mean

Located = Iterator[tuple[str, Any]]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read(source: str, *, subset: str | None = None, split: str = "train") -> Located:
    """Yield ``(where, record)`` of every row, where being "file, row N" (from 1) for messages.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, ``reasoning_gym:<task>[?option=value&...]``, a folder that
            ``datasets`` can load, or a hub id.
        subset: Configuration name of a hub dataset.
        split: Split of a hub dataset or folder.

    Raises:
        UserError: The source does not exist, is empty or cannot be read.
    """
    rows = _open(source, subset, split)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{source}: is empty (--data.source)")
    yield first
    yield from rows


def _open(source: str, subset: str | None, split: str) -> Located:
    if source.startswith("reasoning_gym:"):
        return _reasoning_gym(source)
    path = Path(source).expanduser()
    if path.is_file():
        readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise UserError(
                f"{source}: unknown file type {path.suffix!r}; known: {', '.join(SUFFIXES)} (--data.source)"
            )
        return reader(path)
    if path.is_dir() or _looks_like_hub_id(source):
        return _datasets(source, subset, split)
    raise UserError(f"{source}: no such file or folder (--data.source)")


def _looks_like_hub_id(source: str) -> bool:
    parts = source.split("/")
    return len(parts) <= 2 and all(parts) and not source.startswith((".", "~")) and not source.endswith(SUFFIXES)


def _jsonl(path: Path) -> Located:
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}, row {number}"
                try:
                    yield where, json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{where}: is not JSON ({error})") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _json(path: Path) -> Located:
    try:
        content = json.loads(path.read_text(encoding="utf-8") or "[]")
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not JSON ({error}); one object a line is .jsonl") from None
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise UserError(f"{path}: expected a list of rows, or an object that holds one list")
        content = lists[0]
    for number, record in enumerate(content, 1):
        yield f"{path}, row {number}", record


def _csv(path: Path) -> Located:
    # The default field limit of 128 KiB is shorter than some answers.
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        for number, record in enumerate(csv.DictReader(lines), 1):
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
    options = {key: yaml.safe_load(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    fields = {name: str(options.pop(name)).split(".") for name in ("question", "answer") if name in options}
    try:
        dataset = reasoning_gym.create_dataset(task, **{"size": 1000, "seed": 0, **options})
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{source}: {task} refuses these options: {error} (--data.source)") from None
    for number in range(len(dataset)):
        record = dataset[number]
        for name, path in fields.items():
            value: Any = record
            for part in path:
                value = value.get(part) if isinstance(value, dict) else None
            record[name] = value
        yield f"{source}, row {number + 1}", record
