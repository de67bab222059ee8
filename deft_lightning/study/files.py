"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill, which gets its name once it is filled; what a killed process left is removed."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    for old in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if target.exists():  # somebody else was faster: the content is the same
        shutil.rmtree(partial)
    else:
        partial.rename(target)


def write_json(target: Path, value: Any) -> None:
    """Write JSON; the file appears under its name once it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(target)
