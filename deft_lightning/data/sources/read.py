"""Where records come from: files, folders, the hub, tasks generated on the spot, and mixtures of them."""

from __future__ import annotations

import glob
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from deft_lightning.data.sources.columnar import without_fill
from deft_lightning.data.sources.files import read_file, suffix
from deft_lightning.data.sources.folders import SPLITS, split_files
from deft_lightning.data.sources.generated import read_task
from deft_lightning.data.sources.given import GivenRows, Settled
from deft_lightning.data.sources.layouts import Expected, is_conversation
from deft_lightning.data.sources.places import is_address, read_address, without_scheme
from deft_lightning.data.sources.remarks import OnRemark, Remark, SayOnce
from deft_lightning.data.sources.rows import BadRows, Located, RowError
from deft_lightning.data.sources.trees import assembled
from deft_lightning.errors import UserError, did_you_mean, reason_of
from deft_lightning.hashing import key, uniform

__all__ = ["BadRows", "Located", "OnBadRow", "read", "read_many", "weights"]

OnBadRow = Callable[[UserError], None]
ANY = Expected()
OPTIONS = ("split", "subset", "streaming", "limit")


def read(
    source: str | GivenRows,
    *,
    subset: str | None = None,
    split: str = "train",
    streaming: bool = False,
    limit: int | None = None,
    on_bad_row: OnBadRow | None = None,
    expected: Expected = ANY,
    on_remark: OnRemark | None = None,
) -> Located:
    """Yield ``(where, record)`` of every row, where being "file, row N" (from 1) for messages.

    Args:
        source: A file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow; text also as .gz, .bz2, .xz or .zst), a
            folder or a pattern such as ``data/*.jsonl`` (files in order of name), a hub id, or
            ``reasoning_gym:<task>[?option=value&...]``. All but the last take the options below behind a question
            mark, which then win: ``org/name?subset=main&split=test&streaming=true&limit=1000``. ``hub:org/name`` is a
            hub id although there is a folder of that name. Or rows that were handed over.
        subset: Configuration name of a hub dataset.
        split: Split of a hub dataset or folder; ``name[test]`` as the source names another one. In a folder, names of
            files say it (``train-00000.parquet``, ``test/rows.jsonl``); where none does, all are ``train``.
        streaming: Read a hub dataset over the network without storing it. Files are never loaded as a whole.
        limit: Only the first rows, bad ones counted; at least 1.
        on_bad_row: Told of a row that is no record, which is then left out; default: raise. What spoils the rest of a
            file, such as compression that is cut short, is raised all the same.
        expected: What the rows are expected to be: a ``.json`` of one such row is that row, and separators that give
            such a header are taken.
        on_remark: Told of what was decided about a file; default: the first of each kind is said.

    Raises:
        UserError: The source does not exist, is empty or cannot be read.
    """
    if isinstance(source, GivenRows):
        located = source.read()
    else:
        name, own = options_of(source)
        settings = {"subset": subset, "split": split, "streaming": streaming, "limit": limit, **own}
        limit = settings.pop("limit")
        located = _open(name, expected=expected, **settings)
    if limit is not None and limit < 1:
        raise UserError(f"{source}: limit must be at least 1, got {limit} (--data.source)")
    located = assembled(located, expected)
    on_remark = SayOnce() if on_remark is None else on_remark
    number = 0
    for where, record in located:
        if isinstance(record, Remark):
            on_remark(record)
            continue
        number += 1
        if not isinstance(record, RowError):
            # A list of turns has no name that it could be known by.
            yield where, {"messages": record} if is_conversation(record) else record
        elif on_bad_row is None:
            raise record
        else:
            on_bad_row(record)
        if number == limit:
            return
    if not number:
        raise UserError(f"{source}: is empty (--data.source)")


def weights(source: Settled) -> dict[str | GivenRows, float]:
    """Return sources with their weights: 1 for each that is named once, and for rows that were handed over.

    Raises:
        UserError: There is none, or a weight is not a finite number of at least 0.
    """
    if isinstance(source, GivenRows):
        return {source: 1.0}
    if isinstance(source, str):
        source = [source]
    shares = source if isinstance(source, Mapping) else {name: float(list(source).count(name)) for name in source}
    for name, weight in shares.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise UserError(f"--data.source: the weight of {name} must be a number of at least 0, got {weight!r}")
    if not any(shares.values()):
        raise UserError("--data.source: no source has a weight above 0")
    return dict(shares.items())


def read_many(
    source: Settled,
    *,
    subset: str | None = None,
    split: str = "train",
    on_bad_row: OnBadRow | None = None,
    seed: int = 0,
    expected: Expected = ANY,
    on_remark: OnRemark | None = None,
) -> Iterator[tuple[str, Any, str]]:
    """Yield ``(where, record, source)`` of several sources, one after the other, each weighted by its rows.

    A weight of 1 gives every row once. Its whole part is how often every row comes, one repeat behind the other; a hash
    of a row's content against the fractional part decides whether it comes once more. So the choice depends on no
    order, is the same in every process, and grows with the weight: what 0.3 gives is among what 0.5 gives. A share is
    met on average: 0.5 of n rows is n/2 give or take sqrt(n)/2, and equal rows are chosen together.

    Args:
        source: One source, several of weight 1, or the weight of each; a weight of 0 leaves a source out unopened.
        subset: As for :func:`read`.
        split: As for :func:`read`.
        on_bad_row: As for :func:`read`; told of every bad row of a source once, whatever the weight.
        seed: Of the choice.
        expected: As for :func:`read`.
        on_remark: As for :func:`read`.

    Raises:
        UserError: As for :func:`read` and :func:`weights`.
    """
    for name, weight in weights(source).items():
        repeats, share = int(weight), weight - int(weight)
        if not weight:
            continue
        for where, record in read(
            name, subset=subset, split=split, on_bad_row=on_bad_row, expected=expected, on_remark=on_remark
        ):
            once_more = share > 0 and uniform(seed, "mix", _digest(record)) < share
            for _ in range(repeats + once_more):
                yield where, record, str(name)


