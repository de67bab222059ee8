"""Rows of JSON through a window: a list, or objects that take several lines."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import IO, Any

from deft_lightning.data.sources.rows import LONGEST, RowError, is_text, too_long
from deft_lightning.errors import UserError

CHUNK = 1 << 20  # letters looked at together
BLANKS = re.compile(r"[ \t\r\n]*")


class Decoder:
    """JSON decoder that notices keys given twice, of which all but the last would be lost."""

    def __init__(self) -> None:
        self.twice: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            self.twice += [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        return result

    def decode(self, text: str, at: int | None = None) -> tuple[Any, int]:
        """Return a value and where it ends; without a place to start at, the text must be one value."""
        self.twice.clear()
        return (self._decoder.decode(text), len(text)) if at is None else self._decoder.raw_decode(text, at)

    def checked(self, where: str, record: Any, text: str) -> Any:
        """Return the record, or what is wrong with it although it is JSON."""
        if not is_text(text):
            return RowError(where, "is not UTF-8 text", kind="not UTF-8")
        if self.twice:
            return RowError(where, f"has the key {self.twice[0]!r} twice in one object", kind="key twice")
        return record


def why(error: Exception) -> str:
    """Return why a text is no JSON."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error) if isinstance(error, json.JSONDecodeError) else str(error).split(":")[0]


class Window:
    """A text file through a window that moves on, so that what is read past can be let go.

    Args:
        file: The file.
        text: What is read of it already.
        line: Number of the line that this begins at.

    Attributes:
        length: Letters of the last value.
    """

    def __init__(self, file: IO[str], text: str = "", line: int = 1) -> None:
        self.file, self.decoder = file, Decoder()
        self.text, self.at, self.line, self.length = text, 0, line, 0

    def grow(self) -> bool:
        """Let go of what is read past and read on; False at the end of the file."""
        # By as much as there is: a long row is then parsed a few times, not once for every chunk.
        more = self.file.read(max(CHUNK, len(self.text) - self.at))
        if not more:
            return False
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :] + more, 0
        return True

    def peek(self) -> str:
        """Return the next letter that is no blank, which stays; an empty string at the end."""
        while True:
            found = BLANKS.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""

    def room(self, where: str) -> bool:
        """Refuse a value that goes on beyond the longest row: behind it, nobody knows where the next one begins."""
        if len(self.text) - self.at > LONGEST:
            raise too_long(where)
        return True

    def value(self, where: str) -> Any:
        """Return the value that begins here and move past it."""
        while True:
            try:
                value, end = self.decoder.decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # Perhaps it is only the window that ends here; a literal or an escape is at most 9 letters long.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 9
                if cut and self.room(where) and self.grow():
                    continue
                raise self.broken(where, error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self.broken(where, why(error), self.at) from None
            # A number may go on: after "1e+" only the 1 was read.
            if end > len(self.text) - 3 and self.room(where) and self.grow():
                continue
            record = self.decoder.checked(where, value, self.text[self.at : end])
            self.at, self.length = end, end - self.at
            return record

    def broken(self, where: str, problem: str, at: int | None = None) -> UserError:
        """Return the error for a place in the window: one broken value hides where the next begins."""
        line = self.line + self.text.count("\n", 0, self.at if at is None else at)
        return UserError(f"{where}: is not JSON ({problem} at line {line})")
