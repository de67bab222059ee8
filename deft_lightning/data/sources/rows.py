"""A row with its place: whatever is wrong with one is a single line that says file, row and field."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

from deft_lightning.atomic import whole_file
from deft_lightning.errors import UserError
from deft_lightning.terminal import visible

Located = Iterator[tuple[str, Any]]  # where, record
LONGEST = 1 << 26  # letters of a row, or bytes of it where it is stored in binary: more is an accident, or an attack


class RowError(UserError):
    """A row that cannot be used.

    Attributes:
        where: File and row.
        problem: What is wrong, without its place.
        field: Column, or path inside one such as ``messages[1].role``; empty for the row as a whole.
        kind: One or two words that rows with the same trouble share, for counting.
    """

    def __init__(self, where: str, problem: str, field: str = "", kind: str = "other") -> None:
        super().__init__(f"{where}, field {field!r}: {problem}" if field else f"{where}: {problem}")
        self.where, self.problem, self.field, self.kind = where, problem, field, kind

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the parts, since the message alone does not hold them."""
        return type(self), (self.where, self.problem, self.field, self.kind)


def too_long(where: str) -> RowError:
    """Return the error of a row that is longer than :data:`LONGEST`."""
    return RowError(where, f"is longer than {LONGEST:,} characters, the most that a row may have", kind="too long")


class BadRows:
    """Callback that takes note of the rows that cannot be used: how many of which kind, and every line for a file.

    Args:
        shown: How many messages to keep at hand in ``first``.

    Attributes:
        counts: Number of rows by kind.
        first: The first messages.
    """

    def __init__(self, shown: int = 3) -> None:
        self.shown = shown
        self.counts: Counter[str] = Counter()
        self.first: list[str] = []
        self._lines: list[tuple[str, ...]] = []

    def __call__(self, error: UserError) -> None:
        """Take note of one row."""
        row = error if isinstance(error, RowError) else RowError("", str(error))
        file, _, number = row.where.rpartition(", row ")
        self.counts[row.kind] += 1
        self._lines.append((file, number, row.field, row.problem))
        if len(self.first) < self.shown:
            self.first.append(str(error))

    def __len__(self) -> int:
        """Return the number of rows taken note of."""
        return len(self._lines)

    def __str__(self) -> str:
        """Return one line: how many, of which kinds, and the first messages."""
        if not self._lines:
            return "no bad rows"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common())
        rest = len(self) - len(self.first)
        shown = "; ".join(self.first) + (f"; and {rest} more" if rest else "")
        return f"{len(self)} bad row{'s' * (len(self) > 1)} ({kinds}): {shown}"

    def write(self, path: str | Path) -> Path:
        """Write every row on a line of its own: file, row, field and problem between tabs, below a header.

        Args:
            path: File to write, replaced if it is there; its folder is made if it is not.
        """
        path = Path(path)
        # A path or a column may hold tabs and line breaks, and half surrogates.
        with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
            for line in [("file", "row", "field", "problem"), *self._lines]:
                file.write("\t".join(visible(" ".join(cell.split())) for cell in line) + "\n")
        return path


def absent(value: Any) -> bool:
    """Return whether a value stands for nothing: None, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_text(value: str) -> bool:
    """Return whether a string holds no half surrogate, of which no tokenizer and no file could make anything."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def columns(record: Mapping[Any, Any]) -> str:
    """Return the names of the columns for a message: a file without a header has answers where names should be."""
    names = [name if len(name) <= 40 else f"{name[:40]}…" for name in map(str, record)]
    return ", ".join(names if len(names) <= 20 else [*names[:20], f"and {len(names) - 20} more"])


def check_names(file: str, names: Iterable[str]) -> None:
    """Refuse columns of the same name.

    Raises:
        UserError: Two columns share a name.
    """
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{file}: two columns are named {twice[0][:80]!r}, and only one of them could be read")


def folded(name: str) -> str:
    """Return a name without what a header may write otherwise: capitals, blanks for underscores, blanks around it."""
    return re.sub(r"[\s_]+", "_", name.strip().strip("\ufeff\u200b").strip()).casefold()


@lru_cache(maxsize=256)
def _spellings(names: tuple[Any, ...]) -> dict[str, list[str]]:
    """Return the names that are spelt otherwise than a field would be, by what they fold to: none of most files."""
    spelt: dict[str, list[str]] = {}
    for name in names:
        if isinstance(name, str) and (field := folded(name)) != name:
            spelt.setdefault(field, []).append(name)
    return spelt


def spelt_otherwise(record: Mapping[Any, Any], fields: Iterable[str], column_map: Mapping[str, str]) -> dict[str, str]:
    """Return the columns that are read as a field although they are spelt otherwise, each with the field."""
    row = Row(record, "", column_map)
    names = {field: row.name(field) for field in fields if field not in column_map}
    return {name: field for field, name in names.items() if name != field}


