"""Configuration files as text of strangers: read in any encoding, bounded, and refused where YAML would lose a key."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jsonargparse
import yaml

from deft_lightning.cli.spellings import spell_out
from deft_lightning.errors import UserError
from deft_lightning.objectives.parse import settings_of

MODE = "deft"  # name of the loader below among jsonargparse's
LARGEST = 4 << 20  # bytes of a file; configurations have some hundred
MOST_VALUES = 100_000  # once aliases are written out: nine lines can say a billion
DEEPEST = 64
BOMS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
# YAML 1.1 takes these for numbers in base 8 and base 60, which nobody means.
SURPRISING = re.compile(r"[-+]?(?:0[0-7_]*[0-7]|[1-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?)")

_Path: Any = jsonargparse.Path  # type: ignore[attr-defined]
_load_yaml = jsonargparse.get_loader("yaml")
_read_text = _Path.read_text


class BadValue(UserError, TypeError):
    """A value on the command line that is refused; jsonargparse adds the option to a TypeError."""


class FileText(str):
    """Text of a configuration file, which knows the name of the file."""

    name: str


def read_text(path: Any) -> FileText:
    """Return the text of a configuration file.

    Args:
        path: The file, a `Path` of jsonargparse; UTF-8, or UTF-16 and UTF-32 with their byte order marks.

    Raises:
        UserError: It is too large, or no text.
    """
    if path.is_url or path.is_fsspec or str(path) == "-":
        try:
            text = _read_text(path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 text ({error.reason})") from None
    else:
        try:
            with open(path.absolute, "rb") as file:
                content = file.read(LARGEST + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if len(content) > LARGEST:
            size = max(os.stat(path.absolute).st_size, len(content))
            raise UserError(f"{path}: has {size:,} bytes; a configuration has at most {LARGEST:,}")
        text = _decode(str(path), content)
    file_text = FileText(text)
    file_text.name = str(path)
    return file_text


def _decode(name: str, content: bytes) -> str:
    encoding = next((encoding for mark, encoding in BOMS.items() if content.startswith(mark)), "utf-8")
    even, odd = content[0:400:2].count(0), content[1:400:2].count(0)
    if encoding == "utf-8" and abs(even - odd) > len(content[0:400]) // 8:
        raise UserError(f"{name}: looks like UTF-16 without a byte order mark; save the file as UTF-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-8" and b"\0" not in content:
            line, byte = 1 + content.count(b"\n", 0, error.start), content[error.start]
            raise UserError(f"{name}, line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None
        raise UserError(f"{name}: is not {encoding.removesuffix('-sig').upper()} text ({error.reason})") from None
    if (at := text.find("\0")) >= 0:
        raise UserError(f"{name}, line {1 + text.count(chr(10), 0, at)}: has a NUL byte; it is a binary file")
    return text


def load(text: str, path: str = "") -> Any:
    """Return the value of a YAML text: a configuration file, or the value of an option.

    Args:
        text: The text; a :class:`FileText` if it is a file.
        path: Set by jsonargparse if it is a configuration rather than a value.

    Raises:
        UserError: A key is given twice, or the content is not bounded; for a file, also if it is not YAML.
        yaml.YAMLError: The value of an option is not YAML: it may be an ordinary string.
    """
    name = text.name if isinstance(text, FileText) else None
    text = str(text)  # libyaml takes no subclass
    if name is None and (called := settings_of(text)) is not None:
        return called  # in YAML the braces of BySource(own={a: NLL}) would be something else
    try:
        check(text, name)
        value = _load_yaml(text)
    except yaml.YAMLError as error:
        if name is None:
            raise
        raise UserError(f"{name}{_where(error)}") from None
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, ArithmeticError, LookupError, RecursionError) as error:
        problem = f"has a value that does not fit its tag ({error})"  # such as !!int "five"
        raise UserError(f"{name}: {problem}") if name is not None else yaml.YAMLError(problem) from None
    if name is not None and path and not isinstance(value, dict):
        kinds: dict[type, str] = {type(None): "empty", list: "a list", str: "a single text"}
        kind = kinds.get(type(value), "a single value")
        raise UserError(f"{name}: is {kind}, not options as NAME: VALUE")
    return spell_out(value)


def _where(error: yaml.YAMLError) -> str:
    """Return line and problem of a YAML error."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return f": is not YAML ({' '.join(str(error).split())})"
    mark = error.problem_mark or error.context_mark
    line = "" if mark is None else f", line {mark.line + 1}"
    problem = error.problem or error.context or "it cannot be parsed"
    if "python/" in problem:
        problem = f"{problem}; Python objects are not read from files"
    return f"{line}: is not YAML ({problem})"


