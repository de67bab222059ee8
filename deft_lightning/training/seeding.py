"""What is random in training, as a function of its place in the run."""

from __future__ import annotations

import os

import torch

from deft_lightning.hashing import key


def reseed(epoch: int, batch_idx: int, rank: int, device: torch.device) -> None:
    """Make what is random in a micro-batch (dropout) a function of its place, so that a resumed run draws the same.

    The seed of the run is the one of ``--seed_everything``.

    Args:
        epoch: From 0.
        batch_idx: Of the micro-batch in its epoch.
        rank: Of the process.
        device: What is trained on.
    """
    seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
    value = key(seed, "micro-batch", epoch, batch_idx, rank) >> 65
    if device.type == "cpu" and not torch.cuda.is_initialized():
        # torch.manual_seed would also queue the seed for a CUDA that nobody uses, with a stack trace as text.
        torch.default_generator.manual_seed(value)
    else:
        torch.manual_seed(value)