class Row:
    """A record with its place: every access that fails says file, row and field.

    Args:
        record: The row as read.
        where: File and row.
        column_map: Canonical field to the record's own.
        ignore: Columns, and keys inside them such as ``messages[].mood``, that are read as if they were not there.

    Attributes:
        read: Columns whose values became part of the example, with what each became.
        left: Keys inside columns that were read, such as ``messages[].mood``, which became nothing.
        ignored: Names that the row has and that are ignored.
    """

    def __init__(
        self, record: Any, where: str, column_map: Mapping[str, str], ignore: Collection[str] = ()
    ) -> None:  # fmt: skip
        self.where, self.column_map, self.ignore = where, column_map, ignore
        self.read: dict[str, str] = {}
        self.left: set[str] = set()
        self.ignored: set[str] = set()
        if not isinstance(record, Mapping):
            raise RowError(where, f"expected an object with named fields, got {type(record).__name__}", kind="type")
        self.record = {name: value for name, value in record.items() if not self.ignores(name)} if ignore else record
        self._spelt = _spellings(tuple(self.record))

    def fail(self, field: str, problem: str, kind: str = "other") -> RowError:
        """Return the one-line error for a field."""
        return RowError(self.where, problem, field, kind)

    def ignores(self, name: str) -> bool:
        """Return whether a name that the row has is ignored, and take note of it."""
        if name in self.ignore:
            self.ignored.add(name)
            return True
        return False

    def key(self, at: str, key: str) -> str:
        """Return the name that a key of a turn, or a type of a part, has in reports: ``messages[].content[].image``."""
        return re.sub(r"\[\d+\]", "[]", f"{at}.{key}")

    def name(self, field: str) -> str:
        """Return where a field is looked up: by ``column_map``, by its name, or by one of another spelling.

        Raises:
            RowError: Two columns differ from the field, and from each other, in spelling alone.
        """
        if not self._spelt or field in self.column_map or field in self.record:
            return self.column_map.get(field, field)
        spelt = self._spelt.get(field, [field])
        if len(spelt) > 1:
            both = " and ".join(map(repr, spelt))
            raise self.fail(field, f"{both} both fit; choose one with --data.column_map.{field}", "names")
        return spelt[0]

    def get(self, field: str) -> Any:
        """Return the value of a field as :meth:`look` does, and count its column as read."""
        value = self.look(field)
        if value is not None:
            self.read[self.name(field)] = field
        return value

    def look(self, field: str) -> Any:
        """Return the value of a field, following dotted keys; None when absent, or NaN as pandas writes absence."""
        return self.column(self.name(field))

    def column(self, name: str) -> Any:
        """Return the value of a column by its own name; dotted for a nested one, or an item of a list (from 0)."""
        value: Any = None if self.ignores(name) else self.record
        if name not in self.record and "." not in name:
            return None
        for part in [name] if name in self.record else name.split("."):
            if isinstance(value, list | tuple) and part.isdecimal():
                value = value[int(part)] if int(part) < len(value) else None
            else:
                value = value.get(part) if isinstance(value, Mapping) else None
        return None if absent(value) else value

    def require(self, *fields: str) -> tuple[str, Any]:
        """Return the first of the fields that is there, with its name."""
        for field in fields:
            value = self.get(field)
            if value is not None:
                return self.name(field), value
        wanted = " or ".join(repr(self.name(f)) for f in fields)
        raise RowError(
            self.where,
            f"missing field {wanted} (the row has {columns(self.record)}); name it with --data.column_map.{fields[0]}",
            kind="missing",
        )

    def text(self, field: str, value: Any, *, empty: bool = False) -> str:
        """Return a value as text.

        Numbers and truth values are written out, dates in ISO 8601; bytes are UTF-8 text (parquet files of some
        writers do not say so); lists of text parts are joined.
        """
        if absent(value):
            raise self.fail(field, "is missing", "missing")
        if isinstance(value, list):
            value = "".join(self._part(f"{field}[{i}]", field, part) for i, part in enumerate(value))
        elif isinstance(value, bytes):
            try:
                value = value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise self.fail(field, f"holds bytes that are not UTF-8 text ({error.reason})", "not UTF-8") from None
        elif isinstance(value, float) and math.isinf(value):
            raise self.fail(field, "expected text, got an infinite number", "type")
        elif isinstance(value, datetime | date):
            value = value.isoformat()
        elif isinstance(value, bool | int | float | Decimal):
            value = str(value)
        if not isinstance(value, str):
            raise self.fail(field, f"expected text, got {type(value).__name__}", "type")
        if not is_text(value):
            raise self.fail(field, "holds half a surrogate pair, which is not text", "not text")
        if not empty and not value.strip():
            raise self.fail(field, "is empty", "empty")
        return value

    def _part(self, at: str, field: str, part: Any) -> str:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            got = f"a part of type {part.get('type')!r}" if isinstance(part, Mapping) else type(part).__name__
            raise self.fail(field, f"expected text, got list with {got}", "type")
        # "None" would be text too.
        if not isinstance(part.get("text"), str):
            raise self.fail(f"{at}.text", f"expected text, got {type(part.get('text')).__name__}", "type")
        return str(part["text"])

    def unpack(self, value: Any) -> Any:
        """Return the list or object that a text spells in JSON, as cells of CSV and of some parquet files do."""
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            try:
                return json.loads(value)
            except (ValueError, RecursionError):
                return value
        return value

    def string(self, *fields: str) -> str:
        """Return a required text field that is not empty."""
        name, value = self.require(*fields)
        return self.text(name, value)

    def optional(self, field: str) -> str:
        """Return a text field, or an empty string."""
        value = self.get(field)
        return "" if value is None else self.text(self.name(field), value, empty=True)
