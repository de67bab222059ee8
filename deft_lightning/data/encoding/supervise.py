"""Which tokens are learnt, and which of them are noise: spans and marks of letters become those of tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deft_lightning.data.encoding.offsets import before
from deft_lightning.data.encoding.spans import Rendering
from deft_lightning.data.encoding.thoughts import Reasoning
from deft_lightning.data.examples import Example, Ints
from deft_lightning.data.noise.edits import Mark

Supervise = Literal["assistant", "last", "all"]
SpecialTokens = Literal["text", "token"]
Offsets = Sequence[tuple[int, int]]  # first letter of each token, and the one behind its last
NOT_SUPERVISED = -1


@dataclass(frozen=True)
class Teaching:
    """What of a conversation is learnt.

    Attributes:
        supervise: Every assistant turn, the last one, or all tokens.
        reasoning: What becomes of ``reasoning_content``: the template writes it, the text holds it, or it is left out.
        supervise_reasoning: Whether it is learnt, or read like a prompt.
        special_tokens: Whether special tokens that a message spells are its letters, or those tokens.
    """

    supervise: Supervise = "assistant"
    reasoning: Reasoning = "template"
    supervise_reasoning: bool = True
    special_tokens: SpecialTokens = "text"

    def turns(self, example: Example) -> list[int]:
        """Return the numbers of the messages that are learnt."""
        spoken = [i for i, m in enumerate(example.messages or ()) if m["role"] == "assistant"]
        spoken = spoken if self.supervise == "assistant" else spoken[-1:]
        return [i for i in spoken if (example.messages or ())[i].get("weight", 1.0) > 0]


def reaches_across(rendering: Rendering, offsets: Offsets) -> bool:
    """Return whether a token begins before a turn and ends in it: generation would begin there."""
    for start, _, _ in rendering.spans:
        first = before(offsets, start)
        if first and offsets[first - 1][1] > start:
            return True
    return False


def turns(rendering: Rendering, ids: Sequence[int], offsets: Offsets, ends: frozenset[int]) -> Ints:
    """Return the number of the message that each token belongs to, -1 where it is not of the assistant.

    A turn is from the first token that starts in its span, up to the first that starts behind it. Where the template
    does not mark its turns, one ends with its last special token, so that a separator after the end is not learnt.

    Args:
        rendering: The conversation as text, with its spans.
        ids: Tokens of the text.
        offsets: Letters of each of them.
        ends: Tokens that stand outside the text.

    Returns:
        Shape ``(T,)``.
    """
    turn = np.full(len(ids), NOT_SUPERVISED, dtype=np.int64)
    for start, end, i in rendering.spans:
        first, last = before(offsets, start), before(offsets, end)
        if not rendering.tagged:
            # Only blanks may follow the end of the turn: a template may put special tokens inside the turn as well.
            closing = next((at for at in range(last - 1, first - 1, -1) if ids[at] in ends), None)
            if closing is not None and not rendering.text[offsets[closing][1] : end].strip():
                last = closing + 1
        turn[first:last] = i
    return turn


def noise_codes(
    rendering: Rendering, offsets: Offsets, turn: Ints, content: str, last: int, marks: Sequence[Mark]
) -> Ints:
    """Return the code of each token of a conversation whose last turn holds noise, 0 where it is clean.

    A token is noisy when it holds a letter of a mark, or a cut is inside it. A cut between two tokens, and a mark that
    no token holds, flags the next supervised token: at the end of the response, the end of the turn. Of several
    operations the last counts. Where all of the response and its end are marked, so is every supervised token of the
    turn; and so it is, with the last code, where the template writes the response in a way that cannot be found.

    Args:
        rendering: The conversation as text.
        offsets: Letters of each token.
        turn: Shape ``(T,)``, of :func:`turns`.
        content: The response.
        last: Number of its message.
        marks: Noise in it.

    Returns:
        Shape ``(T,)``.
    """
    codes = np.zeros(len(turn), dtype=np.int64)
    if not marks:
        return codes
    supervised = np.flatnonzero(turn == last)
    end_code = next((mark.code for mark in marks if mark.start == len(content)), 0)
    if end_code and sum(mark.end - mark.start for mark in marks) == len(content):
        codes[supervised] = end_code
    places = _places(rendering, content, last)
    if places is None:
        codes[supervised] = max(mark.code for mark in marks)
    elif supervised.size:
        starts, ends = np.array(list(offsets), dtype=np.int64).reshape(-1, 2)[supervised].T
        for mark in sorted(marks, key=lambda mark: mark.code):
            start, end = places[mark.start], places[mark.end]
            if mark.start < mark.end and start == end:
                continue  # blanks that the template strips
            hit = (starts < end) & (ends > start)
            if not hit.any():
                hit[min(int(np.searchsorted(ends, start, side="right")), len(ends) - 1)] = True
            codes[supervised[hit]] = mark.code
    return codes


def _places(rendering: Rendering, content: str, turn: int) -> Ints | None:
    """Return where each letter of a message, and its end, stands in the text; None where that cannot be told."""
    spans = [(start, end) for start, end, i in rendering.spans if i == turn]
    if not spans:
        return None
    first, written_turn = spans[0][0], rendering.text[spans[0][0] : spans[-1][1]]
    letters, stripped = np.arange(len(content) + 1), content.strip()
    inside = (letters - (len(content) - len(content.lstrip()))).clip(0, len(stripped))
    ways = [(content, letters), (stripped, inside)]
    for ascii_only in (False, True):  # as the tojson of chat templates writes it, and as that of Jinja does
        escaped = [json.dumps(letter, ensure_ascii=ascii_only)[1:-1] for letter in stripped]
        ways.append(("".join(escaped), np.cumsum([0, *map(len, escaped)])[inside]))
    for written, at in ways:
        start = written_turn.find(written)
        # Twice is once too often, unless the first one opens the turn.
        if start >= 0 and (not written_turn[:start].strip() or written_turn.find(written, start + 1) < 0):
            return first + start + at
    return None


def learnt(turn: Ints, supervise: Supervise) -> NDArray[np.bool_]:
    """Return which tokens of a conversation are learnt.

    Args:
        turn: Shape ``(T,)``, of :func:`turns`.
        supervise: Every assistant turn, the last one, or all tokens.
    """
    if supervise == "all":
        return np.ones(turn.shape, dtype=bool)
    supervised = turn != NOT_SUPERVISED
    if supervise == "last":
        supervised &= turn == turn.max(initial=NOT_SUPERVISED)
    return supervised


def weights_of(example: Example, turn: Ints) -> NDArray[np.float64] | None:
    """Return how much each token weighs: its row, times its turn, times itself.

    Args:
        example: The row.
        turn: Shape ``(T,)``, of :func:`turns`.

    Returns:
        Shape ``(T,)``; at least 0. None where nothing says anything else than 1.
    """
    messages = example.messages or ()
    if example.weight == 1 and example.token_weights is None and not any("weight" in said for said in messages):
        return None
    if example.token_weights is not None:
        return example.weight * np.array(example.token_weights, dtype=np.float64)
    of_message = [message.get("weight", 1.0) for message in messages]
    if not of_message:
        return np.full(turn.shape, example.weight)
    return example.weight * np.array([*of_message, 1.0])[turn]  # what belongs to no turn, -1, has the last entry
