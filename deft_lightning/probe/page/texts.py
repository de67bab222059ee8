"""Rows as text: what is read, and the text of every token that is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from deft_lightning.annotations import Tokenizer
from deft_lightning.data.examples import Prepared
from deft_lightning.data.preview import HALF, letters
from deft_lightning.functional import IGNORE_INDEX
from deft_lightning.terminal import visible


class RowText(NamedTuple):
    """A row as it is shown.

    Attributes:
        text: Read and learnt text, in order; of a learnt token the label, which noise may have changed.
        runs: Numbers of letters that are read and of tokens that are learnt then, in turn. Letters are counted as a
            browser counts them, in units of UTF-16.
        lengths: Letters of each learnt token; 0 where the letter is complete only with the next token.
    """

    text: str
    runs: list[int]
    lengths: list[int]


class TextOfTokens:
    """Turns rows into text; the text of a token is looked up once.

    Args:
        tokenizer: Turns tokens into text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Behind another token: the first of a text may lose its space.
        self._anchor = list(tokenizer.encode("a", add_special_tokens=False))[-1:]
        self._before = tokenizer.decode(self._anchor)
        self._pieces: dict[int, str] = {}

    def row(self, example: Prepared) -> RowText:
        """Return an example as text."""
        learnt = example.labels != IGNORE_INDEX
        learnt[:1] = False  # nothing predicts the first token
        tokens = [int(label if keep else token) for label, token, keep in zip(
            example.labels, example.input_ids, learnt, strict=True
        )]  # fmt: skip
        parts, runs, lengths, start, kept = list[str](), list[int](), list[int](), 0, learnt.tolist()
        while start < len(tokens):
            end = start
            while end < len(tokens) and kept[end] == kept[start]:
                end += 1
            run = tokens[start:end]
            if not kept[start]:
                text = visible(self._tokenizer.decode(run) if not start else self._behind(run))
                parts.append(text)
                runs.append(_units(text))
            else:
                own = [visible(piece) for piece in self._split(run)]
                parts += own
                lengths += map(_units, own)
                runs += ([0] if not runs else []) + [end - start]
            start = end
        return RowText("".join(parts), runs, lengths)

    def piece(self, token: int) -> str:
        """Return the text of a token that stands behind another one."""
        if token not in self._pieces:
            self._pieces[token] = self._behind([token])
        return self._pieces[token]

    def _behind(self, run: Sequence[int]) -> str:
        text = str(self._tokenizer.decode([*self._anchor, *run]))
        return text[len(self._before) :] if text.startswith(self._before) else str(self._tokenizer.decode(list(run)))

    def _split(self, run: Sequence[int]) -> list[str]:
        pieces = [self.piece(token) for token in run]
        # What tokens say one by one is nearly always what they say together; half letters are the exception.
        if not any(HALF in piece for piece in pieces) and "".join(pieces) == self._behind(run):
            return pieces
        slow = [""] * len(run)
        skip = len(self._anchor)
        for start, end, text in letters(self._tokenizer, [*self._anchor, *run]):
            if start >= skip:
                slow[end - 1 - skip] = text
        return slow


def _units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2
