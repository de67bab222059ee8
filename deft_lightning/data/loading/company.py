"""Answers in company: behind a few other answers and without their prompts, so that a model sees what answers are like.

What a model says of an answer that stands alone is mostly surprise at the format: which words answers begin with, how
long they are, what they are about. Any prompt of the file takes that surprise away, also from an answer that belongs to
another prompt. After a few other answers there is none, and what a prompt adds is what it asks.

All answers of a source stand behind the same others, so that a model has to read these once a batch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from deft_lightning.data.examples import Ints, Prepared, Unprompted
from deft_lightning.data.loading.unprompted import LOOKED_AT, Frame, first_learnt, frame_of, without_prompt
from deft_lightning.functional import IGNORE_INDEX

ROOM = 64  # tokens of other answers that are read first
NOTHING = np.zeros(0, dtype=np.int64)


class _Turn(NamedTuple):
    """An answer with its header.

    Attributes:
        at: Position of its example.
        tokens: Without what every row begins with.
    """

    at: int
    tokens: Ints


class _Ahead(NamedTuple):
    """Other answers.

    Attributes:
        members: Positions of their examples.
        tokens: Theirs, the nearest last.
    """

    members: frozenset[int]
    tokens: Ints


class Company:
    """Puts each answer of a split behind other answers of it, without its prompt.

    Of each source there are two rows of other answers: one for all of its answers, and one for those that stand in the
    first. Who stands there is a function of the examples alone.

    Args:
        count: Examples of the split.
        example: Returns the one at a position.
        lengths: Tokens of each, shape ``(count,)``.
        limit: Tokens that the model has positions for; None where nothing limits them.
        most: Labels after which an answer ends; None for whole answers.

    Attributes:
        frame: What nine of ten prompts share: it stays.
        ahead: Tokens of other answers in front of each.
        looked: Examples that were looked at.
        whole: How many of them have no prompt that could be left out.
    """

    def __init__(
        self, count: int, example: Callable[[int], Prepared], lengths: Ints, limit: int | None = None,
        most: int | None = None,
    ) -> None:  # fmt: skip
        self._most = most
        drawn = np.random.default_rng(count).permutation(count)[:LOOKED_AT].tolist()
        few = {at: example(at) for at in drawn}
        self.frame, self.looked = frame_of(list(few.values())), len(few)
        self._front = _front(list(few.values()), self.frame.before)
        turns: dict[int, list[_Turn]] = defaultdict(list)
        for at, one in few.items():
            if (bare := self._bare(one)) is not None:
                turns[one.source].append(_Turn(at, bare[0]))
        self.whole = self.looked - sum(map(len, turns.values()))
        self._sources = sorted(turns)
        rows = [row for source in self._sources for row in _both(source, turns)]
        self.ahead = min(
            [ROOM if rows else 0, *(len(row.tokens) for row in rows), *self._room(example, lengths, limit)]
        )
        self._rows = [_Ahead(row.members, self._behind_front(row.tokens)) for row in rows]
        self._alone = self._behind_front(NOTHING)

    def of(self, at: int, example: Prepared) -> Unprompted:
        """Return an example's answer without its prompt, and what stands in front of it; nothing without a prompt.

        Args:
            at: Its position.
            example: It, as it is trained on in an epoch.
        """
        bare = self._bare(example, self._most) or (NOTHING, NOTHING)
        # An answer of a source that was not looked at stands behind those of the first.
        place = 2 * self._sources.index(example.source) if example.source in self._sources else 0
        if not self._rows:
            return Unprompted(*bare, self._alone, len(self._front), 0)
        place += at in self._rows[place].members
        return Unprompted(*bare, self._rows[place].tokens, len(self._front), place)

    def _bare(self, example: Prepared, most: int | None = None) -> tuple[Ints, Ints] | None:
        """Return tokens and labels of an answer with its headers; None without a prompt that could be left out."""
        if without_prompt(example, self.frame) is None:
            return None
        row = without_prompt(example, Frame(0, self.frame.after))
        assert row is not None  # less of it stays than above
        learnt = np.flatnonzero(row.labels != IGNORE_INDEX)[:most]
        return row.input_ids[: learnt[-1] + 1], row.labels[: learnt[-1] + 1]

    def _behind_front(self, tokens: Ints) -> Ints:
        return np.concatenate([self._front, tokens[len(tokens) - self.ahead :]])

    def _room(self, example: Callable[[int], Prepared], lengths: Ints, limit: int | None) -> list[int]:
        """Return how many tokens the model has positions for beside frame and longest answer; nothing if all fit."""
        if limit is None:
            return []
        room = limit - len(self._front)
        long = np.flatnonzero(lengths > room - ROOM).tolist()
        rows = (self._bare(example(at), self._most) for at in long)
        return [max(0, room - len(row[0])) for row in rows if row is not None]


def _front(examples: Sequence[Prepared], before: int) -> Ints:
    """Return the tokens that most rows begin with."""
    begins = Counter(
        tuple(example.input_ids[:before].tolist()) for example in examples if first_learnt(example.labels) >= before
    )
    return np.array(begins.most_common(1)[0][0] if begins else [], dtype=np.int64)


def _both(source: int, turns: dict[int, list[_Turn]]) -> tuple[_Ahead, _Ahead]:
    """Return what stands ahead of the answers of a source, and ahead of those that stand there."""
    own = turns[source]
    others = [turn for other, those in turns.items() if other != source for turn in those]
    first = _joined([*own[: max(1, len(own) // 2)], *others])
    return first, _joined([*(turn for turn in own if turn.at not in first.members), *others])


def _joined(turns: Sequence[_Turn]) -> _Ahead:
    """Return as many answers as there is room for, the first one last."""
    taken: list[_Turn] = []
    for turn in turns:
        if sum(len(other.tokens) for other in taken) >= ROOM:
            break
        taken.insert(0, turn)
    return _Ahead(frozenset(turn.at for turn in taken), np.concatenate([NOTHING, *(turn.tokens for turn in taken)]))


def written_out(answer: Unprompted) -> tuple[Ints, Ints]:
    """Return tokens and labels of a row that has everything in it: what stands in front, and the answer."""
    labels = np.concatenate([np.full(len(answer.ahead), IGNORE_INDEX, dtype=np.int64), answer.labels])
    return np.concatenate([answer.ahead, answer.input_ids]), labels
