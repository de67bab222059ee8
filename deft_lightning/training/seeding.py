"""What is random in training, as a function of its place in the run."""

from __future__ import annotations

import os

import torch

from deft_lightning.hashing import key


def reseed(epoch: int, batch_idx: int, rank: int) -> None:
    """Make what is random in a micro-batch (dropout) a function of its place, so that a resumed run draws the same.

    The seed of the run is the one of ``--seed_everything``.
    """
    seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
    torch.manual_seed(key(seed, "micro-batch", epoch, batch_idx, rank) >> 65)
