"""Order of examples: a function of (seed, epoch), the same whatever the number of workers; and where a run is in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler


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
    """

    def __init__(self, size: int, *, rank: int, world: int, seed: int, shuffle: bool, even: bool) -> None:
        super().__init__(range(size), num_replicas=world, rank=rank, shuffle=shuffle, seed=seed, drop_last=even)  # type: ignore[arg-type]
        self.size = size - size % world if even else size
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's positions of the epoch, from example ``start`` of the global order."""
        n = len(self.dataset)  # type: ignore[arg-type]
        order = np.random.default_rng([self.seed, self.epoch]).permutation(n) if self.shuffle else np.arange(n)
        yield from order[self.start : self.size][self.rank :: self.num_replicas].tolist()

    def __len__(self) -> int:
        """Return how many examples this rank sees in a whole epoch."""
        return len(range(self.rank, self.size, self.num_replicas))


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
