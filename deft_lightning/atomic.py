"""Files and folders that are there whole or not at all, and the removal of what a killed process left half-written.

Whether a result can be written is asked before the work that it takes: :func:`check_output`.

What is being written has the name ``.<target>.<machine>.<process>-<start of the process>``: whoever writes beside it
later can tell whether its writer still lives.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deft_lightning.errors import UserError

ELSEWHERE = 86_400  # seconds without a change after which another machine's unfinished work is taken for abandoned
OLD = ".replaced"  # ends the name of what makes room for a folder that is complete
MARK = re.compile(r"\..+\.(?P<machine>[^.]*)\.(?P<process>\d+)-(?P<start>\d+)")


def _machine() -> str:
    return re.sub(r"[^\w-]", "_", platform.node())  # a dot would end it


def _started(process: int) -> int:
    """Return when a process began, in ticks since the machine did; 0 where nobody can say."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def partial_name(target: Path) -> Path:
    """Return the name under which this process writes what shall become ``target``."""
    # A name may have 255 bytes at most, and the target's may need them all.
    stem = target.name.encode()[:150].decode(errors="ignore")
    return target.with_name(f".{stem}.{_machine()}.{os.getpid()}-{_started(os.getpid())}")


def is_partial(path: Path) -> bool:
    """Return whether a name is one of :func:`partial_name`."""
    return MARK.fullmatch(path.name) is not None


def replace_folder(partial: Path, target: Path) -> None:
    """Let a complete folder take the place of another one; :func:`sweep` mends what is killed between the two steps."""
    old = target.with_name(f".{target.name}{OLD}")
    if target.exists():
        remove(old)
        target.rename(old)
    partial.rename(target)
    remove(old)


def sweep(folder: Path, pattern: str = "*") -> list[Path]:
    """Remove what processes that are no more have left half-written in a folder.

    Of another machine, whose processes cannot be seen, only what nobody has touched for a day.

    Args:
        folder: Where to look, not below.
        pattern: Names to look at, in a folder that belongs to others too.

    Returns:
        What was removed.
    """
    removed = []
    for path in folder.glob(pattern) if folder.is_dir() else ():
        mark = MARK.fullmatch(path.name)
        if mark is not None and _abandoned(path, mark):
            with suppress(OSError):  # somebody else's
                remove(path)
            if not path.exists():
                removed.append(path)
        elif path.name.startswith(".") and path.name.endswith(OLD):
            target = path.with_name(path.name.removeprefix(".").removesuffix(OLD))
            if target.exists():
                remove(path)
                removed.append(path)
            else:  # killed between two renames: the one before is the newest that is whole
                path.rename(target)
    return removed


def _abandoned(path: Path, mark: re.Match[str]) -> bool:
    if mark["machine"] != _machine():
        with suppress(OSError):
            newest = max(part.stat().st_mtime for part in (path, *path.rglob("*")))
            return time.time() - newest > ELSEWHERE
        return False
    process, start = int(mark["process"]), int(mark["start"])
    if start:
        return _started(process) != start
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole_file(target: Path, *, sync: bool = False) -> Iterator[Path]:
    """Give a file to write, which takes the place of ``target`` at the end of the block; after an error nothing does.

    Args:
        target: Name it gets; its folder is made if it is not there, and swept.
        sync: Wait until the content is on the disk, so that a loss of power leaves the old file or the new one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    partial = partial_name(target)
    try:
        yield partial
        if sync:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which gets the name ``target`` at the end of the block; after an error it is gone.

    Args:
        target: Name it gets. An empty folder of that name makes room; one that is not empty is an ``OSError``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    partial = partial_name(target)
    remove(partial)
    partial.mkdir()
    try:
        yield partial
        partial.rename(target)
    finally:
        remove(partial)


def check_output(path: str | Path, option: str, *, make: bool = True) -> None:
    """Refuse a file or folder that could not be written.

    Args:
        path: What is to be written.
        option: Who named it, for the message.
        make: Make the folder that it is to lie in.

    Raises:
        UserError: It lies below a file, or nothing can be written there.
    """
    target = Path(path)
    probe = partial_name(target.with_name(f"{target.name}.try"))
    try:
        if make:
            target.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror or error})") from None


def check_output_file(path: str | Path, option: str, *, make: bool = True) -> None:
    """Refuse as :func:`check_output` does, and a folder of that name."""
    if Path(path).is_dir():
        raise UserError(f"{option} {path}: is a folder, not a file")
    check_output(path, option, make=make)
