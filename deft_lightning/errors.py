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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean A or B?"`` for the names closest to ``word``, or an empty string.

    Args:
        word: What was typed.
        known: The names that would have been accepted.
    """
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(by_lower[name] for name in close)}?" if close else ""
