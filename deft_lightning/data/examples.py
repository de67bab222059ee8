"""The three states of a row: an example that was read, one that is prepared to train on, a prompt to generate for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deft_lightning.functional import IGNORE_INDEX

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
# role and content, both text; of an assistant also reasoning_content, tool_calls and weight (of what is learnt, 1 where
# it is absent); of a tool also name and tool_call_id.
Message = dict[str, Any]
Tool = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One normalised example. Exactly one of ``messages``, ``text`` and ``tokens`` is set.

    Attributes:
        id: Unique and independent of the row's position: the record's own ``id``, or a hash of its content.
        digest: Hash of the content alone; decides the split, so that duplicates stay on one side.
        where: File and row, for error messages.
        messages: Conversation with roles system, user, assistant, tool. ``content`` is always text, empty where an
            assistant's turn has ``tool_calls`` only.
        text: Raw text, supervised as a whole.
        tokens: ``(input_ids, labels)``, labels -100 where not supervised.
        tools: Descriptions of the functions that the assistant may call, for the chat template.
        weight: Factor on the loss of everything that the example teaches, at least 0.
        token_weights: One more factor for each of ``tokens``; None where nothing gives any.
        source: Place of its source among those that are read, from 0.
    """

    id: str
    digest: str
    where: str
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    tokens: tuple[list[int], list[int]] | None = None
    tools: tuple[Tool, ...] | None = None
    weight: float = 1.0
    token_weights: list[float] | None = None
    source: int = 0

    @property
    def response(self) -> str | None:
        """Return what the last assistant turn says, if the conversation ends with one; None where that calls a tool."""
        if self._answered and "tool_calls" not in (last := (self.messages or ())[-1]):
            return str(last["content"])
        return None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Return the conversation before the last assistant turn; empty for text and tokens."""
        messages = self.messages or ()
        return messages[:-1] if self._answered else messages

    @property
    def _answered(self) -> bool:
        return bool(self.messages) and (self.messages or ())[-1]["role"] == "assistant"


class Unprompted(NamedTuple):
    """The answer of an example without its prompt, and what a model reads before it.

    Attributes:
        input_ids: Its tokens with the headers of its turns, shape ``(S,)``; none where there is no prompt to leave out.
        labels: What is learnt of them, -100 where nothing is; all labels of the example, in order.
        ahead: Tokens in front of it: the frame that all prompts share, and other answers.
        frame: How many of those are the frame.
        key: The same number, the same ``ahead``.
    """

    input_ids: Ints
    labels: Ints
    ahead: Ints
    frame: int
    key: int


@dataclass(frozen=True, eq=False)
class Prepared:
    """One example ready to train on; every array has shape ``(T,)``.

    Attributes:
        id: Example id.
        input_ids: Tokens.
        labels: What is learnt at each token (aligned with ``input_ids``, not shifted), -100 where nothing is.
        noise_code: 0 where the label is clean, else the place of the corrupting operation, from 1.
        clean_labels: What the labels were before token noise, -100 where the text itself was corrupted; None where no
            token noise was applied.
        skipped: Supervised tokens that truncation cut off before the first of these.
        weight: Factor on the loss of each label, float32: finite, above 0 where the label is learnt and 0 where it is
            -100, so that a weight of 0 is a masked label and nothing else. None where every label counts 1.
        source: Place of its source among those that are read, from 0.
        unprompted: Its answer without the prompt; None where nobody asks what a model says of that.
    """

    id: str
    input_ids: Ints
    labels: Ints
    noise_code: Ints
    clean_labels: Ints | None = None
    skipped: int = 0
    weight: Floats | None = None
    source: int = 0
    unprompted: Unprompted | None = None

    def truncate(self, length: int, keep: str = "start") -> Prepared:
        """Return the first ``length`` tokens, or the last; nothing predicts the first token that is left."""
        if len(self.input_ids) <= length:
            return self
        part = slice(0, length) if keep == "start" else slice(len(self.input_ids) - length, None)
        labels = self.labels[part].copy()
        labels[:1] = IGNORE_INDEX
        codes = np.where(labels == IGNORE_INDEX, 0, self.noise_code[part])
        skipped = (
            int((self.labels != IGNORE_INDEX).sum() - (self.labels[part][1:] != IGNORE_INDEX).sum())
            if part.start
            else 0
        )
        weight = None if self.weight is None else weight_of(labels, self.weight[part])
        return Prepared(
            self.id, self.input_ids[part], labels, codes, skipped=skipped, weight=weight, source=self.source
        )

    @property
    def clean(self) -> Ints:
        """Return the labels that are right, -100 where none is known."""
        if self.clean_labels is not None:
            return self.clean_labels
        return np.where(self.noise_code == 0, self.labels, IGNORE_INDEX)


def weight_of(labels: Ints, weight: Floats | None) -> Floats:
    """Return what each label counts, float32, 0 where nothing is learnt.

    Args:
        labels: Shape ``(T,)``, -100 where nothing is learnt.
        weight: Shape ``(T,)``; None where every label counts 1.
    """
    learnt = labels != IGNORE_INDEX
    return learnt.astype(np.float32) if weight is None else np.where(learnt, weight, 0).astype(np.float32)


@dataclass(frozen=True)
class Prompt:
    """One example to generate for: the tokens before the last assistant turn, and that turn if it is known.

    Attributes:
        id: Example id.
        input_ids: Tokens.
        text: The same as text.
        gold: The right answer.
        record: What else a benchmark's grader needs, such as options.
    """

    id: str
    input_ids: list[int]
    text: str
    gold: str | None
    record: Mapping[str, Any] = field(default_factory=dict)
