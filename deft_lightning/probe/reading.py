"""The first pass of a probe: the model over a sample of the rows, a batch at a time, or what is kept of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from deft_lightning.annotations import Batch
from deft_lightning.data.loading.collate import TrainCollator
from deft_lightning.functional import IGNORE_INDEX, TokenStats
from deft_lightning.probe.bare import Bare
from deft_lightning.probe.kept import Kept, fields_of, stats_of
from deft_lightning.probe.pace import Pace, duration

SPLIT = "train"
TRIED = 50  # rows from which on the time of a probe is told before it starts


class Read(NamedTuple):
    """One batch, an example a row, with what the model says of its N supervised tokens; everything is on the host.

    Attributes:
        positions: Position of each row's example in its split.
        batch: As the collator makes it.
        keep: Shape ``(B, T - 1)``: whether the token after each position is supervised.
        by_topk: Statistics of the tokens, row by row, by how many probabilities their ``topk_entropy`` covers.
        labels: Shape ``(N,)``.
        codes: Shape ``(N,)``: noise code of each token.
        bare: What the model says of the answers without their prompts; None where nobody asked.
    """

    positions: list[int]
    batch: Batch
    keep: Tensor
    by_topk: dict[int, TokenStats]
    labels: Tensor
    codes: Tensor
    bare: Bare | None

    @property
    def stats(self) -> TokenStats:
        """Return the statistics of the tokens, whatever their ``topk_entropy`` covers."""
        return next(iter(self.by_topk.values()))

    @property
    def counts(self) -> list[int]:
        """Return the number of supervised tokens of each row."""
        return [int(count) for count in self.keep.sum(1)]


def read_rows(
    module: Any,
    data: Any,
    positions: Sequence[int],
    device: torch.device,
    topks: Sequence[int],
    bare: Bare | None,
    kept: Kept,
) -> Iterator[Read]:
    """Yield the rows batch by batch, those of like length together.

    Args:
        module: SFTModule with its model built, not training; gradients are off.
        data: InstructionDataModule, set up.
        positions: Of the examples in the training split.
        device: Where the model is.
        topks: What ``topk_entropy`` has to cover: a pass for each; [0] for one pass without it.
        bare: What the model says of the answers without their prompts.
        kept: What a killed probe has read is not read again.
    """
    tokens = tokens_of(data, positions)
    done = kept.of("prompted", tokens)
    with Pace("probe: reading the answers behind their prompts", len(positions), tokens) as pace:
        for own, batch in data.batches_of(SPLIT, positions):
            if bare is not None and module.batch_loss.context.unprompted:
                batch = {**batch, "unprompted": bare.spread(batch["labels"], own)}
            fields = done.take(batch)
            computed = fields is None
            if fields is None:
                fields = fields_of(_statistics(module, batch, device, topks))
                done.add(batch, fields)
            keep = batch["labels"][:, 1:] != IGNORE_INDEX
            labels, codes = (batch[name][:, 1:][keep] for name in ("labels", "noise_code"))
            yield Read(own, batch, keep, stats_of(fields), labels, codes, bare)
            pace.update(len(own), int(batch["attention_mask"].sum()), computed)
    done.write()


def _statistics(module: Any, batch: Batch, device: torch.device, topks: Sequence[int]) -> dict[int, TokenStats]:
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return {k: module.statistics(moved, k)[0].map(lambda field: field.cpu()) for k in topks}


def tokens_of(data: Any, positions: Sequence[int]) -> int:
    """Return how many tokens some examples of the training split have."""
    lengths = data.splits[SPLIT].examples.lengths()
    return int(sum(int(lengths[at]) for at in positions))


def announce(module: Any, data: Any, positions: Sequence[int], device: torch.device, passes: float) -> None:
    """Say how long a probe will take, by trying a row of middle length twice; nothing for a few rows.

    Args:
        module: SFTModule with its model built, not training; gradients are off.
        data: InstructionDataModule, set up.
        positions: Of the examples in the training split.
        device: Where the model is.
        passes: Passes over the rows, the second one without prompts counted as half of one.
    """
    if len(positions) < TRIED:
        return
    lengths = data.splits[SPLIT].examples.lengths()
    middle = sorted(positions, key=lambda at: int(lengths[at]))[len(positions) // 2]
    batch = TrainCollator(data.tokenizer.pad_token_id)([data.example(SPLIT, middle)])
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        begun = time.monotonic()
        _statistics(module, batch, device, [0])
        seconds = time.monotonic() - begun
    tokens = tokens_of(data, positions)
    about = duration(passes * tokens * seconds / batch["input_ids"].numel())
    rank_zero_info(
        f"probe: {len(positions):,} rows of {tokens:,} tokens; by a trial of one of them at most about {about}"
    )
