"""How values are written into a card: nothing in them is markup, and no place on the machine of the run is told."""

from __future__ import annotations

import re
from collections.abc import Mapping

from deft_lightning.terminal import visible

LONGEST = 600  # characters of a value
# A path from the root, the home folder or a drive; not the path of an address, and not the slash between two words.
PART = r"[^\s'\"`,;()\[\]{}|<>/\\]+"
PATH = re.compile(rf"(?<![\w:/\\.<&~])(?:(?:~|[A-Za-z]:)[/\\]|/)(?:{PART}[/\\]+)*({PART})")


def code(text: str) -> str:
    """Return text as a span of code: one line, in which nothing is markup."""
    shown = " ".join(visible(str(text)).split()).replace("`", "'").replace("|", "\\|")
    return f"`{shown if len(shown) <= LONGEST else f'{shown[: LONGEST - 1]}…'}`"


def paths_shortened(text: str) -> str:
    """Return text with every absolute path replaced by its last part."""
    return PATH.sub(r"\1", text)


def table(rows: Mapping[str, str]) -> str:
    """Return a table of two columns without a header."""
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def number(value: float) -> str:
    """Return a figure with four digits."""
    return f"{value:.4g}"
