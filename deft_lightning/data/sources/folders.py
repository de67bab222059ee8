"""Which files of a folder hold a split."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TypeVar

from deft_lightning.data.sources.files import suffix
from deft_lightning.errors import UserError

P = TypeVar("P", bound=PurePath)

# How names of files say which split they hold, as on the hub.
SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
# What save_to_disk, map and the hub keep beside the rows.
BOOKKEEPING = re.compile(r"\..*|dataset_infos?\.json|dataset_dict\.json|state\.json|cache-.*\.arrow")


def split_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a split, in order of name; none if the folder holds no file that is read here."""
    files: list[Path] = []
    seen = set()

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    for place, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(place)
        if real in seen:  # links may lead back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place, name).relative_to(folder) for name in names]
    return [folder / file for file in files_of_split(str(folder), sorted(files), split)]


def files_of_split(folder: str, names: Sequence[P], split: str | None) -> list[P]:
    """Return those of the files below a folder that hold a split; none if none of them is read here.

    Args:
        folder: Its name, for messages.
        names: The files, relative to it, in order.
        split: As the names of files and folders say it; None for all.

    Raises:
        UserError: No file is of the split, or some files say a split and others none.
    """
    splits: dict[P, str | None] = {}
    for file in names:
        hidden = any(part.startswith(".") for part in file.parts)
        if suffix(file) and not hidden and not BOOKKEEPING.fullmatch(file.name):
            words = re.split(r"[\W_\d]+", str(file).lower())
            # The file's own name counts before the folders that it is in.
            splits[file] = next((SPLITS[word] for word in reversed(words) if word in SPLITS), None)
    files = list(splits)
    named = {name for name in splits.values() if name}
    if not files or split is None:
        return files
    wanted = SPLITS.get(split, split)
    if not named and wanted == "train":
        return files
    if wanted not in named:
        known = ", ".join(sorted(named)) or "train, since no file is named after a split"
        raise UserError(f"{folder}: has no file of the split {split!r}; it has {known} (--data.source, --data.split)")
    if unclear := [file for file in files if splits[file] is None]:
        raise UserError(
            f"{folder}: the name of {unclear[0]} does not name a split, but other files do; choose the files "
            f"with a pattern, for example {folder}/*{suffix(unclear[0])} (--data.source)"
        )
    return [file for file in files if splits[file] == wanted]
