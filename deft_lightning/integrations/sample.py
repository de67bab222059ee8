"""A sample of the training answers before the first step, for objectives whose state begins with what it says."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deft_lightning.functional import TokenStats
from deft_lightning.integrations.counting import rows_at
from deft_lightning.integrations.loss import ObjectiveLoss
from deft_lightning.integrations.run import summed
from deft_lightning.objectives.contaminated import answers_of
from deft_lightning.objectives.context import joined

ANSWERS = 128  # of the sample: a rate of 0.5 within 0.07, nine times of ten


def sample_stats(loss: ObjectiveLoss, model: Any, loader: Any, size: int, device: torch.device) -> TokenStats | None:
    """Return the statistics of the tokens of a sample of answers of all ranks, on the host; every rank has to call it.

    Rows are drawn by their number alone, until there are 128 answers or no more rows. Neither the loader's sampler nor
    the generator of random numbers moves.

    Args:
        loss: Of the trainer.
        model: Its model, where it trains.
        loader: Of the training data.
        size: Rows of a batch.
        device: Of the batches.

    Returns:
        None where nothing is learnt.
    """
    rows = loader.dataset
    together = dist.is_available() and dist.is_initialized()
    world, rank = (dist.get_world_size(), dist.get_rank()) if together else (1, 0)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(len(rows))).tolist()
    own, found, answers = drawn[rank::world], list[TokenStats](), 0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            # As many batches on every rank: ranks that share weights run the model together.
            for start in range(0, len(drawn[::world]), size):
                fresh = own[start : start + size]
                batch = loader.collate_fn(rows_at(rows, fresh or drawn[:1]))
                stats = _stats(loss, model, batch, device)
                if fresh and len(stats.log_prob):
                    found.append(stats.map(Tensor.cpu))
                    assert stats.example is not None
                    answers += int(answers_of(stats.example)[-1]) + 1
                if int(summed(torch.tensor(answers, device=device))) >= ANSWERS:
                    break
    finally:
        model.train(was_training)
    parts = [found]
    if world > 1:
        parts = [[] for _ in range(world)]
        dist.all_gather_object(parts, found)
    sample = [stats for part in parts for stats in part]
    return joined(sample) if sample else None


def _stats(loss: ObjectiveLoss, model: Any, batch: Any, device: torch.device) -> TokenStats:
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    labels = inputs.pop("labels", None)
    beside = {name: inputs.pop(name) for name in ("token_weight", "source") if name in inputs}
    stats, *_ = loss.measured(model(**inputs, use_cache=False), labels, **beside)
    return stats.detach()
