"""How far a probe is, and how long it will take: before it starts, and while it goes on."""

from __future__ import annotations

import sys
import time
from typing import Self

from lightning_utilities.core.rank_zero import rank_zero_info
from tqdm import tqdm

FIRST, EVERY = 10.0, 30.0  # seconds until the first line of a log, and between two of them


def duration(seconds: float) -> str:
    """Return a time in words: seconds below two minutes, minutes below two hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Pace:
    """Shows how many rows are read and how long the rest takes: a bar on a terminal, elsewhere a line now and then.

    Batches differ in length, so time is told by tokens. What was read by an earlier probe takes none.

    Args:
        text: What is read.
        rows: How many rows.
        tokens: How many tokens they have.
    """

    def __init__(self, text: str, rows: int, tokens: int) -> None:
        self.text, self.rows, self.tokens = text, rows, tokens
        self._rows = self._tokens = self._computed = 0
        self._begun = self._said = time.monotonic()
        self._wait = FIRST
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=rows, desc=text, unit=" rows", delay=5, leave=False)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def update(self, rows: int, tokens: int, computed: bool = True) -> None:
        """Count a batch.

        Args:
            rows: Its rows.
            tokens: Their tokens.
            computed: Whether the model has read it now.
        """
        self._rows, self._tokens = self._rows + rows, self._tokens + tokens
        self._computed += tokens * computed
        if self._bar is not None:
            self._bar.set_postfix_str(self._left(), refresh=False)
            self._bar.update(rows)
        elif time.monotonic() - self._said >= self._wait:
            self._said, self._wait = time.monotonic(), EVERY
            rank_zero_info(f"{self.text}: {self._rows:,} of {self.rows:,} rows, {self._left()}")

    def _left(self) -> str:
        if not self._computed:
            return "from before"
        rate = self._computed / max(time.monotonic() - self._begun, 1e-9)
        return f"{duration((self.tokens - self._tokens) / rate)} left"
