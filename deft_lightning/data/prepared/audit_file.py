"""The lines of an audit: which row each names, its rank, and its weight."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from deft_lightning.annotations import JsonObject
from deft_lightning.data.sources.files import read_file
from deft_lightning.data.sources.remarks import Remark
from deft_lightning.errors import UserError

NEEDS = (
    "an audit has one object per line with `id`, or with `file`, `row` and `prompt` (python -m deft_lightning probe)"
)


@dataclass(frozen=True)
class Top:
    """How many of the worst rows: a share of those that are ranked, or a count.

    Attributes:
        share: In (0, 1]; None for a count.
        count: At least 1; 0 for a share.
    """

    share: Fraction | None
    count: int

    @classmethod
    def read(cls, value: str | int) -> Top:
        """Return what a value of ``exclude_top`` means.

        Args:
            value: Such as ``5%`` or ``50``.

        Raises:
            UserError: It is neither a share nor a count.
        """
        text = str(value).strip()
        if not isinstance(value, bool) and re.fullmatch(r"\d{1,18}", text) and int(text) > 0:
            return cls(None, int(text))
        share = re.fullmatch(r"(\d{1,3}(?:\.\d{1,9})?) ?%", text)
        if share and 0 < Fraction(share[1]) <= 100:
            return cls(Fraction(share[1]) / 100, 0)
        raise UserError(f"--data.exclude_top must be a share such as 5% or a count such as 50, not {value!r}")

    def of(self, ranked: int, name: str) -> int:
        """Return how many rows that is, a share rounded down.

        Args:
            ranked: Rows of the audit.
            name: What the audit is called in messages.

        Raises:
            UserError: It is none, or more than are ranked.
        """
        count = self.count if self.share is None else math.floor(self.share * ranked)
        if not count:
            percent = f"{float(100 * (self.share or 0)):g}%"
            raise UserError(
                f"--data.exclude_top {percent} of the {ranked:,} rows of {name} is less than one row; give a count"
            )
        if count > ranked:
            raise UserError(
                f"--data.exclude_top {count}: {name} ranks {ranked:,} rows; leave the option out to exclude them all"
            )
        return count


class AuditLine(NamedTuple):
    """A line of an audit.

    Attributes:
        where: File and line, for messages.
        rank: Place from 1, the worst first; None where the line has none.
        weight: Factor on the loss of the row, at least 0; None where nobody asked.
    """

    where: str
    rank: int | None
    weight: float | None


def read_audit(path: Path, name: str, option: str, *, weighted: bool) -> Iterator[tuple[AuditLine, JsonObject]]:
    """Yield the lines of an audit, each with its record.

    Args:
        path: The file.
        name: What it is called in messages.
        option: Who asks for it.
        weighted: Whether every line has to say a weight.

    Raises:
        UserError: It cannot be read, is empty, or a line of it is no line of an audit; one line says which.
    """
    lines = 0
    try:
        for where, record in read_file(path, name):
            if isinstance(record, Remark):
                continue
            if isinstance(record, UserError):
                raise record
            lines += 1
            yield _line(where, record, weighted), record
    except UserError as error:
        reason = str(error).replace(" (--data.source)", "")
        raise UserError(reason if reason.startswith(option) else f"{option} {reason}") from None
    if not lines:
        raise UserError(f"{option} {name}: is empty; {NEEDS}")


def _line(where: str, record: Any, weighted: bool) -> AuditLine:
    if not isinstance(record, dict):
        raise UserError(f"{where}: is not a row of an audit; {NEEDS}")
    place = isinstance(record.get("file"), str) and type(record.get("row")) is int
    if not _text(record.get("id")) and not (place and isinstance(record.get("prompt"), str)):
        raise UserError(f"{where}: is not a row of an audit; {NEEDS}")
    for key in ("prompt", "answer"):
        if record.get(key) is not None and not isinstance(record[key], str):
            raise UserError(f"{where}, field {key!r}: expected text, got {type(record[key]).__name__}")
    rank = record.get("rank")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise UserError(f"{where}, field 'rank': expected a whole number from 1, got {rank!r}")
    return AuditLine(where, rank, _weight(where, record) if weighted else None)


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _weight(where: str, record: JsonObject) -> float:
    """Return the weight that a user wrote, else the probability that the answer is right."""
    for key, most in (("weight", math.inf), ("right", 1.0)):
        value = record.get(key)
        if value is None:
            continue
        if type(value) not in (int, float) or not 0 <= value <= most or not value < math.inf:
            wanted = "a finite number of at least 0" if key == "weight" else "a probability"
            raise UserError(f"{where}, field {key!r}: expected {wanted}, got {value!r}")
        return float(value)
    raise UserError(
        f"{where}: has neither `weight` nor `right`. The probe leaves `right` empty without a noise estimate. Write a"
        " weight into every line, or leave out the worst rows with --data.exclude"
    )
