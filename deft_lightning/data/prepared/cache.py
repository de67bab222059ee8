"""Prepared data on disk, under a key of everything that changes it; there whole and as it was written, or not there."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import secrets
import signal
import stat
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout
from lightning_utilities.core.rank_zero import rank_zero_warn

from deft_lightning.atomic import is_partial, partial_name, remove, sweep
from deft_lightning.data.sources.files import suffix
from deft_lightning.data.sources.given import GivenRows
from deft_lightning.data.sources.places import identity, state, without_scheme
from deft_lightning.data.sources.read import address_of
from deft_lightning.errors import UserError
from deft_lightning.hashing import key

# Files up to this size are known by their content, larger ones by path, size and time of change: reading them again
# to find out would take as long as it saves.
HASHED = 1 << 28
DONE = "meta.json"
TEMPORARY = "deft_lightning"  # how names of temporary folders begin
FILES = "files.json"  # digest of every file beside it, and of itself
_verified: dict[Path, Any] = {}  # folder to the state of its files when they were last found whole
_swept: set[Path] = set()


def cache_root(choice: str | None) -> Path:
    """Return the folder of caches: the choice, ``$DEFT_LIGHTNING_CACHE``, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    named = choice or os.environ.get("DEFT_LIGHTNING_CACHE") or f"{home}/deft_lightning"
    return Path(named).expanduser()


def file_identity(path: Path) -> str:
    """Return what a file is known by: a hash of its content, or path, size and time of change if it is large."""
    known = path.stat()
    if known.st_size > HASHED:
        return f"{path.resolve()}:{known.st_size}:{known.st_mtime_ns}"
    with path.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def source_identity(source: str | GivenRows) -> str:
    """Return what a source is known by beside its name: its content, or what its place says; nothing for the hub."""
    if isinstance(source, GivenRows):
        return source.digest
    if (address := address_of(source)) is not None:
        return identity(address)
    contents = [(str(file), file_identity(file)) for file in source_files(source)]
    return repr(contents) if contents else ""


def source_state(sources: Iterable[str | GivenRows]) -> list[tuple[Any, ...]]:
    """Return what tells that somebody wrote to the files of sources: size, time of change and number of each."""
    sources = list(sources)
    addresses = [address_of(source) for source in sources if isinstance(source, str)]
    elsewhere: list[tuple[Any, ...]] = [part for address in addresses if address for part in state(address)]
    files = [file for source in sources for file in source_files(source) if suffix(file)]
    # What is prepared right now may lie below a folder that is a source.
    known = [(str(file), file.stat()) for file in files if not any(map(is_partial, file.parents))]
    return [*elsewhere, *((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in known)]


def source_files(source: str | GivenRows) -> list[Path]:
    """Return the files that a source names, in order of name; none of the hub, of tasks, and of rows handed over."""
    if isinstance(source, GivenRows):
        return []
    source = without_scheme(source)
    name = re.sub(r"\?\w+=.*$", "", source) if not source.startswith("reasoning_gym:") else source
    for choice in (source, name, re.sub(r"\[[^\]]*\]$", "", name)):
        path = Path(choice).expanduser()
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        if not path.exists() and glob.has_magic(choice):
            files = sorted(map(Path, glob.glob(str(path), recursive=True)))
        if present := [file for file in files if file.is_file()]:
            return present
    return []


def cached(root: Path, parts: list[object], build: Callable[[Path], None]) -> Path:
    """Return the folder of a key, built if it is not there.

    One process builds, others wait for it and take what it built. The folder gets its name when it is complete, so a
    build that is killed leaves nothing that is ever used; what it left, of this key or another, is removed by the next
    process that looks here. SIGTERM ends a build as an exception does. A folder in which any file is not as it was
    written is built again, and one line says so; a process looks at the content of a folder once.

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
        if root not in _swept:
            _swept.add(root)
            _sweep(root)
            sweep(Path(tempfile.gettempdir()), f".{TEMPORARY}-*")
        if _intact(target):
            return target
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f"{name}.lock")
        with lock, _ended_by_sigterm():
            try:
                if not _intact(target, warn=True):
                    _build(target, build)
            finally:
                # While it is held: who waits for it makes it anew. Of two that build all the same one is refused.
                with suppress(OSError):
                    os.unlink(lock.lock_file)
    except OSError as error:
        raise UserError(f"{root}: cannot keep prepared data there: {error} (--data.cache_dir)") from None
    return target


def _build(target: Path, build: Callable[[Path], None]) -> None:
    sweep(target.parent)
    remove(target)
    partial = partial_name(target)
    remove(partial)
    try:
        partial.mkdir()
        build(partial)
        _seal(partial)
        try:
            partial.rename(target)
        except OSError:
            if not _intact(target):
                raise
    finally:
        remove(partial)


def _sweep(root: Path) -> None:
    sweep(root)
    for path in root.glob("*.lock"):
        with suppress(Timeout, OSError), FileLock(path, timeout=0):
            path.unlink()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block by an exception, unless somebody listens to it or this is not the main thread."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)  # the status that a shell gives it

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Temporary:
    """A folder that is removed with this object, or by a later process if this one is killed.

    Attributes:
        path: The folder; nobody else may enter it.
    """

    def __init__(self) -> None:
        place = Path(tempfile.gettempdir())
        self.path = partial_name(place / f"{TEMPORARY}-{secrets.token_hex(4)}")
        self.path.mkdir(mode=0o700)
        self._finalizer = weakref.finalize(self, remove, self.path)


# --- whether a folder is as it was written ---------------------------------------------------------------------------


def _state(folder: Path) -> dict[str, os.stat_result]:
    """Return every file below a folder; links and whatever else is no file too, but nothing behind a link."""
    states = {}
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for path in (Path(place, name) for name in (*names, *links)):
            states[path.relative_to(folder).as_posix()] = path.lstat()
    return states


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _signed(files: dict[str, str]) -> dict[str, Any]:
    return {"files": files, "digest": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()}


def _seal(folder: Path) -> None:
    files = {name: _digest(folder / name) for name in sorted(_state(folder))}
    (folder / FILES).write_text(json.dumps(_signed(files), indent=1), encoding="utf-8")


def _intact(folder: Path, *, warn: bool = False) -> bool:
    """Return whether a folder is as it was written; if asked to, warn of the file that is not."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    state = _state(folder)
    times = {name: (known.st_size, known.st_mtime_ns, known.st_ctime_ns, known.st_ino) for name, known in state.items()}
    if _verified.get(folder) == times:
        return True
    damaged = _damaged(folder, state)
    if damaged is None:
        _verified[folder] = times
    elif warn:
        rank_zero_warn(f"{folder / damaged}: has changed since it was written; the data is prepared again")
    return damaged is None


def _damaged(folder: Path, state: dict[str, os.stat_result]) -> str | None:
    """Return the name of a file that is not as it was written, or None."""
    # Only names that are found in the folder are opened, and only ordinary files.
    if odd := [name for name, known in state.items() if not stat.S_ISREG(known.st_mode)]:
        return odd[0]
    try:
        content = (folder / FILES).read_text(encoding="utf-8")
        files: Any = json.loads(content)["files"]
        if content != json.dumps(_signed(files), indent=1):
            return FILES
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        return FILES
    names = state.keys() - {FILES}
    if not isinstance(files, dict) or (odd := sorted(names ^ files.keys())):
        return odd[0] if isinstance(files, dict) else FILES
    return next((name for name in sorted(names) if _digest(folder / name) != files[name]), None)
