"""What a loader picks from: rows of prepared examples, or whole batches of them, as they are in an epoch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from deft_lightning.data.examples import Ints, Prepared
from deft_lightning.data.loading.company import Company
from deft_lightning.data.noise import Noise, TokenNoise
from deft_lightning.data.noise.apply import corrupt_example
from deft_lightning.data.noise.vocabulary import Vocabulary
from deft_lightning.data.prepared.spool import Tokens


class PreparedDataset(Dataset[Any]):
    """What a loader picks from: rows of examples, with token noise applied as they are read.

    Args:
        examples: Prepared examples.
        rows: Positions of the examples of each row; None is one example a row.
        noise: Its token operations are applied; what they draw is a function of the example id.
        words: What they draw from.
        sources: Names of the sources that figures are told apart by; none where there is but one.

    Attributes:
        company: Puts answers behind others, without their prompts; None where nobody asks what a model says of that.
    """

    def __init__(
        self, examples: Tokens, rows: list[list[int]] | None, noise: Noise, words: Vocabulary | None,
        sources: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.examples, self.rows, self.words, self.sources = examples, rows, words, sources
        self.noise = noise if any(isinstance(op, TokenNoise) for op in noise.ops) else None
        self.company: Company | None = None

    @property
    def weighted(self) -> bool:
        """Return whether any example has weights: the same for every batch of them, on every rank."""
        return self.examples.weighted

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.examples if self.rows is None else self.rows)

    def example(self, at: int, epoch: int = 0) -> Prepared:
        """Return an example as it is trained on in an epoch."""
        example = self.examples[at]
        if self.noise is not None and self.words is not None:
            example = corrupt_example(example, self.noise, self.words, epoch)
        if self.company is not None:
            example = replace(example, unprompted=self.company.of(at, example))
        return example

    def __getitem__(self, key: int) -> list[Prepared]:
        """Return the examples of row ``key % len`` in epoch ``key // len``."""
        epoch, at = divmod(key, len(self))
        return self.row(at, epoch)

    def row(self, at: int, epoch: int) -> list[Prepared]:
        """Return the examples of a row as they are trained on in an epoch."""
        return [self.example(i, epoch) for i in ([at] if self.rows is None else self.rows[at])]

    def lengths(self) -> Ints:
        """Return the number of tokens of every row."""
        lengths = self.examples.lengths()
        if self.rows is None:
            return lengths
        return np.array([lengths[row].sum() for row in self.rows], dtype=np.int64)


class Batches(Dataset[Any]):
    """Whole batches to pick from.

    Args:
        rows: What the batches are of.
        batches: Positions of the rows of each batch.
    """

    def __init__(self, rows: PreparedDataset, batches: list[list[int]]) -> None:
        self.rows, self.batches = rows, batches

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)

    def __getitem__(self, key: int) -> list[Prepared]:
        """Return the examples of batch ``key % len`` in epoch ``key // len``."""
        epoch, at = divmod(key, len(self))
        return [example for row in self.batches[at] for example in self.rows.row(row, epoch)]
