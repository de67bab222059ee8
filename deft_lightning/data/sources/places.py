"""Files at other places, by address: fetched whole, read as local ones are, known by what their place says of them.

Through fsspec. Only places that hold plain files are opened: what other protocols of fsspec read may name further
files, or templates that are run.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.atomic import partial_name, remove
from deft_lightning.data.sources.files import ANY, check_type, read_file, suffix
from deft_lightning.data.sources.folders import files_of_split
from deft_lightning.data.sources.layouts import Expected
from deft_lightning.data.sources.rows import Located
from deft_lightning.errors import UserError, did_you_mean, reason_of

# Protocol to the package that has to be there beside fsspec.
PLACES = {
    "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs",
    "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "sftp": "paramiko", "memory": "",
}  # fmt: skip
LOCAL = ("file", "local")
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
# What a place may say of the content of a file: a digest of it, or a number of its version.
MARKS = (
    "ETag", "etag", "Content-MD5", "md5Hash", "content_md5", "generation", "VersionId", "blob_id", "checksum",
)  # fmt: skip
TIMES = ("Last-Modified", "LastModified", "last_modified", "mtime", "modified", "modify", "created")
HASHED = 1 << 28  # bytes up to which a file without a mark is fetched to be known by its content
LARGE = 1 << 26  # bytes from which on fetching is said
PREFIX = "deft_lightning"  # how names of temporary folders begin, which the next process looks for

_known: dict[str, str] = {}  # address to its identity when it was last asked for


def is_address(source: str) -> bool:
    """Return whether a source names a place elsewhere, such as ``s3://bucket/rows.jsonl``."""
    return (match := ADDRESS.match(source)) is not None and match[1].lower() not in LOCAL


def without_scheme(source: str) -> str:
    """Return the path of a ``file://`` address; any other source as it is."""
    match = ADDRESS.match(source)
    if match is None or match[1].lower() not in LOCAL:
        return source
    path = re.sub(r"^localhost(?=/)", "", source[match.end() :])
    return path if Path(path).exists() else unquote(path)


def shown(address: str) -> str:
    """Return an address for messages: without names and passwords in front of the host, and without a query."""
    text = re.sub(r"://[^/@\s]*@", "://", address)
    return re.sub(r"\?[^\s'\")]*", "", text) if _is_http(address) else text


def _is_http(address: str) -> bool:
    return address.lower().startswith(("http://", "https://"))


def _path(address: str) -> PurePosixPath:
    """Return the part of an address that is a path: of a file on the web what stands before the question mark."""
    return PurePosixPath(unquote(urlsplit(address).path) if _is_http(address) else address.partition("://")[2])


# --- reading ---------------------------------------------------------------------------------------------------------


def read_address(address: str, split: str = "train", expected: Expected = ANY) -> Located:
    """Yield the rows of the files at an address: of one file, of a folder's split, or of a pattern.

    Args:
        address: With one of the protocols of :data:`PLACES`.
        split: Split of a folder, told by the names of its files.
        expected: What the rows are expected to be.

    Raises:
        UserError: The place cannot be reached, or there is no such file; names the address and the remedy.
    """
    for file in _files(address, split):
        with _fetched(file) as path:
            yield from read_file(path, shown(file), expected)


def _files(address: str, split: str | None) -> list[str]:
    """Return the addresses of the files that one stands for; those of every split without one."""
    with _failing(address):
        system, path = _opened(address)
        protocol = address.partition("://")[0]
        pattern = re.search(r"[*\[]" if _is_http(address) else r"[*?\[]", path)
        if pattern:
            places = sorted(place for place in system.glob(path) if suffix(_path(_whole(protocol, place))))
            if not places:
                raise UserError(f"{shown(address)}: no file matches the pattern (--data.source)")
            return [_whole(protocol, place) for place in places]
        # Whatever has the name of a file is one: to ask the web for a folder is to fetch a page.
        if suffix(_path(address)) or _is_http(address) or system.info(path)["type"] != "directory":
            check_type(shown(address), _path(address).name)
            return [address]
        below = {str(place)[len(path.rstrip("/")) + 1 :]: str(place) for place in system.find(path)}
        names = files_of_split(shown(address), sorted(PurePosixPath(name) for name in below), split)
        if not names:
            raise UserError(f"{shown(address)}: is a folder without files of rows (--data.source)")
        return [_whole(protocol, below[str(name)]) for name in names]


def _whole(protocol: str, place: str) -> str:
    return place if ADDRESS.match(place) else f"{protocol}://{place.lstrip('/')}"


