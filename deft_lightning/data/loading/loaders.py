"""The loaders of the data module: batches of rows to train and validate on, prompts to generate for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from deft_lightning.data.benchmarks import read_benchmark
from deft_lightning.data.encoding.encode import prompts
from deft_lightning.data.examples import Example, Prompt
from deft_lightning.data.loading.collate import PromptCollator, TrainCollator
from deft_lightning.data.loading.order import Batches, EvenLoader, PreparedDataset, ResumableLoader, ShardedSampler
from deft_lightning.data.loading.packing import bounded_batches
from deft_lightning.data.noise import Noise
from deft_lightning.data.prepared.build import Recipe, Source, read_examples, title, unique_ids
from deft_lightning.data.sources.rows import BadRows
from deft_lightning.errors import UserError
from deft_lightning.evaluation.benchmarks import Benchmark, TestSet
from deft_lightning.evaluation.generate import positions


class Loaders(LightningDataModule):
    """Serves prepared rows, each rank its share, in an order that depends on seed and epoch alone.

    The settings are those of the data module that derives from it, which prepares the rows.

    Attributes:
        test_sets: What the prompts of each test loader belong to, once the loaders are made.
    """

    tokenizer: Any
    noise: Noise
    seed: int
    batch_size: int
    eval_batch_size: int
    max_length: int
    max_tokens_per_batch: int | None
    packing: bool
    group_by_length: bool
    num_workers: int
    test_source: str | None
    benchmarks: list[tuple[Benchmark, str]]
    benchmark_instruction: str | None
    test_sets: list[TestSet]
    _rows: dict[str, PreparedDataset]
    _held_out: Iterable[Example]

    @abstractmethod
    def _recipe(self, source: Source | None = None) -> Recipe:
        """Return how rows of a source are read."""

    def _loader(self, dataset: Any, collate: Callable[..., Any], size: int | None, train: bool) -> DataLoader[Any]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if len(dataset) < world:
            what = "examples" if not self.packing else "packed rows"
            raise UserError(
                f"{len(dataset)} {what} are fewer than the {world} ranks (--data.source, --trainer.devices)"
            )
        lengths = None
        if train and self.group_by_length:
            lengths = dataset.lengths()
        sampler = ShardedSampler(
            len(dataset), rank=rank, world=world, seed=self.seed, shuffle=train, even=train, lengths=lengths,
            tag_epoch=train,
        )  # fmt: skip
        options: dict[str, Any] = {
            "batch_size": size, "sampler": sampler, "collate_fn": collate, "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(), "persistent_workers": self.num_workers > 0,
        }  # fmt: skip
        if train:
            return ResumableLoader(dataset, **options)
        if getattr(getattr(self.trainer, "strategy", None), "shards_weights", False):
            return EvenLoader(dataset, batches=-(-len(dataset) // (world * (size or 1))), **options)
        return DataLoader(dataset, **options)

    def _token_loader(self, rows: PreparedDataset, size: int, train: bool) -> DataLoader[Any]:
        model = getattr(self.trainer, "lightning_module", None) if self.trainer else None
        flash = str(getattr(model, "attention", None) or "").startswith("flash")
        collate = TrainCollator(self.tokenizer.pad_token_id, self.packing, self.packing and flash)
        if self.max_tokens_per_batch is None:
            return self._loader(rows, collate, size, train)
        if self.packing:
            return self._loader(rows, collate, self.max_tokens_per_batch // self.max_length, train)
        lengths = rows.lengths()
        batches = bounded_batches(lengths.tolist(), self.max_tokens_per_batch, self.seed)
        return self._loader(Batches(rows, batches), collate, None, train)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of the training split in the order of (seed, epoch)."""
        return self._token_loader(self._rows["train"], self.batch_size, train=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return batches of the validation split; an empty list when there is none.

        With noise, a list of two loaders: the clean examples, and beside them corrupted ones. Those are the corrupted
        validation examples if `noise.splits` has `validation`, else as many of the training examples, on which what
        the model has memorised shows.
        """
        clean = self._rows["validation"]
        if not len(clean):
            return []
        loader = self._token_loader(clean, self.eval_batch_size, train=False)
        noisy = self._noisy_rows(len(clean.examples))
        return [loader, self._token_loader(noisy, self.eval_batch_size, train=False)] if noisy is not None else loader

    def _noisy_rows(self, limit: int) -> PreparedDataset | None:
        """Corrupted examples to validate on; None without noise."""
        if not self.noise.ops:
            return None
        if "validation_noisy" in self._rows:
            return self._rows["validation_noisy"]
        if "train" not in self.noise.splits:
            return None
        train = self._rows["train"]
        order = np.random.default_rng([self.seed, 1]).permutation(len(train.examples)).tolist()
        chosen = (at for at in order if train.example(at).noise_code.any())
        found = [at for at, _ in zip(chosen, range(limit), strict=False)]
        world = self.trainer.world_size if self.trainer else 1
        if len(found) < world:
            rank_zero_warn(
                f"{len(found)} of the training examples are corrupted, fewer than the {world} ranks: there will be no"
                " val_noisy"
                if found
                else "none of the training examples is corrupted: there will be no val_noisy"
            )
            return None
        return PreparedDataset(train.examples, [[at] for at in found], self.noise, train.words)

    def _prompt_loaders(self, need_response: bool) -> list[DataLoader[Any]]:
        if self.benchmarks:
            found = [
                read_benchmark(benchmark, source, self.tokenizer, self.benchmark_instruction)
                for benchmark, source in self.benchmarks
            ]
        else:
            found = [(TestSet(), self._prompts(need_response))]
        found = [self._fitting(tests, ready) for tests, ready in found]
        self.test_sets = [replace(tests, longest=max(len(p.input_ids) for p in ready)) for tests, ready in found]
        collate = PromptCollator(self.tokenizer.pad_token_id)
        return [self._loader(ready, collate, self.eval_batch_size, train=False) for _, ready in found]

    def _fitting(self, tests: TestSet, ready: list[Prompt]) -> tuple[TestSet, list[Prompt]]:
        """Leave out the prompts after which the model has no position to write at, and say so.

        Every rank reads all prompts, and so leaves out the same.
        """
        model = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        limit = positions(model) if model is not None else None
        kept = [prompt for prompt in ready if limit is None or len(prompt.input_ids) < limit]
        if len(kept) == len(ready):
            return tests, ready
        first = next(prompt for prompt in ready if limit is not None and len(prompt.input_ids) >= limit)
        named = tests.benchmark.name
        said = (
            f"{named or 'test'}: skipped {len(ready) - len(kept)} of {len(ready)} prompts, which fill the model's"
            f" {limit} positions; the first: {first.id!r}, of {len(first.input_ids)} tokens"
            f" ({f'the rows of {named} in --data.benchmarks' if named else '--data.test_source'})"
        )
        if not kept:
            raise UserError(f"{said}; there is nothing left to generate for")
        rank_zero_warn(said)
        return replace(tests, skipped=len(ready) - len(kept)), kept

    def _prompts(self, need_response: bool) -> list[Prompt]:
        if self.test_source is not None:
            rows: Sequence[Example] = self._read(self.test_source, need_response)
        else:
            rows = list(self._held_out)
        ready = prompts(self.tokenizer, rows)
        if not ready:
            raise UserError(
                "nothing to generate for: there are no held-out conversations; set --data.test_source or"
                " --data.validation_fraction"
            )
        if need_response and any(prompt.gold is None for prompt in ready):
            raise UserError("test needs a response in every row (--data.test_source); predict does not")
        return ready

    def _read(self, source: str, need_response: bool) -> list[Example]:
        recipe, bad = replace(self._recipe(source), source=source), BadRows()
        rows = list(read_examples(source, recipe, recipe.skip(bad), need_response=need_response))
        if len(bad):
            rank_zero_warn(f"{title(source)}: skipped {len(bad)} rows; the first: {bad.first[0]}")
        if not rows:
            raise UserError(f"{title(source)}: no usable row; the first problem: {bad.first[0]}")
        renamed = unique_ids(lambda: (row.id for row in rows), lambda at: rows[at].digest)
        return [replace(row, id=renamed[at]) if at in renamed else row for at, row in enumerate(rows)]

    def test_dataloader(self) -> list[DataLoader[Any]] | DataLoader[Any]:
        """Return left-padded prompts with their gold responses; one loader for each benchmark, if any are named."""
        loaders = self._prompt_loaders(need_response=True)
        return loaders if self.benchmarks else loaders[0]

    def predict_dataloader(self) -> list[DataLoader[Any]] | DataLoader[Any]:
        """Return left-padded prompts; rows without a response are welcome, but for those of benchmarks."""
        loaders = self._prompt_loaders(need_response=False)
        return loaders if self.benchmarks else loaders[0]
