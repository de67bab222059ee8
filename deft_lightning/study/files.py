"""Files and folders that are there whole or not at all, whoever else writes the same ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from deft_lightning.atomic import whole_file, whole_folder
from deft_lightning.data.prepared.cache import source_identity


@contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill, which gets its name once it is filled; what killed processes left is removed."""
    filled = False
    try:
        with whole_folder(target) as partial:
            yield partial
            filled = True
    except OSError:
        if not (filled and target.is_dir() and any(target.iterdir())):
            raise
        # Somebody else was faster: the content is the same.


def write_json(target: Path, value: object) -> None:
    """Write JSON; the file appears under its name once it is complete."""
    write_text(target, json.dumps(value, indent=1) + "\n")


def write_text(target: Path, content: str) -> None:
    """Write text; the file appears under its name once it is complete."""
    with whole_file(target) as partial:
        partial.write_text(content, encoding="utf-8")


@lru_cache
def files_of(*sources: str) -> str:
    """Return a hash of the content of the files that sources name; empty where there are none: a hub id, a task."""
    identities = [source_identity(source) if source else "" for source in sources]
    return digest(identities) if any(identities) else ""


def file_name(text: str) -> str:
    """Return a text as a name of a file or folder."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in text).strip("_")


def digest(value: object) -> str:
    """Return a hash of a value made of plain types."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
