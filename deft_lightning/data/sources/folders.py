"""Which files of a folder hold a split."""

from __future__ import annotations

import os
import re
from pathlib import Path

from deft_lightning.data.sources.files import suffix
from deft_lightning.errors import UserError

# How names of files say which split they hold, as on the hub.
SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
# What save_to_disk, map and the hub keep beside the rows.
BOOKKEEPING = re.compile(r"\..*|dataset_infos?\.json|dataset_dict\.json|state\.json|cache-.*\.arrow")


def split_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a split, in order of name; none if the folder holds no file that is read here."""
    splits: dict[Path, str | None] = {}
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
        for name in names:
            file = Path(place, name)
            if suffix(file) and not BOOKKEEPING.fullmatch(name):
                words = re.split(r"[\W_\d]+", str(file.relative_to(folder)).lower())
                # The file's own name counts before the folders that it is in.
                splits[file] = next((SPLITS[word] for word in reversed(words) if word in SPLITS), None)
    files = sorted(splits)
    named = {name for name in splits.values() if name}
    wanted = SPLITS.get(split, split)
    if not files or (not named and wanted == "train"):
        return files
    if wanted not in named:
        known = ", ".join(sorted(named)) or "train, since no file is named after a split"
        raise UserError(f"{folder}: has no file of the split {split!r}; it has {known} (--data.source, --data.split)")
    if unclear := [file for file in files if splits[file] is None]:
        raise UserError(
            f"{folder}: the name of {unclear[0].relative_to(folder)} says no split while others do; name the files with"
            f" a pattern, for example {folder}/*{suffix(unclear[0])} (--data.source)"
        )
    return [file for file in files if splits[file] == wanted]
