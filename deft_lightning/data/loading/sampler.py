"""Order of examples: a function of (seed, epoch), the same whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import DistributedSampler

from deft_lightning.data.loading.packing import grouped


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
