"""Rows of JSON: an object a line, a list, an object that is one row, or one that holds a list of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, repeat
from typing import IO, Any, cast

from deft_lightning.data.sources.json_window import CHUNK, Decoder, Window, why
from deft_lightning.data.sources.layouts import Expected, is_conversation, is_message, is_parts
from deft_lightning.data.sources.remarks import Remark
from deft_lightning.data.sources.rows import LONGEST, Located, RowError, is_text, too_long
from deft_lightning.errors import UserError

WHOLE = 4 * LONGEST  # letters of a .json file that is no list, and so is read as a whole


def rest_of_line(file: IO[str]) -> int:
    """Read on to the end of a line that is too long to be kept, and return how many quotes are in it."""
    quotes = 0
    while part := file.readline(CHUNK):
        quotes += part.count('"')
        if part.endswith(("\n", "\r")):
            break
    return quotes


# --- an object a line ------------------------------------------------------------------------------------------------


class _PutBack:
    """A file with some text in front of what is left of it."""

    def __init__(self, text: str, file: IO[str]) -> None:
        self._text, self._at, self._file = text, 0, file

    def readline(self, size: int) -> str:
        end = self._text.find("\n", self._at) + 1 or len(self._text)
        line = self._text[self._at : min(end, self._at + size)]
        self._at += len(line)
        ended = line.endswith("\n") or len(line) == size
        return line if ended else line + self._file.readline(size - len(line))


def read_lines(name: str, file: IO[str], expected: Expected) -> Located:
    """Yield the object of each line; blank lines are none but count, and bad lines yield the error.

    A file that is a list, or whose objects go on over several lines, is read as what it is.
    """
    blank, first = _next_line(file)
    decoder, opening = Decoder(), _content(first)
    start: Iterable[str] = chain(repeat("\n", blank), [first])
    long = len(first) > LONGEST and not first.endswith("\n")
    if opening[:1] == "[" or (opening[:1] == "{" and not long):
        record = None if long else _value(decoder, opening)
        if record is None:
            window = Window(file, first, blank + 1)
            if opening[0] == "[":
                yield name, Remark("list", f"{name}: holds one list; each item is a row")
                yield from _list(name, window)
                return
            if _over_lines(window):
                yield name, Remark("objects", f"{name}: objects span several lines; row N is object N")
                yield from _objects(name, window)
                return
            start, file = repeat("\n", blank), cast(IO[str], _PutBack(window.text, file))
        elif isinstance(record, list) and not is_conversation(record):
            more, second = _next_line(file)
            if not second:
                yield name, Remark("list", f"{name}: holds one list; each item is a row")
                yield from ((f"{name}, row {number}", item) for number, item in enumerate(record, 1))
                return
            start = chain(start, repeat("\n", more), [second])
    yield from _lines(name, start, file)


def _lines(name: str, start: Iterable[str], file: IO[str]) -> Located:
    decoder = Decoder()
    for number, line in enumerate(chain(start, iter(partial(file.readline, LONGEST + 1), "")), 1):
        if not (text := _content(line)):
            continue
        where = f"{name}, row {number}"
        if len(line) > LONGEST and not line.endswith("\n"):
            del line, text  # two copies of what is not used
            yield where, too_long(where)
            rest_of_line(file)
            continue
        try:
            record, _ = decoder.decode(text)
        except (ValueError, RecursionError) as error:  # besides broken JSON, integers of more than 4300 digits
            problem = f"is not JSON ({why(error)})" if is_text(text) else "is not UTF-8 text"
            if text in ("{", "["):
                problem += "; an object must be on one line, or every object of the file must span several"
            yield where, RowError(where, problem, kind="not JSON" if is_text(text) else "not UTF-8")
        else:
            if isinstance(record, list) and not is_conversation(record):
                problem = "is a list, not an object; write one object per line, or one list as the whole file"
                record = RowError(where, problem, kind="type")
            yield where, decoder.checked(where, record, text)


def _next_line(file: IO[str]) -> tuple[int, str]:
    """Return the next line that is not blank, empty at the end of the file, and how many are before it."""
    blank = 0
    for line in iter(partial(file.readline, LONGEST + 1), ""):
        if _content(line):
            return blank, line
        blank += 1
    return blank, ""


def _content(line: str) -> str:
    # Files with a mark at their start may have been put one behind the other.
    return line.strip().removeprefix("\ufeff")


def _value(decoder: Decoder, text: str) -> Any:
    """Return the value that a line is; None if it is not one."""
    try:
        return decoder.decode(text)[0]
    except (ValueError, RecursionError):
        return None


# --- a list, an object -----------------------------------------------------------------------------------------------


def _over_lines(window: Window) -> bool:
    """Return whether the value that begins here ends on a later line; the window stays where it is."""
    try:
        window.peek()
        window.value("")
    except UserError:
        return False
    ended, window.at = window.at, 0
    return "\n" in window.text[:ended].strip()


def _objects(name: str, window: Window) -> Located:
    number = 0
    while window.peek():
        number += 1
        yield f"{name}, row {number}", window.value(f"{name}, row {number}")


def read_list(name: str, file: IO[str], expected: Expected) -> Located:
    """Yield the rows of a list without holding it; of an object, which is read whole, itself or those it holds."""
    window = Window(file)
    if not (first := window.peek()):
        return
    if first == "[":
        yield from _list(name, window)
        return
    text = window.text + file.read(WHOLE)
    if len(text) > WHOLE:
        raise UserError(
            f"{name}: is not a list of rows and longer than {WHOLE:,} characters, too long to be read as a "
            "whole; use .jsonl for one object per line"
        )
    yield from _object(name, text, expected)


def _list(name: str, window: Window) -> Located:
    """Yield the items of the list that begins in a window; if all of them are turns, the conversation that they are."""
    turns: list[Any] = []
    letters = 0
    for where, record in _items(name, window):
        if letters <= LONGEST and len(turns) == int(where.rpartition(" ")[2]) - 1 and is_message(record):
            turns.append(record)
            letters += window.length
            continue
        # One that is none makes rows of those before it.
        yield from ((f"{name}, row {number}", turn) for number, turn in enumerate(turns, 1))
        turns = []
        yield where, record
    if turns:
        yield f"{name}, row 1", turns


def _items(name: str, window: Window) -> Iterator[tuple[str, Any]]:
    window.peek()
    window.at += 1
    number = 0
    while (following := window.peek()) != "]" or number:
        where = f"{name}, row {number + 1}"
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
        raise window.broken(name, "there is more after the list; use .jsonl for one object per line")


def _object(name: str, text: str, expected: Expected) -> Located:
    decoder = Decoder()
    if not is_text(text):
        raise UserError(f"{name}: is not UTF-8 text")
    try:
        content, _ = decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: is not JSON ({why(error)}); use .jsonl for one object per line") from None
    lists = {key: value for key, value in content.items() if isinstance(value, list)} if _is_object(content) else {}
    rows = [key for key, value in lists.items() if _is_rows(value)]
    if decoder.twice:
        raise UserError(f"{name}: has the key {decoder.twice[0]!r} twice in one object")
    if form := expected.form(content):
        if len(rows) == 1 and form == "text" and expected.form(lists[rows[0]][0]) not in ("", "text"):
            raise UserError(
                f"{name}: has the field 'text' of a row and a list of rows, {rows[0]!r}; keep one of the two, or leave"
                " out the text with --data.column_map.text none"
            )
        if rows:
            yield name, Remark("one row", f"{name}: is read as one row ({form}); {', '.join(rows)} is a field of it")
        yield f"{name}, row 1", content
        return
    if len(lists) != 1:
        columns = len(content) > 1 and _is_columns(content) if _is_object(content) else False
        hint = "; it holds columns: pandas writes rows with to_json(orient='records')" if columns else ""
        raise UserError(f"{name}: expected a row, a list of rows, or an object that holds one list{hint}")
    if is_conversation(next(iter(lists.values()))):  # under a name that only a column_map can tell
        yield f"{name}, row 1", content
        return
    for number, record in enumerate(next(iter(lists.values())), 1):
        yield f"{name}, row {number}", record


def _is_rows(value: list[Any]) -> bool:
    return bool(value) and all(map(_is_object, value)) and not is_conversation(value) and not is_parts(value)


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_columns(content: Mapping[str, Any]) -> bool:
    """Return whether an object is a table that is written column by column, as lists or as objects by row."""
    values = list(content.values())
    if all(isinstance(value, list) for value in values):
        return len({len(value) for value in values}) == 1
    return all(_is_object(value) for value in values) and len({tuple(value) for value in values}) == 1
