"""What a worker does to some examples: tokens, truncation, counts; and the processes that do it."""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from deft_lightning.data.encoding.encode import tokenise
from deft_lightning.data.encoding.supervise import Teaching
from deft_lightning.data.examples import Example, Ints, Prepared, weight_of
from deft_lightning.data.lazy import Lazy
from deft_lightning.data.noise.apply import Changed
from deft_lightning.data.prepared.report import Report
from deft_lightning.data.prepared.spool import TOKENS, record_batch, row_of_prepared
from deft_lightning.data.prepared.workers import in_order
from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX

CHUNK = 500  # examples a job of a worker
SHOWN = 32  # tokens beyond a cut that are kept, for people to look at


class EncodedChunk(NamedTuple):
    """What a job gives.

    Attributes:
        batch: The examples that are left, a record batch of :data:`TOKENS` as bytes; None if there is none.
        counted: What became of the examples.
        labels: Supervised tokens, and how often each occurs.
        refused: What is wrong with the rows that were left out.
        supervised: How many examples had a supervised token before truncation.
        left_out: As ``labels``, of the examples that an audit leaves out.
    """

    batch: pa.Buffer | None
    counted: Report
    labels: tuple[Ints, Ints]
    refused: list[UserError]
    supervised: int
    left_out: tuple[Ints, Ints]


@dataclass(frozen=True)
class Encoder:
    """What a worker does to some examples.

    Args:
        examples: Where they are read from.
        tokenizer: Tokenizer with its chat template.
        teaching: What of a conversation is learnt.
        skip: Whether rows that the template refuses are left out.
        max_length: Longest example in tokens.
        keep: Which end of a longer one is kept.
        factors: Factor on the weight of each example, shape ``(n,)``; 0 leaves it out. None: all count 1.
    """

    examples: Lazy[Example]
    tokenizer: Any
    teaching: Teaching
    skip: bool
    max_length: int
    keep: str
    factors: NDArray[np.float64] | None = None

    def __call__(self, start: int, changed: Changed) -> EncodedChunk:
        """Encode the examples from a position, those that noise has changed as they are now."""
        places = range(start, min(start + CHUNK, len(self.examples)))
        pairs = [changed[at] if at in changed else (self.examples[at], []) for at in places]
        refused: list[UserError] = []
        counted, rows, notes = Report(""), [], Counter[str]()
        prepared = tokenise(
            self.tokenizer, [e for e, _ in pairs], [m for _, m in pairs], refused if self.skip else None, self.teaching,
            notes,
        )  # fmt: skip
        counted.count_notes(notes)
        own = [1.0] * len(pairs) if self.factors is None else self.factors[places.start : places.stop].tolist()
        factors = {example.id: factor for (example, _), factor in zip(pairs, own, strict=True)}
        left_out: list[Ints] = []
        for example in prepared:
            if (factor := factors[example.id]) == 0:
                left_out.append(example.truncate(self.max_length, self.keep).labels)
                continue
            if factor != 1:
                with np.errstate(over="ignore", invalid="ignore"):  # what is too large is refused with its example
                    weight = weight_of(example.labels, example.weight) * np.float32(factor)
                example = replace(example, weight=weight)
            short = counted.truncate(example, self.max_length, self.keep)
            if counted.add(short):
                row = row_of_prepared(short, len(example.input_ids), self._cut(example))
                counted.weighted += len(row[-1]) > 0
                rows.append(row)
        batch = record_batch(rows, TOKENS).serialize() if rows else None
        supervised = sum(int((example.labels != IGNORE_INDEX).any()) for example in prepared)
        labels = [row[2] for row in rows]
        return EncodedChunk(batch, counted, _counted(labels), refused, supervised, _counted(left_out))

    def _cut(self, example: Prepared) -> Ints:
        if len(example.input_ids) <= self.max_length:
            return example.input_ids[:0]
        if self.keep == "end":
            return example.input_ids[: -self.max_length][-SHOWN:]
        return example.input_ids[self.max_length :][:SHOWN]


def _counted(labels: list[Ints]) -> tuple[Ints, Ints]:
    """Return which tokens are labels, and how often each."""
    every = np.concatenate([np.zeros(0, dtype=np.int64), *labels])
    return np.unique(every[every != IGNORE_INDEX], return_counts=True)


_encoder: Encoder | None = None


def _start(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    torch.set_num_threads(1)


def _work(start: int, changed: Changed) -> EncodedChunk:
    assert _encoder is not None
    return _encoder(start, changed)


def encode_all(encoder: Encoder, changed: Changed, workers: int) -> Iterator[EncodedChunk]:
    """Encode all examples in order."""
    jobs = (
        (start, {at: changed[at] for at in range(start, start + CHUNK) if at in changed})
        for start in range(0, len(encoder.examples), CHUNK)
    )
    if min(workers, -(-len(encoder.examples) // CHUNK)) <= 1:
        yield from itertools.starmap(encoder, jobs)
        return
    # A fork starts at once; after CUDA it is not allowed. Threads of the tokenizer do not survive it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    method = "spawn" if sys.platform != "linux" or torch.cuda.is_initialized() else "fork"
    yield from in_order(_work, jobs, workers, method, _start, (encoder,))
