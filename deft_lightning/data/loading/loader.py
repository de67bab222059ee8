"""Loaders that can stop within an epoch and go on there, or give every rank as many batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from deft_lightning.data.loading.collate import supervised_at
from deft_lightning.data.loading.sampler import ShardedSampler
from deft_lightning.functional import IGNORE_INDEX


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
            filler["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
            filler["supervised_at"] = supervised_at(filler["labels"])
        if "token_weight" in filler:
            filler["token_weight"] = torch.zeros_like(batch["token_weight"])
        seen = getattr(self.batch_sampler, "seen_batch_indices", None)  # Lightning's, in prediction
        for _ in range(given, self.batches):
            if seen is not None:
                seen.append([])
            yield filler
