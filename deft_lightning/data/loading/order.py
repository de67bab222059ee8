"""Order of examples: a function of (seed, epoch), the same whatever the number of workers; and where a run is in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from deft_lightning.data.encoding.encode import corrupt_example
from deft_lightning.data.examples import Prepared
from deft_lightning.data.loading.packing import grouped
from deft_lightning.data.noise import Noise, TokenNoise
from deft_lightning.data.noise.vocabulary import Vocabulary
from deft_lightning.data.prepared.spool import Tokens
from deft_lightning.functional import IGNORE_INDEX


class ShardedSampler(DistributedSampler[int]):
    """Every rank takes each ``world``-th example of one global order; nothing is repeated.

    A :class:`DistributedSampler`, so that Lightning sets its epoch and does not shard a second time.

    Args:
        size: Number of examples.
        rank: Rank of this process.
        world: Number of ranks.
        seed: Seed of the order.
        shuffle: A new permutation each epoch; otherwise the given order.
        even: Leave out the last ``size % world`` examples of the epoch's order, so that all ranks do the same number
            of steps (training). Otherwise every example is seen once and ranks may differ by one (evaluation).
        lengths: Tokens of every example: neighbours in the order are then of like length.
        group: How many neighbours, with ``lengths``.
        tag_epoch: Yield ``epoch * size + position``, for a dataset that changes with the epoch: worker processes are
            not told of it otherwise.
    """

    def __init__(
        self, size: int, *, rank: int, world: int, seed: int, shuffle: bool, even: bool,
        lengths: Sequence[int] | None = None, group: int = 64, tag_epoch: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(range(size), num_replicas=world, rank=rank, shuffle=shuffle, seed=seed, drop_last=even)  # type: ignore[arg-type]
        self.size = size - size % world if even else size
        self.start, self.lengths, self.group, self.tag_epoch = 0, lengths, group, tag_epoch

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's positions of the epoch, from example ``start`` of the global order."""
        n = len(self.dataset)  # type: ignore[arg-type]
        order = np.random.default_rng([self.seed, self.epoch]).permutation(n) if self.shuffle else np.arange(n)
        if self.lengths is not None:
            order = grouped(order, self.lengths, self.group, [self.seed, self.epoch])
        if self.tag_epoch:
            order = order + self.epoch * n
        yield from order[self.start : self.size][self.rank :: self.num_replicas].tolist()

    def __len__(self) -> int:
        """Return how many examples this rank sees in a whole epoch."""
        return len(range(self.rank, self.size, self.num_replicas))


class PreparedDataset(Dataset[Any]):
    """What a loader picks from: rows of examples, with token noise applied as they are read.

    Args:
        examples: Prepared examples.
        rows: Positions of the examples of each row; None is one example a row.
        noise: Its token operations are applied; what they draw is a function of the example id.
        words: What they draw from.
    """

    def __init__(self, examples: Tokens, rows: list[list[int]] | None, noise: Noise, words: Vocabulary | None) -> None:
        self.examples, self.rows, self.words = examples, rows, words
        self.noise = noise if any(isinstance(op, TokenNoise) for op in noise.ops) else None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.examples if self.rows is None else self.rows)

    def example(self, at: int, epoch: int = 0) -> Prepared:
        """Return an example as it is trained on in an epoch."""
        if self.noise is None or self.words is None:
            return self.examples[at]
        return corrupt_example(self.examples[at], self.noise, self.words, epoch)

    def __getitem__(self, key: int) -> list[Prepared]:
        """Return the examples of row ``key % len`` in epoch ``key // len``."""
        epoch, at = divmod(key, len(self))
        return self.row(at, epoch)

    def row(self, at: int, epoch: int) -> list[Prepared]:
        """Return the examples of a row as they are trained on in an epoch."""
        return [self.example(i, epoch) for i in ([at] if self.rows is None else self.rows[at])]

    def lengths(self) -> NDArray[np.int64]:
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


class ResumableLoader(DataLoader[Any]):
    """A loader that Lightning can stop and continue in the middle of an epoch.

    Its state is the epoch and the number of examples all ranks have been given of it, so it does not depend on the
    rank. It is counted when a batch is handed out, not when a worker fetches ahead.

    Args:
        dataset: What the order picks from.
        sampler: The order. Lightning puts another one in its place for ``overfit_batches``; then nothing is resumed.
        kwargs: As :class:`torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: Any, *, sampler: Any, **kwargs: Any) -> None:
        super().__init__(dataset, sampler=sampler, **kwargs)
        self._given = 0
        self._resume: dict[str, int] = {}

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches; the first one is prepared on demand, since Lightning sets the epoch after it asks for this."""
        order = self.sampler
        if not isinstance(order, ShardedSampler):
            yield from super().__iter__()
            return
        resumed = self._resume.get("samples", 0) if self._resume.get("epoch") == order.epoch else 0
        self._resume = {}
        order.start = self._given = resumed
        for batch in super().__iter__():
            self._given = min(self._given + (self.batch_size or 1) * order.num_replicas, order.size)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the place in the order."""
        return {"epoch": getattr(self.sampler, "epoch", 0), "samples": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there when the same epoch is iterated next; any other epoch starts at its beginning."""
        self._resume = dict(state)


class EvenLoader(DataLoader[Any]):
    """A loader that gives as many batches on every rank: ranks that share their weights run the model together.

    What a rank lacks is filled with a copy of its last batch, marked ``filler``, of which nothing is learnt or counted.

    Args:
        batches: Those of the rank that has most.
        kwargs: As :class:`torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: Any, *, batches: int, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.batches = batches  # Lightning builds a loader again from attributes with the names of arguments

    def __len__(self) -> int:
        """Return the number of batches of every rank."""
        return self.batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield this rank's batches, then fillers."""
        given, batch = 0, None
        for batch in super().__iter__():
            given += 1
            yield batch
        assert batch is not None
        filler = {**batch, "filler": True}
        if "labels" in filler:
            filler |= {"labels": torch.full_like(batch["labels"], IGNORE_INDEX)}
        seen = getattr(self.batch_sampler, "seen_batch_indices", None)  # Lightning's, in prediction
        for _ in range(given, self.batches):
            if seen is not None:
                seen.append([])
            yield filler
