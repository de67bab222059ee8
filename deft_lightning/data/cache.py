"""Prepared data on disk, under a key of everything that changes it; there whole, or not there."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from deft_lightning.errors import UserError
from deft_lightning.hashing import key

# Files up to this size are known by their content, larger ones by path, size and time of change: reading them again
# to find out would take as long as it saves.
HASHED = 1 << 28
DONE = "meta.json"
FILES = "files.json"


def cache_root(choice: str | None) -> Path:
    """Return the folder of caches: the choice, ``$DEFT_LIGHTNING_CACHE``, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    named = choice or os.environ.get("DEFT_LIGHTNING_CACHE") or f"{home}/deft_lightning"
    return Path(named).expanduser()


def file_identity(path: Path) -> str:
    """Return what a file is known by: a hash of its content, or path, size and time of change if it is large."""
    found = path.stat()
    if found.st_size > HASHED:
        return f"{path.resolve()}:{found.st_size}:{found.st_mtime_ns}"
    with path.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def source_identity(source: str) -> str:
    """Return what a source is known by beside its name: the content of its files, nothing for the hub and tasks."""
    name = re.sub(r"\?\w+=.*$", "", source) if not source.startswith("reasoning_gym:") else source
    for choice in (source, name, re.sub(r"\[[^\]]*\]$", "", name)):
        path = Path(choice).expanduser()
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        if not path.exists() and glob.has_magic(choice):
            files = sorted(map(Path, glob.glob(str(path), recursive=True)))
        found = [(str(file), file_identity(file)) for file in files if file.is_file()]
        if found:
            return repr(found)
    return ""


def cached(root: Path, parts: list[object], build: Callable[[Path], None]) -> Path:
    """Return the folder of a key, built if it is not there.

    One process builds, others wait for it and take what it built. The folder gets its name when it is complete, so a
    build that is killed leaves nothing that is ever used; what it left is removed by the next one. A folder of which
    a file is missing or shorter than it was is built again.

    Args:
        root: Folder of caches.
        parts: Everything that changes the result.
        build: Fills the folder it is given.

    Raises:
        UserError: The folder cannot be written.
    """
    name = f"{key(*parts):032x}"
    target = root / name
    try:
        if _whole(target):
            return target
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f"{name}.lock")
        with lock:
            if _whole(target):
                return target
            for left in root.glob(f".{name}-*"):
                shutil.rmtree(left, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
            try:
                build(partial)
                _seal(partial)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{root}: cannot keep prepared data there: {error} (--data.cache_dir)") from None
    return target


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / FILES)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _seal(folder: Path) -> None:
    (folder / FILES).write_text(json.dumps(_sizes(folder)), encoding="utf-8")


def _whole(folder: Path) -> bool:
    try:
        known = json.loads((folder / FILES).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return bool(known == _sizes(folder))