def _digest(record: Any) -> int:
    try:
        return key(json.dumps(record, sort_keys=True, default=repr))
    except (RecursionError, TypeError):
        return key(repr(type(record)))  # the normaliser will refuse it; here it only has to be passed on


# --- which source it is ---------------------------------------------------------------------------------------------


def options_of(source: str) -> tuple[str, dict[str, Any]]:
    """Split off ``?option=value&...``; a question mark without one belongs to a pattern."""
    name, _, query = source.rpartition("?")
    if not name or source.startswith("reasoning_gym:") or not re.fullmatch(r"\w+=[^&]*(&\w+=[^&]*)*", query):
        return source, {}
    options: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
    if is_address(source) and not options.keys() <= set(OPTIONS):
        return source, {}  # a query of its own
    for option, value in options.items():
        if option not in OPTIONS:
            raise UserError(
                f"{source}: no such option {option!r}.{did_you_mean(option, OPTIONS)} Known: {', '.join(OPTIONS)}"
                " (--data.source)"
            )
        if option == "streaming":
            if value.lower() not in ("true", "false"):
                raise UserError(f"{source}: streaming must be true or false, got {value!r} (--data.source)")
            options[option] = value.lower() == "true"
        elif option == "limit":
            if not re.fullmatch(r"\d{1,18}", value):
                raise UserError(f"{source}: limit must be a whole number, got {value!r} (--data.source)")
            options[option] = int(value)
    return name, options


def address_of(source: str) -> str | None:
    """Return the address that a source is, without its options and its split; None if it is none."""
    return named_split(options_of(source)[0])[0] if is_address(source) else None


def named_split(source: str) -> tuple[str, str | None]:
    """Split off ``[split]`` of a source without options and scheme, None where it names no split.

    Brackets around anything else belong to a pattern: of an address, and of a name that files here have.
    """
    if is_address(source):
        found = re.fullmatch(r"([^*?\[\]]+)\[(\w+)\]", source)
        return (found[1], found[2]) if found and found[2] in SPLITS else (source, None)
    found = re.fullmatch(r"(.+)\[([\w.:%+-]+)\]", source)
    named = found is not None and not exists(source) and not glob.glob(os.path.expanduser(source))
    return (found[1], found[2]) if found is not None and named else (source, None)


def _open(source: str, expected: Expected, subset: str | None, split: str, streaming: bool) -> Located:
    if source.startswith("reasoning_gym:"):
        return read_task(source)
    source, named = named_split(source if is_address(source) else without_scheme(source))
    split = named or split
    if is_address(source):
        return read_address(source, split, expected)
    if source.startswith("hub:"):
        return _datasets(source.removeprefix("hub:"), subset, split, streaming)
    path = Path(source).expanduser()
    if exists(source) and path.is_file():
        return read_file(path, expected=expected)
    if exists(source) and path.is_dir():
        files = [] if subset or not split.isidentifier() else split_files(path, split)
        return _files(files, expected) if files else _datasets(str(path), subset, split, streaming)
    if glob.has_magic(source):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = [file for file in matches if not file.is_dir()]
        if not files:
            raise UserError(f"{source}: no file matches the pattern (--data.source)")
        return _files(files, expected)
    if exists(source):
        return read_file(path, expected=expected)  # a pipe or a device, which it refuses
    # "data/rows.txt" reads like a hub id, unless there is such a folder here.
    beside = len(path.parts) > 1 and path.parent.is_dir()
    if _looks_like_hub_id(source) and not beside:
        return _datasets(source, subset, split, streaming)
    raise UserError(f"{source}: no such file or folder (--data.source)")


def exists(source: str) -> bool:
    """Return whether there is such a file or folder."""
    try:
        return Path(source).expanduser().exists()
    except OSError as error:  # a name too long for the file system, a folder that may not be entered
        raise UserError(f"{source[:200]}: cannot be looked up ({error.strerror}) (--data.source)") from None


def _looks_like_hub_id(source: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) is not None and not suffix(Path(source))


def _files(files: Sequence[Path], expected: Expected) -> Located:
    for file in files:
        yield from read_file(file, expected=expected)


# --- the hub ---------------------------------------------------------------------------------------------------------


def _datasets(source: str, subset: str | None, split: str, streaming: bool) -> Located:
    from datasets import load_dataset

    def failed(error: Exception) -> UserError:  # datasets raises a dozen kinds; each first line says what is wrong
        reason = reason_of(error)
        return UserError(
            f"{source}: no such file, and loading it as a dataset failed: {reason}"
            " (--data.source, --data.subset, --data.split)"
        )

    number = 0
    try:
        rows = iter(load_dataset(source, subset, split=split, streaming=streaming))
    except Exception as error:
        raise failed(error) from None
    while True:
        try:
            record = next(rows)
        except StopIteration:
            return
        except Exception as error:  # the network goes while rows come over it
            raise UserError(f"{source}[{split}], after row {number}: {failed(error)}") from None
        number += 1
        yield f"{source}[{split}], row {number}", {name: without_fill(value) for name, value in record.items()}
