"""Short names of several sources, for the tags of figures by source."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePath

from deft_lightning.data.sources.files import suffix
from deft_lightning.data.sources.given import Settled
from deft_lightning.data.sources.places import is_address
from deft_lightning.data.sources.read import weights
from deft_lightning.data.sources.remarks import OnRemark, Remark

LONGEST = 40  # characters of a name
MOST = 32  # sources that figures are told apart by


def source_names(source: Settled) -> dict[str, str]:
    """Return the sources that are read, in the order in which they are named, each with its short name.

    The name is the stem of a file, the last part of a folder or a hub id, the task of reasoning_gym. Names that would
    be the same take the folder in front of them, then numbers. They hold letters, digits, ``.``, ``-`` and ``_`` alone.

    Args:
        source: One source or several; those of weight 0 are not read.

    Raises:
        UserError: As for :func:`~deft_lightning.data.sources.read.weights`.
    """
    named = [str(name) for name, weight in weights(source).items() if weight]
    names = [_name(name, 1) for name in named]
    shared = {name for name, count in Counter(names).items() if count > 1}
    names = [_name(full, 2) if name in shared else name for full, name in zip(named, names, strict=True)]
    taken: set[str] = set()
    result = {}
    for full, name in zip(named, names, strict=True):
        number, free = 1, name
        while free in taken:
            number += 1
            free = f"{name}_{number}"
        taken.add(free)
        result[full] = free
    return result


def told_apart(source: Settled, on_remark: OnRemark) -> list[str]:
    """Return the names that figures by source have in their tags; none for one source, and for more than 32.

    Args:
        source: One source or several.
        on_remark: Told when they are too many.
    """
    names = list(source_names(source).values())
    if len(names) > MOST:
        on_remark(Remark("by source", f"{len(names)} sources are more than {MOST}: there are no metrics by source"))
    return names if 1 < len(names) <= MOST else []


def _name(source: str, parts: int) -> str:
    """Return the last parts of a source without its options, its scheme and its endings."""
    bare = re.sub(r"\?\w+=.*$", "", source)
    for scheme in ("hub:", "reasoning_gym:"):
        bare = bare.removeprefix(scheme)
    if is_address(bare):
        bare = bare.partition("://")[2]
    split = re.search(r"\[(\w+)\]$", bare)
    bare = bare[: split.start()] if split else bare
    bare = bare[: len(bare) - len(suffix(PurePath(bare)))]
    # Of a pattern what stands still: "data/*.jsonl" is "data".
    places = [part for part in map(_safe, re.split(r"[/\\]+", bare)) if part]
    name = "_".join(places[-parts:]) or "source"
    return f"{name}_{split[1]}"[-LONGEST:] if split else name[-LONGEST:]


def _safe(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text).strip("._-")
