"""Files and folders that are there whole or not at all, whoever else writes the same ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deft_lightning.atomic import whole_file, whole_folder


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


def write_json(target: Path, value: Any) -> None:
    """Write JSON; the file appears under its name once it is complete."""
    write_text(target, json.dumps(value, indent=1) + "\n")


def write_text(target: Path, content: str) -> None:
    """Write text; the file appears under its name once it is complete."""
    with whole_file(target) as partial:
        partial.write_text(content, encoding="utf-8")
