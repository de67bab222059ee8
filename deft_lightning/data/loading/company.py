"""Answers in company: one after another without their prompts, so that a model sees what answers of a file are like.

What a model says of an answer that stands alone is mostly surprise at the format: which words answers begin with, how
long they are, what they are about. Any prompt of the file takes that surprise away, also from an answer that belongs to
another prompt. After a few other answers there is none, and what a prompt adds is what it asks. A model that has seen
single rows alone makes nothing of others in front: it reads each answer alone (:func:`better_read`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from deft_lightning.data.examples import Floats, Ints, Prepared
from deft_lightning.data.loading.unprompted import Frame, first_learnt, without_prompt
from deft_lightning.functional import IGNORE_INDEX

MEMBERS = 16  # answers of a group
AHEAD, AHEAD_TOKENS = 4, 64  # other answers that are read before the first one of a chain, and their tokens, at most
LONGEST = 384  # tokens of a chain, unless one answer is longer
TRIED = 2  # groups that are read both ways


class Group(NamedTuple):
    """Examples that are read together.

    Attributes:
        ahead: Positions of examples that are only read.
        members: Positions of those whose answers are judged.
    """

    ahead: tuple[int, ...]
    members: tuple[int, ...]


class Chain(NamedTuple):
    """Answers one after another, in one row.

    Attributes:
        row: The row; its labels are those of the members.
        members: Position of each example that is judged, in order.
        counts: Labels of each.
    """

    row: Prepared
    members: tuple[int, ...]
    counts: tuple[int, ...]


class _Turn(NamedTuple):
    """An answer with its header.

    Attributes:
        at: Position of its example.
        row: The example without its prompts.
        before: First tokens of that, which every row begins with.
    """

    at: int
    row: Prepared
    before: int

    @property
    def tokens(self) -> Ints:
        """Return its tokens, without what every row begins with."""
        return self.row.input_ids[self.before :]


def groups_of(positions: Sequence[int]) -> list[Group]:
    """Return the examples in groups, in an order that is drawn: neighbours in a file may be of one kind.

    Who meets whom is a function of the positions alone. An example is never ahead of itself.

    Args:
        positions: Of the examples, each once.
    """
    count = len(positions)
    drawn = [positions[place] for place in np.random.default_rng(count).permutation(count)]
    size = max(1, min(MEMBERS, count // 2))
    groups = []
    for start in range(0, count, size):
        members = tuple(drawn[start : start + size])
        ahead = tuple(drawn[place % count] for place in range(start - min(AHEAD, count - len(members)), start))
        groups.append(Group(ahead, members))
    return groups


def chains_of(
    group: Group, example: Callable[[int], Prepared], frame: Frame, limit: int | None = None
) -> tuple[list[Chain], tuple[int, ...]]:
    """Return the answers of a group in as few rows as hold them.

    Each row begins with the frame that all prompts share, and with a few other answers, of which nothing is learnt. An
    example without a prompt that could be left out is a row of its own, as it is.

    Args:
        group: The examples.
        example: Returns the one at a position.
        frame: What prompts share.
        limit: Tokens that the model has positions for; None where nothing limits them.

    Returns:
        The rows, and the positions of members without a prompt that could be left out.
    """
    bare = {at: without_prompt(example(at), frame) for at in (*group.ahead, *group.members)}
    turns = {
        at: _Turn(at, row, min(frame.before, first_learnt(row.labels))) for at, row in bare.items() if row is not None
    }
    read = [turns[at] for at in group.ahead if at in turns]
    room = min(LONGEST, limit or LONGEST)
    chains, ahead, members = list[Chain](), list[Ints](), list[_Turn]()
    # Answers of one source after each other: those of another may look different.
    for turn in sorted((turns[at] for at in group.members if at in turns), key=lambda turn: turn.row.source):
        own = len(turn.row.input_ids)
        if members and own + sum(map(len, (*ahead, *(part.tokens for part in members)))) > room:
            chains.append(_chain(ahead, members))
            members = []
        if not members:
            ahead = _latest(read, AHEAD_TOKENS if limit is None else min(AHEAD_TOKENS, limit - own))
        members.append(turn)
        read.append(turn)
    if members:
        chains.append(_chain(ahead, members))
    whole = tuple(at for at in group.members if at not in turns)
    for at, row in ((at, example(at)) for at in whole):
        chains.append(Chain(row, (at,), (int((row.labels[1:] != IGNORE_INDEX).sum()),)))
    return chains, whole


def better_read(groups: list[Group], log_prob: Callable[[Sequence[Group]], float]) -> list[Group]:
    """Return groups as the model reads them better: as they are, or each answer alone.

    Args:
        groups: As :func:`groups_of` returns them; the first :data:`TRIED` are read both ways.
        log_prob: Returns ``sum log q`` of the labels of all members, in nats.
    """
    tried = groups[:TRIED]
    return apart(groups) if log_prob(apart(tried)) > log_prob(tried) else groups


def apart(groups: Sequence[Group]) -> list[Group]:
    """Return the same examples in the same order, each a group of its own with nothing ahead of it."""
    return [Group((), (at,)) for group in groups for at in group.members]


def by_member(chains: Sequence[Chain], rows: Sequence[Floats]) -> dict[int, Floats]:
    """Return the values of each example, from those of all labels of each row."""
    values = dict[int, Floats]()
    for chain, row in zip(chains, rows, strict=True):
        values |= dict(zip(chain.members, np.split(row, np.cumsum(chain.counts)[:-1]), strict=True))
    return values


def _latest(read: Sequence[_Turn], room: int) -> list[Ints]:
    """Return the last answers that were read, as many as fit; of one that alone is too long, its end."""
    latest = list[Ints]()
    for turn in reversed(read[-AHEAD:]):
        if latest and len(turn.tokens) > room:
            break
        if room > 0:
            latest.append(turn.tokens[-room:])
            room -= len(latest[-1])
    return latest[::-1]


def _chain(ahead: Sequence[Ints], members: Sequence[_Turn]) -> Chain:
    first = members[0]
    ids = np.concatenate([first.row.input_ids[: first.before], *ahead, *(turn.tokens for turn in members)])
    judged = np.concatenate([turn.row.labels[turn.before :] for turn in members])
    labels = np.concatenate([np.full(len(ids) - len(judged), IGNORE_INDEX, dtype=judged.dtype), judged])
    row = replace(
        first.row, input_ids=ids, labels=labels, noise_code=np.zeros_like(labels), clean_labels=None, weight=None
    )
    counts = tuple(int((turn.row.labels != IGNORE_INDEX).sum()) for turn in members)
    return Chain(row, tuple(turn.at for turn in members), counts)
