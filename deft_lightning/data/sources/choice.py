"""Splits and subsets: options of sources that have some, and no silence where none has."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from deft_lightning.data.sources.files import suffix
from deft_lightning.data.sources.given import GivenRows
from deft_lightning.data.sources.places import is_address, without_scheme
from deft_lightning.data.sources.read import exists, named_split, options_of
from deft_lightning.errors import UserError


def check_choice(sources: Iterable[str | GivenRows], subset: str | None, split: str) -> None:
    """Refuse a subset or a split that no source has: all rows would be read.

    Args:
        sources: All that are read with these options.
        subset: Configuration name of a hub dataset.
        split: Split of a hub dataset or folder; ``train`` is the default, which every source has.

    Raises:
        UserError: None of the sources has one, or one that has none names it itself.
    """
    sources = list(sources)
    for source in sources:
        named = {} if isinstance(source, GivenRows) or _has_splits(source) else _named(source)
        for option, value in named.items():
            raise UserError(_line(f"{source}: {option} {value}", source, option))
    if (subset or split != "train") and not any(map(_has_splits, sources)):
        option, value = ("subset", subset) if subset else ("split", split)
        raise UserError(_line(f"--data.{option} {value}", sources[0], option))


def _line(what: str, source: str | GivenRows, option: str) -> str:
    if isinstance(source, GivenRows) or source.startswith("reasoning_gym:"):
        return f"{what}: {source} has no {option}s"
    name = _bare(source)[0]
    return f"{what}: {name} has no {option}s; '{name}?limit=1000' reads its first 1000 rows"


def _bare(source: str) -> tuple[str, str | None]:
    """Return a source without its scheme, its options and its ``[split]``, and that split."""
    name = options_of(source)[0]
    return named_split(name if is_address(name) else without_scheme(name))


def _named(source: str) -> dict[str, str]:
    """Return the subset and the split that a source names itself."""
    own = {option: value for option, value in options_of(source)[1].items() if option in ("split", "subset")}
    split = _bare(source)[1]
    named = own if split is None else {**own, "split": split}
    return {option: value for option, value in named.items() if (option, value) != ("split", "train")}


def _has_splits(source: str | GivenRows) -> bool:
    if isinstance(source, GivenRows) or source.startswith("reasoning_gym:"):
        return False
    name = _bare(source)[0]
    if is_address(name):
        return not (glob.has_magic(name) or suffix(PurePosixPath(name)))
    return not (glob.has_magic(name) or (exists(name) and Path(name).expanduser().is_file()))
