"""The one exception a user is meant to read: a single line that says what to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from deft_lightning.terminal import visible


class UserError(ValueError):
    """A mistake in options, files or data, told in one line; the command line prints it without a traceback.

    Texts of strangers in the message (rows, names of files, errors of templates) are shown by
    :func:`~deft_lightning.terminal.visible`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(visible(" ".join(str(message).split())))


def reason_of(error: BaseException) -> str:
    """Return why something failed, in a line: the first of a library's message, and the next where it ends in a colon.

    The lines behind are advice or tables. An error without a message is told by its kind.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    parts: list[str] = []
    for line in lines:
        parts.append(line)
        if not line.endswith(":"):
            break
    return " ".join(parts) or type(error).__name__


def did_you_mean(word: str, known: Iterable[str], most: int = 3) -> str:
    """Return ``" Did you mean A or B?"`` for the names closest to ``word``, or an empty string.

    Args:
        word: What was typed.
        known: The names that would have been accepted.
        most: How many names to suggest.
    """
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=most, cutoff=0.6)
    return f" Did you mean {' or '.join(by_lower[name] for name in close)}?" if close else ""
