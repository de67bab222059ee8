"""Loaders of prepared rows and of prompts: each rank its share, in an order of seed and epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from deft_lightning.data.examples import Prompt
from deft_lightning.data.loading.collate import PromptCollator, TrainCollator
from deft_lightning.data.loading.dataset import Batches, PreparedDataset
from deft_lightning.data.loading.loader import EvenLoader, ResumableLoader
from deft_lightning.data.loading.packing import bounded_batches
from deft_lightning.data.loading.sampler import ShardedSampler
from deft_lightning.data.protocols import Run
from deft_lightning.data.settings import DataSettings
from deft_lightning.errors import UserError


@dataclass(frozen=True)
class LoaderFactory:
    """Makes the loaders of a run.

    Args:
        settings: Of the data module.
        run: Ranks, and how the model reads its batches.
        pad_id: Token that fills rows up.
    """

    settings: DataSettings
    run: Run
    pad_id: int

    def train(self, rows: PreparedDataset) -> DataLoader[Any]:
        """Return batches to train on."""
        return self._of_rows(rows, self.settings.batch_size, train=True)

    def evaluate(self, rows: PreparedDataset) -> DataLoader[Any]:
        """Return batches to validate on."""
        return self._of_rows(rows, self.settings.examples_per_evaluation_batch, train=False)

    def prompts(self, prompts: list[Prompt]) -> DataLoader[Any]:
        """Return left-padded prompts to generate for."""
        collate = PromptCollator(self.pad_id)
        return self._loader(prompts, collate, self.settings.examples_per_evaluation_batch, train=False)

    def some(self, rows: PreparedDataset, positions: Sequence[int]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Yield some examples in batches that need no more memory than those of training, with their positions.

        Examples of like length meet, the longest first: without that a fourth of what a model reads is padding. One
        example a row, packed or not.
        """
        size, limit, seed = self.settings.batch_size, self.settings.max_tokens_per_batch, self.settings.seed
        every = rows.examples.lengths()
        lengths = [int(every[at]) for at in positions]
        if limit is None:
            limit = size * (self.settings.max_length if self.settings.packing else max(lengths, default=0))
        batches = [[positions[i] for i in batch] for batch in bounded_batches(lengths, limit, seed)]
        collate = TrainCollator(self.pad_id, weighted=rows.weighted)
        for batch in batches:
            yield batch, collate([rows.example(at) for at in batch])

    def _of_rows(self, rows: PreparedDataset, size: int, train: bool) -> DataLoader[Any]:
        packing, max_tokens = self.settings.packing, self.settings.max_tokens_per_batch
        flash = (self.run.attention or "").startswith("flash")
        collate = TrainCollator(self.pad_id, packing, packing and flash, rows.weighted, rows.sources)
        if max_tokens is None:
            return self._loader(rows, collate, size, train)
        if packing:
            return self._loader(rows, collate, max_tokens // self.settings.max_length, train)
        batches = bounded_batches(rows.lengths().tolist(), max_tokens, self.settings.seed)
        return self._loader(Batches(rows, batches), collate, None, train)

    def _loader(self, dataset: Any, collate: Callable[..., Any], size: int | None, train: bool) -> DataLoader[Any]:
        settings, world = self.settings, self.run.world
        if len(dataset) < world:
            kind = "packed rows" if settings.packing else "examples"
            raise UserError(
                f"{len(dataset)} {kind} are fewer than the {world} ranks (--data.source, --trainer.devices)"
            )
        sampler = ShardedSampler(
            len(dataset), rank=self.run.rank, world=world, seed=settings.seed, shuffle=train, even=train,
            lengths=dataset.lengths() if train and settings.group_by_length else None, tag_epoch=train,
        )  # fmt: skip
        options: dict[str, Any] = {
            "batch_size": size, "sampler": sampler, "collate_fn": collate, "num_workers": settings.num_workers,
            "pin_memory": torch.cuda.is_available(), "persistent_workers": settings.num_workers > 0,
        }  # fmt: skip
        if train:
            return ResumableLoader(dataset, **options)
        if self.run.shards_weights:
            return EvenLoader(dataset, batches=-(-len(dataset) // (world * (size or 1))), **options)
        return DataLoader(dataset, **options)
