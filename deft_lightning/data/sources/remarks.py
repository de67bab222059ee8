"""What a reader decided and the user should know: said once for each kind, with how many files it was true of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.terminal import visible


class Remark(NamedTuple):
    """A decision of a reader; stands in the stream of rows in place of a record, and is no row.

    Attributes:
        kind: What remarks about the same decision share.
        text: One sentence that begins with the name of the file.
    """

    kind: str
    text: str


OnRemark = Callable[[Remark], None]


class Remarks:
    """Callback that takes note of remarks.

    Attributes:
        counts: How often each kind was remarked.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def __call__(self, remark: Remark) -> None:
        """Take note of a remark."""
        self.counts[remark.kind] += 1
        self._first.setdefault(remark.kind, remark.text)

    def lines(self) -> list[str]:
        """Return a line for each kind: the first remark, and how many more there were."""
        more = {kind: f" (and so of {count - 1} more)" if count > 1 else "" for kind, count in self.counts.items()}
        return [visible(" ".join(f"{text}{more[kind]}".split())) for kind, text in self._first.items()]


class SayOnce(Remarks):
    """Callback that says the first remark of each kind at once."""

    def __call__(self, remark: Remark) -> None:
        """Say a remark unless one of its kind was said before."""
        if remark.kind not in self.counts:
            rank_zero_info(visible(" ".join(remark.text.split())))
        super().__call__(remark)
