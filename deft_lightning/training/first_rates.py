"""Noise rates to begin with: a sample of the training answers is read before the first step.

A rate that begins near 0 is estimated as training goes on. A pretrained model learns wrong answers within a few steps;
by then there is nothing left to estimate them from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from deft_lightning.data import InstructionDataModule
from deft_lightning.data.loading.collate import TrainCollator
from deft_lightning.data.loading.dataset import PreparedDataset
from deft_lightning.data.loading.packing import bounded_batches
from deft_lightning.functional import TokenStats
from deft_lightning.objectives.context import joined
from deft_lightning.objectives.run_state import Tracked
from deft_lightning.training.distributed import gather, ranks

ANSWERS = 128  # of the sample: a rate of 0.5 within 0.07, nine times of ten
BATCH_TOKENS = 4096  # of a batch, padding included; nothing is kept for a gradient


def begin_rates(module: Any, tracked: Tracked | None) -> tuple[float, ...]:
    """Return what a run keeps for its objective before the first step; every rank has to call it.

    The sample is drawn by the number of examples alone. It is read by all ranks together, so that the result is the
    same on any number of them up to rounding.

    Args:
        module: An SFTModule whose model is where it trains, and whose rows have the chance of their labels.
        tracked: What its objective keeps.

    Returns:
        The memory; empty where the objective wants no sample, or none can be had.
    """
    if tracked is None or not tracked.sampled:
        return ()
    if not isinstance(module.prompts, InstructionDataModule):
        rank_zero_info("noise rates begin at 0.01: a sample before the first step needs InstructionDataModule")
        return ()
    parts = gather(_read(module, module.prompts.splits["train"]))
    begun = tracked.begin(joined([stats for part in parts for stats in part]))
    for tag, sample in begun.found.items():
        rank_zero_info(sample.line(tag))
    return begun.memory


def _read(module: Any, rows: PreparedDataset) -> list[TokenStats]:
    """Return the statistics of this rank's share of the sample on the host, batch by batch."""
    count = len(rows.examples)
    drawn = np.random.default_rng(count).permutation(count)[:ANSWERS].tolist()
    own = drawn[module.global_rank :: ranks()]
    collate = TrainCollator(module.prompts.tokenizer.pad_token_id, weighted=rows.weighted, sources=rows.sources)
    lengths = [len(rows.examples[at].input_ids) for at in own]
    batches = [[own[at] for at in batch] for batch in bounded_batches(lengths, BATCH_TOKENS, 0)] if own else []
    found = list[TokenStats]()
    was_training = module.training
    module.eval()
    try:
        for step in range(max(gather(len(batches)))):  # ranks that share weights run the model together
            fresh = step < len(batches)
            places = batches[step] if fresh else drawn[:1]
            batch = {
                key: value.to(module.device) if isinstance(value, Tensor) else value
                for key, value in collate([rows.example(at) for at in places]).items()
            }
            with torch.no_grad():
                _, stats, _ = module.loss_and_stats(batch)
            if fresh:
                found.append(stats.detach().map(Tensor.cpu))
    finally:
        module.train(was_training)
    return found
