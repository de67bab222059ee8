"""Edits of a response, and the record of which of its characters are no longer the clean ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from deft_lightning.errors import UserError


class Edit(NamedTuple):
    """Replace ``response[start:end]`` by ``text``; an empty ``text`` deletes, ``start == end`` inserts."""

    start: int
    end: int
    text: str


class Mark(NamedTuple):
    """Characters ``[start, end)`` of a response were written by operation ``code``.

    A mark without width is a cut: something is missing before ``start``. It belongs to the character that follows,
    or to the end of the turn where none does.
    """

    start: int
    end: int
    code: int


def apply_edits(text: str, edits: Sequence[Edit], code: int, marks: Sequence[Mark]) -> tuple[str, list[Mark]]:
    """Edit a response and carry its marks along.

    Args:
        text: The response as earlier operations left it.
        edits: Sorted, disjoint and within the text; one that replaces text by itself is passed over.
        code: Place of the operation, from 1.
        marks: What earlier operations corrupted, disjoint, in characters of ``text``.

    Returns:
        The new text and its marks in order. Of an earlier mark remains what no edit replaced, moved to where it is
        now; a cut goes with the character behind it and is gone with it. Of two cuts in one place the later counts.

    Raises:
        UserError: The edits overlap, are out of order or reach beyond the text.
    """
    edits = [edit for edit in edits if text[edit.start : edit.end] != edit.text]
    parts: list[str] = []
    moved: list[Mark] = []
    cuts: dict[int, int] = {}
    at = shift = 0
    for edit in [*edits, None]:
        start, end, new = edit if edit is not None else (len(text), len(text), "")
        if not at <= start <= end <= len(text):
            raise UserError(f"noise: edit [{start}, {end}) overlaps another or leaves the text (--data.noise.ops)")
        parts += [text[at:start], new]
        for mark in marks:
            if mark.start == mark.end:
                # The end of the text is a place of its own that no edit removes.
                if at <= mark.start < start or (edit is None and mark.start == len(text)):
                    cuts.setdefault(mark.start + shift, mark.code)
            elif max(mark.start, at) < min(mark.end, start):
                moved.append(Mark(max(mark.start, at) + shift, min(mark.end, start) + shift, mark.code))
        if edit is not None:
            if new:
                moved.append(Mark(start + shift, start + shift + len(new), code))
            else:
                cuts[start + shift] = code
            at, shift = end, shift + len(new) - (end - start)
    moved += [Mark(place, place, by) for place, by in cuts.items()]
    return "".join(parts), sorted(moved)


def whole(text: str, code: int) -> list[Mark]:
    """Return the marks of a response that is another one altogether: its text, and the end of its turn."""
    return [Mark(0, len(text), code), Mark(len(text), len(text), code)]
