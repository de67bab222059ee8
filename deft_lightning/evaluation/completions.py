"""Completions by prompt, whatever the order in which they are made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from deft_lightning.annotations import Batch, Tokenizer

WINDOW = 16  # batches within which prompts are sorted by length


class Completion(NamedTuple):
    """One sample: its text without the end token, and whether a length limit cut it off."""

    text: str
    truncated: bool


class Ask(NamedTuple):
    """A prompt to complete: its id, its tokens, and its place among all prompts."""

    id: str
    input_ids: list[int]
    number: int = 0


@dataclass
class Row:
    """One sample of a prompt, and the tokens it has so far."""

    ask: Ask
    sample: int
    tokens: list[int] = field(default_factory=list)
    key: int = 0


class Steps(Protocol):
    """Completes prompts: in each step some, in an order of its own."""

    def step(self, waiting: deque[Ask]) -> list[Row]:
        """Take prompts from ``waiting``, and return samples that are done."""


class Completions:
    """Completions of prompts that are known ahead; none is made before one is asked for.

    Prompts of similar length are read together, the longest first, so that little of a batch is padding. They are
    sorted within :data:`WINDOW` batches, so that the first batch is done long before the last.

    Args:
        asks: The prompts, in the order in which they will be asked for.
        steps: Completes them.
        tokenizer: Decodes.
        stops: Tokens that end a completion.
        samples: Completions per prompt.
        places: Prompts of a batch.

    Attributes:
        done: Prompts completed so far.
        tokens: Tokens of their completions, end tokens included.
    """

    def __init__(
        self, asks: Sequence[Ask], steps: Steps, tokenizer: Tokenizer, stops: Iterable[int], samples: int, places: int
    ) -> None:
        self._steps, self._tokenizer, self._stops, self._samples = steps, tokenizer, frozenset(stops), samples
        asks = [ask._replace(number=number) for number, ask in enumerate(asks)]
        self._number = {ask.id: ask.number for ask in asks}
        windows = range(0, len(asks), WINDOW * places)
        ordered = (sorted(asks[i : i + WINDOW * places], key=lambda ask: -len(ask.input_ids)) for i in windows)
        self._waiting = deque(ask for window in ordered for ask in window)
        self._made: dict[int, dict[int, Completion]] = {}
        self.total, self.done, self.tokens = len(asks), 0, 0

    def numbers(self, ids: Sequence[str]) -> list[int] | None:
        """Return the places of prompts by id; None where one is unknown or was taken already."""
        found = [self._number.get(id) for id in ids]
        return [number for number in found if number is not None] if None not in found else None

    def take(self, numbers: Sequence[int], told: Callable[[Completions], None] | None = None) -> list[list[Completion]]:
        """Return the samples of prompts, each of which can be taken once.

        Args:
            numbers: Places of the prompts.
            told: Called after each step.
        """
        lacking = {number for number in numbers if len(self._made.get(number, ())) < self._samples}
        while lacking:
            for row in self._steps.step(self._waiting):
                samples = self._made.setdefault(row.ask.number, {})
                samples[row.sample] = self._completion(row.tokens)
                if len(samples) == self._samples:
                    lacking.discard(row.ask.number)
                    self.done += 1
            if told is not None:
                told(self)
        taken = set(numbers)
        self._number = {id: number for id, number in self._number.items() if number not in taken}
        return [[sample for _, sample in sorted(self._made.pop(number).items())] for number in numbers]

    def _completion(self, tokens: list[int]) -> Completion:
        end = next((i for i, token in enumerate(tokens) if token in self._stops), None)
        self.tokens += len(tokens) if end is None else end + 1
        return Completion(self._tokenizer.decode(tokens[:end], skip_special_tokens=True), end is None)


def asks_of(batch: Batch) -> list[Ask]:
    """Return the prompts of a left-padded batch."""
    rows = zip(batch["example_id"], batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
    return [Ask(id, [token for token, there in zip(ids, mask, strict=True) if there]) for id, ids, mask in rows]
