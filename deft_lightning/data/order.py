"""Order of examples: a function of (seed, epoch), the same whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import DistributedSampler


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

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's positions of the epoch."""
        n = len(self.dataset)  # type: ignore[arg-type]
        order = np.random.default_rng([self.seed, self.epoch]).permutation(n) if self.shuffle else np.arange(n)
        yield from order[: self.size][self.rank :: self.num_replicas].tolist()

    def __len__(self) -> int:
        """Return how many examples this rank sees in an epoch."""
        return len(range(self.rank, self.size, self.num_replicas))
