"""Splits and subsets: options of sources that have some, and no silence where none has."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from deft_lightning.data.sources.given import GivenRows
from deft_lightning.data.sources.places import is_address, without_scheme
from deft_lightning.data.sources.read import exists, options_of
from deft_lightning.errors import UserError


def check_choice(sources: Iterable[str | GivenRows], subset: str | None, split: str) -> None:
    """Refuse a subset or a split that no source has: all rows would be read.

    Args:
        sources: All that are read with these options.
        subset: Configuration name of a hub dataset.
        split: Split of a hub dataset or folder; ``train`` is the default, which every source has.

    Raises:
        UserError: None of the sources has one, or one that has none names it behind a question mark.
    """
    sources = list(sources)
    for source in sources:
        own = {} if isinstance(source, GivenRows) or _has_splits(source) else options_of(source)[1]
        for option in own.keys() & {"split", "subset"}:
            raise UserError(_line(f"{source}: {option} {own[option]}", source, option))
    if (subset or split != "train") and not any(map(_has_splits, sources)):
        option, value = ("subset", subset) if subset else ("split", split)
        raise UserError(_line(f"--data.{option} {value}", sources[0], option))


def _line(what: str, source: str | GivenRows, option: str) -> str:
    if isinstance(source, GivenRows) or source.startswith("reasoning_gym:"):
        return f"{what}: {source} has no {option}s"
    name = options_of(source)[0]
    return f"{what}: {name} has no {option}s; --data.source '{name}?limit=1000' reads its first 1000 rows"


def _has_splits(source: str | GivenRows) -> bool:
    if isinstance(source, GivenRows) or source.startswith("reasoning_gym:"):
        return False
    name = options_of(source)[0]
    if is_address(name):
        return True
    name = without_scheme(name)
    return not ("*" in name or (exists(name) and Path(name).expanduser().is_file()))
