"""A bar for what takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(items: Iterable[Any] | None, text: str, total: int | None = None) -> Any:
    """Show a bar if this takes more than a few seconds and somebody looks."""
    return tqdm(items, desc=text, total=total, delay=5, unit=" rows", leave=False, disable=not sys.stderr.isatty())
