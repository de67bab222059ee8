"""What shows that something long goes on: a bar where somebody looks, a line now and then where output is kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from tqdm import tqdm

EVERY = 30.0  # seconds between two lines in a log


class _Lines(tqdm):  # type: ignore[type-arg]
    """A bar that is a line of the log every :data:`EVERY` seconds, and nothing before the first of them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._said = time.monotonic()
        super().__init__(*args, **options)

    def display(self, *args: Any, **options: Any) -> None:
        """Say how far it is, if the last line is old enough."""
        if time.monotonic() - self._said < EVERY:
            return
        self._said = time.monotonic()
        done = f"{self.n:,} of {self.total:,}" if self.total else f"{self.n:,}"
        rate = self.format_dict["rate"] or self.n / max(self.format_dict["elapsed"], 1e-9)
        left = f", {(self.total - self.n) / rate:,.0f} s left" if self.total and rate and self.n < self.total else ""
        rank_zero_info(f"{self.desc.removesuffix(': ')}: {done}{self.unit}{left}")

    def close(self) -> None:
        """End without a last line: what was made of the rows is told elsewhere."""
        self.disable = True


def progress(items: Iterable[Any] | None, text: str, total: int | None = None, unit: str = "rows") -> Any:
    """Show how far something is: a bar if it takes more than a few seconds, off a terminal a line every 30 s.

    Args:
        items: What is gone through; None to count by ``update``.
        text: What is done.
        total: How many items, if that is known.
        unit: Name of the items.
    """
    if sys.stderr.isatty():
        return tqdm(items, desc=text, total=total, delay=5, unit=f" {unit}", leave=False)
    return _Lines(items, desc=text, total=total, unit=f" {unit}", mininterval=min(EVERY, 1.0), miniters=1, leave=False)