def check(text: str, name: str | None = None) -> None:
    """Refuse what a YAML parser would accept to the user's harm, in one pass that keeps nothing but keys.

    Args:
        text: The YAML text.
        name: The file, if it is one.

    Raises:
        UserError: A key is given twice at any depth, a number is in base 8 or 60, or it is nested or repeated without
            bound.
        yaml.YAMLError: It is not YAML.
    """
    if name is None and not any(letter in text for letter in "{[:&*-"):
        return  # a plain value
    scan = _Scan(name)
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # events never recurse
        scan.see(event)


class _Level:
    """An open mapping or list."""

    def __init__(self, place: tuple[str, ...], mapping: bool, anchor: str | None) -> None:
        self.place, self.mapping, self.anchor = place, mapping, anchor
        self.keys: dict[str, int] = {}
        self.key: str | None = None  # of the value that comes next
        self.size, self.items = 1, 0


class _Scan:
    """What a stream of YAML events has shown so far."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.levels: list[_Level] = []
        self.sizes: dict[str, int] = {}  # of anchors
        self.options: dict[tuple[str, ...], int] = {}  # `trainer.max_steps: 1` is the same as a key below `trainer:`

    def see(self, event: Any) -> None:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.ScalarEvent):
            self._scalar(event, line)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.sizes and any(level.anchor == event.anchor for level in self.levels):
                raise self.error(line, f"*{event.anchor} refers to itself")
            self._add(self.sizes.get(str(event.anchor), 1), line)
        elif isinstance(event, yaml.CollectionStartEvent):
            place = self._place()
            if len(self.levels) == DEEPEST:
                raise self.error(line, f"is nested more than {DEEPEST} deep")
            self.levels.append(_Level(place, isinstance(event, yaml.MappingStartEvent), event.anchor))
        elif isinstance(event, yaml.CollectionEndEvent):
            level = self.levels.pop()
            if level.anchor is not None:
                self.sizes[level.anchor] = level.size
            self._add(level.size, line)

    def _scalar(self, event: Any, line: int) -> None:
        level = self.levels[-1] if self.levels else None
        if event.anchor is not None:
            self.sizes[event.anchor] = 1
        if level is not None and level.mapping and level.key is None:
            level.key = event.value
            if event.value == "<<" and not event.style:  # merges are no options; nothing of two of them is lost
                return
            if (before := level.keys.get(event.value)) is not None:
                raise self.twice(".".join((*level.place, event.value)), before, line)
            level.keys[event.value] = line
            return
        if self.name is not None and event.implicit[0] and SURPRISING.fullmatch(event.value):
            means = _load_yaml(event.value)
            raise self.error(line, f"{event.value} means {means} in YAML; write it in quotes, or as an ordinary number")
        place = tuple(".".join(self._place()).split("."))
        if level is not None and level.mapping:
            if (before := self.options.get(place)) is not None:
                raise self.twice(".".join(place), before, line)
            self.options[place] = line
        self._add(1, line)

    def _place(self) -> tuple[str, ...]:
        """Return the keys above the value that comes next."""
        if not self.levels:
            return ()
        level = self.levels[-1]
        return (*level.place, level.key or "" if level.mapping else f"[{level.items}]")

    def _add(self, size: int, line: int) -> None:
        """Count a value that is complete."""
        if not self.levels:
            return
        level = self.levels[-1]
        level.size += size
        if level.size > MOST_VALUES:
            raise self.error(line, f"holds more than {MOST_VALUES:,} values once its aliases are written out")
        if level.mapping and level.key is None:
            level.key = ""  # a key that is no scalar
        else:
            level.key, level.items = None, level.items + 1

    def twice(self, key: str, before: int, line: int) -> UserError:
        key = key.replace(".[", "[")
        if self.name is None:
            return BadValue(f"the key {key!r} is given twice")
        return UserError(f"{self.name}: the key {key!r} is given twice, in line {before} and in line {line}")

    def error(self, line: int, problem: str) -> UserError:
        return BadValue(problem) if self.name is None else UserError(f"{self.name}, line {line}: {problem}")


@contextmanager
def bounded() -> Iterator[None]:
    """Let jsonargparse read files by :func:`read_text`, however deep in a configuration they are named."""
    before = _Path.read_text
    _Path.read_text = read_text
    try:
        yield
    finally:
        _Path.read_text = before


jsonargparse.set_loader(MODE, load, (yaml.YAMLError,))
