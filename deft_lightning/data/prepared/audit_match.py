"""Which training row a line of an audit names: by its content, and by file and row where content has another name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import PurePath

from deft_lightning.annotations import Record
from deft_lightning.data.examples import Example
from deft_lightning.data.prepared.origins import ROW, prompt_text
from deft_lightning.data.prepared.recipe import Recipe
from deft_lightning.data.prepared.split import View

MARK = r"</?[|\uff5c]?[^\W\d][\w\u2581|\uff5c.:-]{0,60}>|\[/?[A-Z]{2,12}\]"  # how special tokens are spelt
PROOF = 20  # letters that a cut answer must have to be known by


class Rows:
    """The training rows, to be found by what an audit says of them.

    Args:
        train: Training rows, before noise.
        validation: Validation rows: a row of an audit that is one of these is told apart from one that is gone.
        recipe: How the rows were read.
    """

    def __init__(self, train: View, validation: View, recipe: Recipe) -> None:
        self._train, self._recipe = train, recipe
        self._by_id = {id: at for at, id in enumerate(_ids(train))}
        self._held_out = set(_ids(validation))

    def find(self, record: Record) -> tuple[list[int], str]:
        """Return the positions of the rows that a line names, and why there is none.

        The id names the content, unless the rows bring ids of their own; then prompt and answer must agree as well. A
        line whose id is unknown, or that has none, names the row at its place if prompt and answer agree.
        """
        id = record.get("id")
        if isinstance(id, str) and (at := self._by_id.get(id)) is not None:
            problem = _differs(record, self._train[at], self._recipe)
            return ([], problem) if problem else ([at], "")
        if isinstance(id, str) and id in self._held_out:
            return [], "is a validation row now"
        if not isinstance(record.get("prompt"), str):
            return [], "no training row has this id"
        problem = "no training row has this id" if id is not None else "no training row has this place"
        for at in self._at_place(record):
            problem = _differs(record, self._train[at], self._recipe, by_place=True)
            if not problem:
                return [at], ""
        return [], problem

    def _at_place(self, record: Record) -> list[int]:
        file, row = record.get("file"), record.get("row")
        if not isinstance(file, str) or type(row) is not int:
            return []
        return self._by_place.get((file, row)) or self._by_place.get((PurePath(file).name, row), [])

    @cached_property
    def _by_place(self) -> dict[tuple[str, int], list[int]]:
        """Positions by file and row, and by the name of the file without its folder, which may have moved."""
        places: dict[tuple[str, int], list[int]] = {}
        for at, where in enumerate(self._wheres()):
            file, _, row = where.rpartition(ROW)
            if row.isdecimal():
                for name in {file, PurePath(file).name}:
                    places.setdefault((name, int(row)), []).append(at)
        return places

    def _wheres(self) -> Iterable[str]:
        every = list(self._train.rows.column("where"))
        return (every[row] for row in self._train.places.tolist())

    def with_copies(self, places: list[list[int]]) -> list[list[int]]:
        """Add to each line the copies that a weighted source gives of its row, but those that have lines themselves."""
        named = {at for own in places for at in own}
        wheres = list(self._wheres())
        copies: dict[str, list[int]] = {}
        for at, where in enumerate(wheres):
            if at not in named:
                copies.setdefault(where, []).append(at)
        return [[*own, *(copy for at in own for copy in self._same(copies.get(wheres[at], ()), at))] for own in places]

    def _same(self, copies: Iterable[int], at: int) -> list[int]:
        return [copy for copy in copies if self._train[copy].digest == self._train[at].digest]


def _ids(view: View) -> Iterable[str]:
    every = list(view.rows.column("id"))
    return (view.renamed.get(row, every[row]) for row in view.places.tolist())


def _differs(record: Record, example: Example, recipe: Recipe, by_place: bool = False) -> str:
    """Return in what a row is another one than the line of an audit says; empty where it is the same."""
    prompt, answer = record.get("prompt"), record.get("answer")
    if isinstance(prompt, str) and _words(prompt) != _words(prompt_text(example.prompt)):
        return "the row has another prompt now"
    content_is_id = example.digest in example.id and not by_place
    corrupted = bool(record.get("noise"))  # the audit shows what was learnt, not what the row says
    if isinstance(answer, str) and not content_is_id and not corrupted and not _answers(answer, example, recipe):
        return "the row has another answer now"
    return ""


def _answers(recorded: str, example: Example, recipe: Recipe) -> bool:
    """Return whether a recorded answer is what a row teaches, but for special tokens, blanks, and what was cut off."""
    messages = example.messages or ()
    spoken = [message for message in messages if message["role"] == "assistant"]
    if example.tokens is not None or any("tool_calls" in message for message in spoken):
        return True  # as text only a tokenizer or a template could write them
    known = _bare(recorded)
    if example.text is not None:  # nothing predicts its first token
        taught = _bare(example.text)
        return _cut(known, taught, recipe) or (taught.endswith(known) and len(taught) - len(known) <= PROOF)
    if recipe.supervise == "all":  # the template's names of roles are among them
        return all(_bare(message["content"]) in known for message in messages)
    said = [message["content"] for message in spoken]
    thought = [message.get("reasoning_content", "") + message["content"] for message in spoken]
    return any(_cut(known, _bare("".join(parts)), recipe) for parts in (said, said[-1:], thought, thought[-1:]))


def _cut(known: str, taught: str, recipe: Recipe) -> bool:
    """Return whether a text is another one, or what is left of it where it is cut."""
    left = taught.startswith(known) if recipe.keep == "start" else taught.endswith(known)
    return taught == known or (left and len(known) >= PROOF)


def _words(text: str) -> list[str]:
    return text.split()


def _bare(text: str) -> str:
    return "".join(re.sub(MARK, "", text).split())
