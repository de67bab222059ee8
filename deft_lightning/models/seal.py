"""Checkpoints that tell whether a bit of them has changed: a digest of every byte, in the file or beside its shares.

A file is the zip archive that ``torch.save`` writes, with the SHA-256 of all bytes before it as the archive's comment;
``torch.load`` and every zip reader take it as it is. A folder has ``digests.sha256``, in the format of ``sha256sum``.
What other programs wrote has neither: of an archive the CRC of each member is verified then.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

MARK = b"deft_lightning sha256 "
COMMENT = len(MARK) + 64
END = 22  # bytes of the record that ends a zip archive; its last two are the length of the comment
DIGESTS = "digests.sha256"
CHUNK = 1 << 22

# What was verified in this process: path to size, time of change and file number.
_verified: dict[str, tuple[int, int, int]] = {}


class Damaged(Exception):
    """A file is not what was written; the message says where."""


class SealingFile:
    """A file that ``torch.save`` writes to, which digests what passes.

    Args:
        file: Empty file, open for reading and writing.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._held = b""  # the last two bytes so far, which :meth:`seal` replaces if they stay the last
        self._beside = ThreadPoolExecutor(1)  # digests a large part while it is written; both let other threads run

    def write(self, data: bytes) -> int:
        """Write bytes; return how many."""
        view = memoryview(data).cast("B")
        if len(view) >= 2:
            self._hash.update(self._held)
            self._held = bytes(view[-2:])
            for begin in range(0, len(view) - 2, CHUNK):
                self._both(bytes(view[begin : min(begin + CHUNK, len(view) - 2)]))
            self._file.write(self._held)
        else:
            held = self._held + bytes(view)
            self._hash.update(held[:-2])
            self._held = held[-2:]
            self._file.write(view)
        return len(view)

    def _both(self, part: bytes) -> None:
        """Digest a part, which must be a copy, while it is written: torch frees its own when a write fails."""
        if len(part) < CHUNK:
            self._hash.update(part)
            self._file.write(part)
            return
        digesting = self._beside.submit(self._hash.update, part)
        self._file.write(part)
        digesting.result()

    def flush(self) -> None:
        """Hand over what is buffered."""
        self._file.flush()

    def seal(self) -> None:
        """Write the digest as the comment of the archive."""
        assert self._held == b"\0\0", "torch.save has not written an archive without a comment"
        head = COMMENT.to_bytes(2, "little") + MARK
        self._hash.update(head)
        self._file.seek(-2, os.SEEK_END)
        self._file.write(head + self._hash.hexdigest().encode())
        self._beside.shutdown()


def check_sealed(path: Path) -> None:
    """Read a checkpoint file once and compare it with its digest, or with the CRCs of its members if it has none.

    Of a file that has not changed since, nothing is read again in this process.

    Raises:
        Damaged: It has changed since it was written, or is cut short; names the member if one is hit.
    """
    if _remembered(path):
        return
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        tail = _tail(file, size, END + COMMENT)
        sealed = tail.startswith(b"PK\5\6") and tail[END:].startswith(MARK)
        if sealed and _digest(file, size - 64).encode() != tail[-64:]:
            raise Damaged(_damaged_member(path) or "bytes between its members have changed")
        if not sealed and not (tail[-END:].startswith(b"PK\5\6") and tail[-2:] == b"\0\0"):
            raise Damaged("its end is missing or has changed")
    if not sealed and (member := _damaged_member(path)):
        raise Damaged(member)
    _remember(path)


def has_end(path: Path) -> bool:
    """Return whether a file ends as an archive does: a look at its last bytes, which says nothing of the others."""
    with path.open("rb") as file:
        tail = _tail(file, os.fstat(file.fileno()).st_size, END + COMMENT)
    return tail.startswith(b"PK\5\6") or tail[-END:].startswith(b"PK\5\6")


def _tail(file: IO[bytes], size: int, length: int) -> bytes:
    file.seek(max(size - length, 0))
    return file.read(length).rjust(length, b"\0")


def _digest(file: IO[bytes], length: int | None = None) -> str:
    """Return the SHA-256 of a file's first bytes, or of all of them."""
    sha = hashlib.sha256()
    file.seek(0)
    while length is None or length > 0:
        part = file.read(CHUNK if length is None else min(CHUNK, length))
        if not part:
            break
        sha.update(part)
        length = None if length is None else length - len(part)
    return sha.hexdigest()


def unbounded(archive: zipfile.ZipFile) -> str:
    """Return why the members of an archive could be larger than its file; nothing if they are not.

    ``torch.save`` compresses nothing. Members that lie over each other are read as often as they are listed.
    """
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        return "it is compressed, so it could unpack to any size"
    if sum(member.file_size for member in members) > os.stat(str(archive.filename)).st_size:
        return "its members overlap, so it could unpack to any size"
    return ""


def is_sealed(path: Path) -> bool:
    """Return whether a file ends with a digest."""
    with path.open("rb") as file:
        tail = _tail(file, os.fstat(file.fileno()).st_size, END + COMMENT)
    return tail.startswith(b"PK\5\6") and tail[END:].startswith(MARK)


def _damaged_member(path: Path) -> str:
    """Say which member of an archive does not have the CRC that it should; nothing if all have."""
    name = "archive"
    try:
        with zipfile.ZipFile(path) as archive:
            if why := unbounded(archive):
                return f"its list of members has changed ({why})"
            for member in archive.infolist():
                name = member.filename
                with archive.open(member) as content:
                    while content.read(CHUNK):
                        pass
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        return f"its member {name} has changed ({error})"
    return ""


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _remembered(path: Path) -> bool:
    return _verified.get(os.path.realpath(path)) == _state(path)


def _remember(path: Path) -> None:
    _verified[os.path.realpath(path)] = _state(path)


# --- folders of shares ---------------------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return _digest(file)


def write_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the digests of a folder's files, by name."""
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    (folder / DIGESTS).write_text(text, encoding="utf-8")


def read_digests(folder: Path) -> dict[str, str] | None:
    """Return the digests of a folder's files, by name; None where an earlier version or another program wrote none.

    Raises:
        Damaged: The list is not as it was written, or is not one of the files that are there.
    """
    try:
        text = (folder / DIGESTS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except ValueError:
        raise Damaged(f"{DIGESTS} has changed") from None
    digests = {line[66:]: line[:64] for line in text.splitlines()}
    if "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())) != text:
        raise Damaged(f"{DIGESTS} has changed")
    there = {path.name for path in folder.iterdir()} - {DIGESTS}
    if there != digests.keys():
        odd = sorted(there ^ digests.keys())[0]
        raise Damaged(f"{odd} is missing" if odd in digests else f"{odd} was not written with it")
    return digests


def check_folder(folder: Path, names: Iterable[str] | None = None) -> bool:
    """Compare the files of a folder with their digests.

    Args:
        folder: A checkpoint of shares.
        names: Compare these files alone; default: all.

    Returns:
        Whether there are digests to compare with.

    Raises:
        Damaged: A file has changed, is missing, or was added.
    """
    known = read_digests(folder)
    for name, digest in sorted((known or {}).items()):
        if names is not None and name not in names:
            continue
        if not _remembered(folder / name):
            if file_digest(folder / name) != digest:
                raise Damaged(f"{name} has changed")
            _remember(folder / name)
    return known is not None
