"""Where the training rows come from: file, row number and prompt of each example, by its id."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from deft_lightning.data.examples import Message
from deft_lightning.data.prepared.findings import Findings
from deft_lightning.data.prepared.recipe import Recipe
from deft_lightning.data.prepared.split import split_rows

ROW = ", row "  # between file and number in what readers say of a row


class Origin(NamedTuple):
    """Where an example was read.

    Attributes:
        where: File and row, as in messages.
        prompt: What stands before the last answer: the text of a single turn, else a line a turn with its role.
    """

    where: str
    prompt: str

    @property
    def file(self) -> str:
        """Return the file, or what else the row was read from."""
        return self.where.rpartition(ROW)[0] or self.where

    @property
    def row(self) -> int | None:
        """Return its number there, from 1; None where rows have none."""
        number = self.where.rpartition(ROW)[2]
        return int(number) if number.isdecimal() else None


def origins(recipe: Recipe, wanted: Collection[str] | None = None) -> dict[str, Origin]:
    """Return where the training examples come from, by id. The rows are read once more, and split as in preparation.

    Args:
        recipe: Says which rows.
        wanted: Ids of the examples; None for all.
    """
    with tempfile.TemporaryDirectory(prefix="deft_lightning") as folder:
        rows = split_rows(recipe, Path(folder), Findings())["train"]
        found = {}
        for example in rows:
            if wanted is None or example.id in wanted:
                found[example.id] = Origin(example.where, prompt_text(example.prompt))
    return found


def prompt_text(prompt: Sequence[Message]) -> str:
    """Return a prompt as one text: a single turn as it is, several as a line a turn with its role."""
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
