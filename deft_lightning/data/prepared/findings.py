"""What is found while rows are read: those that cannot be used, decisions about sources, what became of columns."""

from __future__ import annotations

from dataclasses import dataclass, field

from deft_lightning.data.records.leftovers import ColumnReport
from deft_lightning.data.sources.remarks import Remarks
from deft_lightning.data.sources.rows import BadRows


@dataclass(frozen=True)
class Findings:
    """Takes note of what is found while rows are read.

    Attributes:
        bad: Rows that cannot be used.
        remarks: Decisions about the sources.
        columns: What became of the columns.
    """

    bad: BadRows = field(default_factory=BadRows)
    remarks: Remarks = field(default_factory=Remarks)
    columns: ColumnReport = field(default_factory=ColumnReport)
