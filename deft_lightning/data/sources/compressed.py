"""Compressed files as streams of bytes, in bounded memory however they were made."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from pathlib import Path
from typing import IO, Any, cast

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
WINDOW = 1 << 28  # bytes that the window of an .xz file may take; its strongest setting takes 65 MiB
BLOCK = 1 << 16


def opened(path: Path) -> IO[bytes]:
    """Open a file for reading, unpacked if its name says that it is compressed.

    Raises:
        OSError, EOFError, zlib.error, lzma.LZMAError: On opening or later: it is damaged, or cut short.
    """
    kind = path.suffix.lower()
    if kind == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if kind == ".bz2":
        return bz2.open(path, "rb")
    if kind == ".xz":
        return io.BufferedReader(_Xz(path), BLOCK)
    if kind == ".zst":
        import pyarrow as pa

        return cast(IO[bytes], pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


class _Xz(io.RawIOBase):
    """The streams of an .xz file, one behind the other.

    ``lzma.open`` sets no bound to the memory that a file asks for.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._decoder: lzma.LZMADecompressor | None = None
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            decoder = self._decoder
            if decoder is None or decoder.eof:
                if decoder is not None:
                    self._rest, self._decoder = decoder.unused_data, None
                # Streams may be padded with zeros; a file of no bytes has no rows.
                self._rest = (self._rest or self._file.read(BLOCK)).lstrip(b"\0")
                if not self._rest:
                    if not (more := self._file.read(BLOCK)):
                        return 0
                    self._rest = more
                    continue
                decoder = self._decoder = lzma.LZMADecompressor(memlimit=WINDOW)
            if decoder.needs_input and not self._rest:
                self._rest = self._file.read(BLOCK)
                if not self._rest:
                    raise EOFError("the file ends before its end mark")
            data = decoder.decompress(self._rest if decoder.needs_input else b"", max_length=len(buffer))
            self._rest = b""
            if data:
                buffer[: len(data)] = data
                return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
