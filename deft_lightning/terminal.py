"""Text of strangers on the user's terminal: whatever would steer it or turn letters round is shown escaped.

:func:`visible` is the one rule. Messages, previews, pages and TensorBoard text pass through it where they are made;
:func:`guarded` puts it around the standard streams of the command line, for whatever else is printed, by libraries too.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# C0 and C1 controls but tab and line feed, delete; marks that change the direction of text, line and paragraph
# separators; interlinear and tag characters, which no font shows; half surrogates, which no stream can write.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
# A full disk, a limit of a file or a user, a terminal that is gone. Not a pipe that nobody reads: that ends a command.
NOWHERE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
# What tqdm writes between bars, always alone: line feeds and "cursor up".
BARS = re.compile(r"\n*(?:\x1b\[A)*")


def visible(text: str) -> str:
    r"""Return text in which every character that steers a terminal, or hides, is written as Python would.

    ``\x1b[2J`` becomes the six letters ``\x1b[2J``; tabs and line feeds stay, and so does everything that can be seen.
    """
    return HIDDEN.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if match[0] == "\r":
        return "\\r"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class GuardedStream:
    """A text stream that writes :func:`visible` text; all else is the stream's own.

    Carriage returns before a text, and tqdm's own steps between bars, pass: progress bars go on to work. Where nothing
    can be written any more, because a disk is full or a terminal is gone, the text is lost and the work goes on.

    Args:
        stream: Where to write.

    Attributes:
        lost: Why nothing can be written any more.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Write text; return its length."""
        if HIDDEN.search(text) is not None and not BARS.fullmatch(text):
            body = text.lstrip("\r")
            text_out = "\r" * (len(text) - len(body)) + visible(body.replace("\r\n", "\n"))
        else:
            text_out = text
        self._attempt(self._stream.write, text_out)
        return len(text)

    def flush(self) -> None:
        """Hand over what is buffered."""
        self._attempt(self._stream.flush)

    def _attempt(self, call: Callable[..., Any], *args: Any) -> None:
        try:
            call(*args)
        except OSError as error:
            if error.errno not in NOWHERE:
                raise
            self.lost = error
            with suppress(OSError, ValueError):  # what is buffered would be tried again, at the end of the process too
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
                self._stream.flush()

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        """Return the stream's own attribute."""
        return getattr(self._stream, name)


@contextmanager
def guarded() -> Iterator[None]:
    """Guard standard output and error until the end of the block; one that was closed takes text and keeps nothing."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_guard(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _guard(stream: Any) -> Any:
    if stream is None:
        stream = open(os.devnull, "w", encoding="utf-8")
    return stream if isinstance(stream, GuardedStream) else GuardedStream(stream)
