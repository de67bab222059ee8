"""Rows of JSON: an object a line, or a list that is read through a window."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import IO, Any

from deft_lightning.data.sources.rows import LONGEST, Located, RowError, is_text, too_long
from deft_lightning.errors import UserError

CHUNK = 1 << 20  # letters of a .json file looked at together
WHOLE = 4 * LONGEST  # letters of a .json file that is no list, and so is read as a whole
BLANKS = re.compile(r"[ \t\r\n]*")


class _Decoder:
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


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error) if isinstance(error, json.JSONDecodeError) else str(error).split(":")[0]


def rest_of_line(file: IO[str]) -> int:
    """Read on to the end of a line that is too long to be kept, and return how many quotes are in it."""
    quotes = 0
    while part := file.readline(CHUNK):
        quotes += part.count('"')
        if part.endswith(("\n", "\r")):
            break
    return quotes


def read_lines(path: Path, file: IO[str]) -> Located:
    """Yield the object of each line; blank lines are none but count, and bad lines yield the error."""
    decoder = _Decoder()
    for number, line in enumerate(iter(partial(file.readline, LONGEST + 1), ""), 1):
        # Files with a mark at their start may have been put one behind the other.
        if not (text := line.strip().removeprefix("\ufeff")):
            continue
        where = f"{path}, row {number}"
        if len(line) > LONGEST and not line.endswith("\n"):
            del line, text  # two copies of what is not used
            yield where, too_long(where)
            rest_of_line(file)
            continue
        try:
            record, _ = decoder.decode(text)
        except (ValueError, RecursionError) as error:  # besides broken JSON, integers of more than 4300 digits
            why = f"is not JSON ({_why(error)})" if is_text(text) else "is not UTF-8 text"
            yield where, RowError(where, why, kind="not JSON" if is_text(text) else "not UTF-8")
        else:
            yield where, decoder.checked(where, record, text)


class _Window:
    """A text file through a window that moves on, so that what is read past can be let go."""

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.path, self.file, self.decoder = path, file, _Decoder()
        self.text, self.at, self.line = "", 0, 1

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
                raise self.broken(where, _why(error), self.at) from None
            # A number may go on: after "1e+" only the 1 was read.
            if end > len(self.text) - 3 and self.room(where) and self.grow():
                continue
            record = self.decoder.checked(where, value, self.text[self.at : end])
            self.at = end
            return record

    def broken(self, where: str, problem: str, at: int | None = None) -> UserError:
        """Return the error for a place in the window: one broken value hides where the next begins."""
        line = self.line + self.text.count("\n", 0, self.at if at is None else at)
        return UserError(f"{where}: is not JSON ({problem} at line {line})")


def read_list(path: Path, file: IO[str]) -> Located:
    """Yield the rows of a list without holding it, or of an object that holds one list, which is read whole."""
    window = _Window(path, file)
    if not (first := window.peek()):
        return
    if first != "[":
        text = window.text + file.read(WHOLE)
        if len(text) > WHOLE:
            raise UserError(
                f"{path}: is no list of rows and longer than {WHOLE:,} characters, too long to be read as a whole; one"
                " object a line is .jsonl"
            )
        yield from _json_object(path, text)
        return
    window.at += 1
    number = 0
    while (following := window.peek()) != "]" or number:
        where = f"{path}, row {number + 1}"
        if number and following == "]":
            break
        if number:
            if following != ",":
                raise window.broken(where, "expected , or ]" if following else "the list is cut short")
            window.at += 1
            window.peek()
        number += 1
        yield where, window.value(where)
    window.at += 1
    if window.peek():
        raise window.broken(str(path), "there is more after the list; one object a line is .jsonl")


def _json_object(path: Path, text: str) -> Located:
    decoder = _Decoder()
    if not is_text(text):
        raise UserError(f"{path}: is not UTF-8 text")
    try:
        content, _ = decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({_why(error)}); one object a line is .jsonl") from None
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else []
    if len(lists) != 1:
        raise UserError(f"{path}: expected a list of rows, or an object that holds one list")
    if decoder.twice:
        raise UserError(f"{path}: has the key {decoder.twice[0]!r} twice in one object")
    for number, record in enumerate(lists[0], 1):
        yield f"{path}, row {number}", record
