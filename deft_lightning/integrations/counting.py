"""How often each token is a label of the training data, as the trainer's own collator makes labels of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX
from deft_lightning.integrations.run import summed

ROWS = 64  # that are collated together; the labels do not depend on it


def label_counts(loader: Any, device: torch.device) -> Tensor:
    """Count the labels of the dataset behind a loader; every rank has to call it, and counts a share of the rows.

    Neither the loader's sampler nor the generator of random numbers moves.

    Args:
        loader: Of the training data: its dataset has a length, its collator makes batches with ``labels``.
        device: Where ranks add up.

    Returns:
        Shape ``(n,)``, int64, with ``n - 1`` the largest label. The first token of a row is no label: nothing is before
        it.

    Raises:
        UserError: The dataset is a stream, batches have no labels, or nothing is learnt.
    """
    rows, collate = loader.dataset, loader.collate_fn
    if not has_places(rows):
        raise UserError("a stream has no labels that could be counted before training")
    world, rank = (dist.get_world_size(), dist.get_rank()) if _together() else (1, 0)
    own = range(rank, len(rows), world)
    counts = torch.zeros(1, dtype=torch.int64)
    with torch.random.fork_rng(devices=[]):
        for start in range(0, len(own), ROWS):
            batch = collate(rows_at(rows, own[start : start + ROWS]))
            if "labels" not in batch:
                raise UserError("batches of the training data have no labels")
            labels = batch["labels"][:, 1:]
            counts = _plus(counts, torch.bincount(labels[labels != IGNORE_INDEX]))
    if world > 1:
        size = torch.tensor(len(counts), device=device)
        dist.all_reduce(size, op=dist.ReduceOp.MAX)
        counts = summed(_plus(counts, torch.zeros(int(size), dtype=torch.int64)).to(device)).cpu()
    if not counts.sum():
        raise UserError("no token of the training data is supervised: every label is -100")
    return counts


def has_places(rows: Any) -> bool:
    """Return whether rows of a dataset can be asked for by their place; a stream has none."""
    return hasattr(rows, "__len__") and hasattr(rows, "__getitem__")


def rows_at(rows: Any, places: Sequence[int]) -> list[Any]:
    """Return rows of a dataset, at once where it can."""
    found: list[Any] = (
        rows.__getitems__(list(places)) if hasattr(rows, "__getitems__") else [rows[place] for place in places]
    )
    return found


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def _plus(one: Tensor, other: Tensor) -> Tensor:
    size = max(len(one), len(other))
    one, other = (torch.nn.functional.pad(counts, (0, size - len(counts))) for counts in (one, other))
    return one + other
