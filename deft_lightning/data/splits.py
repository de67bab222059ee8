"""The prepared rows of a run by split, as they are trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from deft_lightning.annotations import Tokenizer
from deft_lightning.data.encoding.tokenizer import markers, vocabulary
from deft_lightning.data.examples import Example, Ints, Prepared
from deft_lightning.data.lazy import Lazy
from deft_lightning.data.loading.dataset import PreparedDataset
from deft_lightning.data.loading.packing import pack
from deft_lightning.data.noise import TokenNoise
from deft_lightning.data.prepared.build import ALL_COUNTS, COUNTS, NOT_AUDITED
from deft_lightning.data.prepared.cache import DONE
from deft_lightning.data.prepared.report import Report
from deft_lightning.data.prepared.spool import SpooledExamples, Tokens
from deft_lightning.data.preview import Sample, sample
from deft_lightning.data.records.leftovers import ColumnReport
from deft_lightning.data.settings import DataSettings
from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX

SPLITS = ("train", "validation", "validation_noisy")


class Splits:
    """Prepared data, opened.

    Args:
        folder: Where it is.
        settings: With which it was prepared.
        tokenizer: With which it was tokenised.

    Attributes:
        folder: Where it is.
        reports: What became of the examples, by split.
        held_out: The validation examples as they were read.
        skipped: How many rows could not be used.
        bad_rows: What is wrong with the first of them.
        remarks: What was decided about the sources, a line each.
        columns: What became of the columns.
        audited: What is said of audits, ``lines`` and ``warnings``.

    Raises:
        UserError: The folder holds something else.
    """

    def __init__(self, folder: Path, settings: DataSettings, tokenizer: Tokenizer) -> None:
        self.folder, self._settings, self._tokenizer = folder, settings, tokenizer
        self._datasets: dict[str, PreparedDataset] = {}
        self.reports: dict[str, Report] = {}
        try:
            self._load(folder)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise UserError(
                f"{folder}: holds something other than prepared data ({type(error).__name__}: {error}); remove that"
                " folder (--data.cache_dir)"
            ) from None
        for name, dataset in self._datasets.items():
            if dataset.noise is not None:
                self.reports[name].count_noise(len(dataset.examples), dataset.example)

    def _load(self, folder: Path) -> None:
        meta: dict[str, Any] = json.loads((folder / DONE).read_text(encoding="utf-8"))
        self.held_out: Lazy[Example] = SpooledExamples(folder / "held_out.arrow")
        words, apart = None, meta["sources"]
        if any(isinstance(op, TokenNoise) for op in self._settings.noise.ops):
            # What noise draws from is the same whatever an audit leaves out.
            words = vocabulary(self._tokenizer, _counts(folder / ALL_COUNTS))
        for name, counted in meta["reports"].items():
            if name not in SPLITS:
                raise ValueError(f"{name!r} is not a split")
            examples = Tokens(folder / f"{name}.arrow")
            names = apart["train"] if name == "train" else apart.get("validation", apart["train"])
            noise = self._settings.noise_of(name)
            self._datasets[name] = PreparedDataset(examples, None, noise, words, tuple(map(str, names)))
            self.reports[name] = Report.load(counted)
        self.skipped: int = meta["skipped"]
        self.bad_rows: list[str] = meta["bad_rows"]
        self.remarks: list[str] = meta.get("remarks", [])
        self.columns = ColumnReport.load(meta["columns"])
        self.audited: dict[str, list[str]] = {name: list(map(str, meta["audited"][name])) for name in NOT_AUDITED}

    @property
    def sources(self) -> dict[str, tuple[str, ...]]:
        """Return the names that figures by source have in their tags, by split; none where there is but one source."""
        return {split: dataset.sources for split, dataset in self._datasets.items()}

    def items(self) -> Iterable[tuple[str, PreparedDataset]]:
        """Return the splits by name."""
        return self._datasets.items()

    @property
    def label_counts(self) -> Ints:
        """Return how often each token is a label of the training split before token noise, shape ``(V,)``."""
        return _counts(self.folder / COUNTS)

    def __getitem__(self, split: str) -> PreparedDataset:
        """Return the rows of a split."""
        if split not in self._datasets:
            raise UserError(f"there is no split {split!r}; known: {', '.join(self._datasets)}")
        return self._datasets[split]

    def size(self, split: str) -> int:
        """Return the number of examples of a split."""
        return len(self[split].examples)

    def example(self, split: str, at: int) -> Prepared:
        """Return an example as it is trained on in the first epoch."""
        return self[split].example(at)

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest example."""
        lengths = [dataset.examples.lengths() for dataset in self._datasets.values()]
        return max((int(tokens.max()) for tokens in lengths if len(tokens)), default=0)

    def spread(self, split: str, count: int | None = None) -> list[int]:
        """Return the positions of some examples, spread over the split in its order; all of them without a count."""
        total = self.size(split)
        wanted = total if count is None else min(count, total)
        return [total * i // wanted for i in range(wanted)]

    def samples(self, split: str, count: int) -> list[Sample]:
        """Describe some examples, spread over the split, as they are trained on."""
        names = [type(op).__name__ for op in self._settings.noise.ops]
        dataset = self[split]
        return [
            sample(self._tokenizer, dataset.example(at), names, *dataset.examples.cut(at), keep=self._settings.keep)
            for at in self.spread(split, count)
        ]

    def pack(self) -> None:
        """Put several examples into a row, in every split."""
        length = self._settings.max_length
        for name, dataset in self._datasets.items():
            if len(dataset):
                lengths = dataset.examples.lengths()
                dataset.rows = pack(lengths.tolist(), length)
                full = lengths.sum() / (len(dataset.rows) * length)
                rank_zero_info(f"{name}: packed into {len(dataset.rows)} rows of {length} tokens, {full:.1%} full")

    def turn_ends(self) -> list[int]:
        """Return the special tokens that end the responses, and say so if there is none."""
        # One template writes every turn: a few examples show how it ends, unless their end is cut off.
        examples = self["train"].examples
        complete = examples.untruncated_lengths() == examples.lengths()
        if self._settings.keep == "end":
            complete[:] = True
        few = [examples[at] for at in np.flatnonzero(complete)[:100].tolist()]
        if len(examples) and not few:
            rank_zero_warn(
                f"train: --data.max_length {self._settings.max_length} cuts every example, so no response "
                "shows where it ends, and the model will not learn where to stop; raise --data.max_length"
            )
        last = [int(example.labels[example.labels != IGNORE_INDEX][-1]) for example in few]
        ends = sorted(set(last) & set(markers(self._tokenizer).tolist()))
        if last and not ends:
            rank_zero_warn(
                f"the last supervised token of a response, {self._tokenizer.decode([last[0]])!r}, is not a special"
                " token: the model will not learn where to stop (--data.chat_template)"
            )
        return ends

    def corrupted(self, limit: int, world: int) -> PreparedDataset | None:
        """Return corrupted examples to validate on; None without noise, or where they are too few.

        Args:
            limit: How many of the training examples at most, where the validation examples are clean.
            world: Number of ranks, each of which needs one.
        """
        noise = self._settings.noise
        if not noise.ops:
            return None
        if "validation_noisy" in self._datasets:
            return self._datasets["validation_noisy"]
        if "train" not in noise.splits:
            return None
        train = self["train"]
        order = np.random.default_rng([self._settings.seed, 1]).permutation(len(train.examples)).tolist()
        noisy = (at for at in order if train.example(at).noise_code.any())
        positions = [at for at, _ in zip(noisy, range(limit), strict=False)]
        if len(positions) < world:
            rank_zero_warn(
                f"{len(positions)} of the training examples are corrupted, fewer than the {world} ranks: there will be"
                " no val_noisy"
                if positions
                else "none of the training examples is corrupted: there will be no val_noisy"
            )
            return None
        rows = PreparedDataset(train.examples, [[at] for at in positions], noise, train.words, train.sources)
        rows.company = train.company
        return rows


def _counts(file: Path) -> Ints:
    return np.asarray(np.load(file, allow_pickle=False), dtype=np.int64)