@contextmanager
def _fetched(address: str) -> Iterator[Path]:
    """Give a copy of a file, which is removed at the end of the block, or by a later process if this one is killed."""
    folder = partial_name(Path(tempfile.gettempdir()) / f"{PREFIX}-{secrets.token_hex(4)}")
    folder.mkdir(mode=0o700)
    try:
        target = folder / f"rows{suffix(_path(address))}"
        with _failing(address):
            system, path = _opened(address)
            size = system.info(path).get("size")
            if size is not None and size > LARGE:
                rank_zero_info(f"{shown(address)}: fetching {size >> 20:,} MiB into {folder.parent}")
            system.get_file(path, str(target))
            if size is not None and target.stat().st_size != size:
                problem = f"{target.stat().st_size} of {size} bytes came"
                raise UserError(
                    f"{shown(address)}: {problem}: it changed during the download, or was cut short; try again"
                )
            _check_page(address, target)
        yield target
    finally:
        remove(folder)


def _check_page(address: str, file: Path) -> None:
    with file.open("rb") as content:
        start = content.read(200).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        hint = "; on the hub, use /resolve/ instead of /blob/" if "/blob/" in address else ""
        raise UserError(f"{shown(address)}: is a web page, not a file of rows{hint} (--data.source)")


# --- what a place says of a file --------------------------------------------------------------------------------------


def identity(address: str) -> str:
    """Return what the files at an address are known by: marks of their content, or else a hash of it.

    Of a file of more than :data:`HASHED` bytes without a mark it is size and time of change.

    Raises:
        UserError: The place cannot be reached.
    """
    known = []
    for file in _files(address, None):
        size, marks, times = _told(file)
        if not marks and (size is None or size <= HASHED or not times):
            with _fetched(file) as path, path.open("rb") as content:
                marks = [hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()]
        known.append((shown(file), size, marks or times))
    _known[address] = repr(known)
    return _known[address]


def last_identity(address: str) -> str:
    """Return the identity that was last asked for in this process, without asking the place again."""
    return _known.get(address, address)


def state(address: str) -> list[tuple[str, Any]]:
    """Return all that a place says of the files at an address, which changes when somebody writes to them."""
    return [(shown(file), _told(file)) for file in _files(address, None)]


def _told(address: str) -> tuple[int | None, list[str], list[str]]:
    with _failing(address):
        system, path = _opened(address)
        info = system.info(path)
        # A weak mark says that two contents mean the same, not that they are.
        marks = [f"{name} {info[name]}" for name in MARKS if info.get(name) and not str(info[name]).startswith("W/")]
        return info.get("size"), marks, [f"{name} {info[name]}" for name in TIMES if info.get(name)]


# --- fsspec -----------------------------------------------------------------------------------------------------------


def _opened(address: str) -> tuple[Any, str]:
    """Return the file system of an address, without what an earlier one remembers, and the path in it."""
    protocol = address.partition("://")[0].lower()
    if protocol not in PLACES:
        hint = did_you_mean(protocol, [*PLACES, *LOCAL])
        known = ", ".join(f"{name}://" for name in (*LOCAL[:1], *PLACES))
        raise UserError(f"{shown(address)}: unknown scheme {protocol}://.{hint} Known: {known} (--data.source)")
    if "::" in address:
        raise UserError(f"{shown(address)}: chained URLs (::) are not supported (--data.source)")
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    if _is_http(address):
        import aiohttp

        # Without a bound for the whole, which a large file may take; proxies as the environment names them.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
        # A server that packs on the way would hand out another file than the one that it names.
        options = {
            "client_kwargs": {"timeout": timeout, "trust_env": True}, "headers": {"Accept-Encoding": "identity"},
        }  # fmt: skip
    system, path = url_to_fs(address, skip_instance_cache=True, **options)
    return system, path


@contextmanager
def _failing(address: str) -> Iterator[None]:
    """Turn what any of a dozen packages raises into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        _refuse(address, error)


def _refuse(address: str, error: Exception) -> NoReturn:
    protocol = address.partition("://")[0].lower()
    # fsspec says that there is no such file whatever came between: why is in the cause.
    cause = error.__cause__ or error
    reason = shown_reason(reason_of(cause))
    if isinstance(cause, ImportError):
        package = PLACES[protocol]
        raise UserError(
            f"{shown(address)}: {protocol}:// needs the package {package}, which is not installed: pip install"
            f" {package} (--data.source)"
        ) from None
    if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
        raise UserError(f"{shown(address)}: there is no such file (--data.source)") from None
    raise UserError(
        f"{shown(address)}: cannot be fetched ({reason}); check URL, network and credentials, or download it "
        "and name the file (--data.source)"
    ) from None


def shown_reason(text: str) -> str:
    """Return a message without the passwords and signatures that addresses in it hold."""
    return re.sub(r"(https?://)(?:[^/@\s'\"]*@)?([^\s?'\")]*)(?:\?[^\s'\")]*)?", r"\1\2", text)
