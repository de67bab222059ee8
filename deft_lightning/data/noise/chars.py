"""Noise on single characters: slips of the keyboard."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deft_lightning.answers.locate import HASHES, boxes
from deft_lightning.data.noise.base import ExampleNoise
from deft_lightning.data.noise.edits import Edit, apply_edits
from deft_lightning.hashing import stream

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _keyboard() -> dict[str, str]:
    """Return the letters around each one; a row stands half a key to the right of the one above."""
    near: dict[str, str] = {}
    for y, row in enumerate(ROWS):
        for x, letter in enumerate(row):
            around = [(y, x - 1), (y, x + 1), (y - 1, x), (y - 1, x + 1), (y + 1, x - 1), (y + 1, x)]
            near[letter] = "".join(ROWS[b][a] for b, a in around if 0 <= b < len(ROWS) and 0 <= a < len(ROWS[b]))
    return near | {letter.upper(): keys.upper() for letter, keys in near.items()}


KEYBOARD = _keyboard()


@dataclass(frozen=True)
class CharNoise(ExampleNoise):
    r"""Misspell: letters swapped with the next, left out, doubled, or hit on the key beside.

    Digits and final answers (a line with ``####``, what is in ``\boxed{...}`` or ``\fbox{...}``) stay as they are.
    The letters that are new are flagged, and for one that is missing what follows it. What a lower error rate changes,
    a higher one does too, though a swap may turn into another slip.

    Args:
        rate: Share of examples, in ``[0, 1]``.
        cer: Slips per letter of a selected response, in ``(0, 1]``; at least one where there is a letter at all.
        exact: Corrupt exactly ``floor(rate * n)`` of the ``n`` responses that have a letter.
    """

    rate: float = 1.0
    cer: float = 0.05
    exact: bool = False

    def __post_init__(self) -> None:
        """Refuse rates that mean nothing."""
        super().__post_init__()
        self._refuse_unless(0.0 < self.cer <= 1.0, f"cer {self.cer} is outside (0, 1]")

    def edit(self, salt: str, example_id: str, response: str, prompt: str) -> list[Edit] | None:
        """Return the slips."""
        letters = _letters(response)
        if not letters:
            return None
        where = stream(salt, example_id, "where").random(len(letters))
        what = stream(salt, example_id, "what").random((len(letters), 2))
        hit = set(np.flatnonzero(where < self.cer).tolist()) or {int(where.argmin())}
        edits = []
        for i in sorted(hit):
            # The next letter may be swapped in if it is beside this one and has no slip of its own.
            free = i + 1 < len(letters) and letters[i + 1] == letters[i] + 1 and i + 1 not in hit
            edits.append(_slip(response, letters[i], free, *what[i]))
        text, _ = apply_edits(response, edits, 1, [])
        if text.strip() and text != response:
            return edits
        # Nothing is left, or one slip undid another ("aa": doubled, then left out): a single one does neither.
        at = letters[min(hit)]
        return [Edit(at + 1, at + 1, response[at])]


def _slip(text: str, at: int, free: bool, kind: float, which: float) -> Edit:
    letter = text[at]
    kinds = ["delete", "double"]
    if letter in KEYBOARD:
        kinds.append("beside")
    if free and text[at + 1] != letter:
        kinds.append("swap")
    match kinds[int(kind * len(kinds))]:
        case "swap":
            return Edit(at, at + 2, text[at + 1] + letter)
        case "beside":
            keys = KEYBOARD[letter]
            return Edit(at, at + 1, keys[int(which * len(keys))])
        case "double":
            return Edit(at + 1, at + 1, letter)
        case _:
            return Edit(at, at + 1, "")


def _letters(text: str) -> list[int]:
    kept = [hit.span() for hit in HASHES.finditer(text)]
    # The command itself is kept as well: a misspelt one is no answer.
    kept += [(box.command, len(text) if box.end < 0 else box.end) for box in boxes(text)]
    open_to = [True] * len(text)
    for start, end in kept:
        open_to[start:end] = [False] * (end - start)
    return [i for i, letter in enumerate(text) if open_to[i] and letter.isalpha()]
