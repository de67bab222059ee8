"""InstructionDataModule: any instruction file in, batches with exact masks and noise codes out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from deft_lightning._version import __version__
from deft_lightning.data.benchmarks import Benchmarks, chosen
from deft_lightning.data.encoding.encode import Report, Supervise, vocabulary
from deft_lightning.data.encoding.template import end_of_turn, markers, set_template, template_text
from deft_lightning.data.encoding.tokenizer import load_tokenizer
from deft_lightning.data.examples import Example, Prepared
from deft_lightning.data.loading.collate import TrainCollator
from deft_lightning.data.loading.loaders import Loaders
from deft_lightning.data.loading.order import PreparedDataset
from deft_lightning.data.loading.packing import bounded_batches, pack
from deft_lightning.data.noise import Noise, TokenNoise
from deft_lightning.data.prepared.build import BAD_ROWS, Recipe, Source, build, title
from deft_lightning.data.prepared.cache import DONE, Temporary, cache_root, cached, source_identity, source_state
from deft_lightning.data.prepared.spool import SpooledExamples as Spool
from deft_lightning.data.prepared.spool import Tokens
from deft_lightning.data.prepared.truth import flags
from deft_lightning.data.preview import Sample, as_text, sample
from deft_lightning.data.records.formats import FIELDS, Format
from deft_lightning.data.sources.read import weights
from deft_lightning.errors import UserError, did_you_mean
from deft_lightning.evaluation.benchmarks import TestSet
from deft_lightning.functional import IGNORE_INDEX
from deft_lightning.hashing import key
from deft_lightning.terminal import visible

SHOWN = 1200  # letters of an example in the log
SPLITS = ("train", "validation", "validation_noisy")


class InstructionDataModule(Loaders):
    """Instruction data for supervised fine-tuning, with synthetic label noise.

    Args:
        source: A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, text also as .gz or .zst), a folder or a pattern of
            such files, a hub id (`?subset=&split=&streaming=&limit=`), or `reasoning_gym:<task>[?option=value&...]`
            (generated, no network). Several: a list, or a weight for each (0.5: a half chosen by hash, 2: twice).
        format: Layout of a row; auto looks at the first one. messages, sharegpt (conversations), prompt_completion,
            alpaca (instruction, input, output or response), question_answer, text, tokens (input_ids, labels).
        column_map: Canonical field to the column that holds it, dotted for nested ones, for example
            `--data.column_map.question extra_info.question`.
        subset: Configuration of a hub dataset.
        split: Split of a hub dataset or folder.
        validation_source: Validation rows; default: held out of `source`.
        validation_fraction: Share held out of `source` by a hash of each example, in [0, 1); duplicates stay together.
        test_source: PreparedDataset for `test` and `predict`; default: the validation rows.
        benchmarks: Benchmarks for `test` and `predict` in their place: names, or where the rows of each are, for
            example `--data.benchmarks '{math500: math500.jsonl, gsm8k: gsm8k.jsonl}'`. docs/evaluation.md lists them.
        benchmark_instruction: Stands behind the questions of benchmarks in place of their own; empty for none.
        on_bad_row: Stop at a row that cannot be used, or skip it; skipped rows are counted and the first is shown.
        tokenizer: Hub id or folder; default: the one of `model.pretrained`, else one built from the training rows.
        tokenizer_size: Vocabulary of a tokenizer that is built; at most 262 means one token a byte.
        chat_template: None is the tokenizer's own (ChatML if it has none); `chatml`, a file, or a Jinja template.
        max_length: Longest example in tokens, and longest row when packing.
        keep: Which end of a longer example is kept.
        supervise: Learn every assistant turn, the last one, or all tokens.
        packing: Put several examples into a row of at most `max_length` tokens; they do not see each other.
        batch_size: Examples (rows when packing) per device and step.
        max_tokens_per_batch: Bound batches by their tokens, padding included, instead of by `batch_size`.
        group_by_length: Put examples of like length into a batch; less padding, a less random order.
        eval_batch_size: Examples per device in validation, test and predict; default: `batch_size`.
        num_workers: Loader processes.
        num_proc: Processes that prepare the data.
        cache_dir: Where prepared data is kept; default: $DEFT_LIGHTNING_CACHE, or deft_lightning in the user's cache.
        cache: Keep prepared data for the next run.
        seed: Seed of the order and of the split.
        noise: Synthetic label noise.

    Raises:
        UserError: On `setup`, for unreadable rows (file, row, field), or when nothing is left to train on.
    """

    def __init__(
        self,
        source: Source | None = None,
        format: Format = "auto",
        column_map: dict[str, str] | None = None,
        subset: str | None = None,
        split: str = "train",
        validation_source: Source | None = None,
        validation_fraction: float = 0.05,
        test_source: str | None = None,
        benchmarks: Benchmarks | None = None,
        benchmark_instruction: str | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        tokenizer: str | None = None,
        tokenizer_size: int = 4096,
        chat_template: str | None = None,
        max_length: int = 1024,
        keep: Literal["start", "end"] = "start",
        supervise: Supervise = "assistant",
        packing: bool = False,
        batch_size: int = 8,
        max_tokens_per_batch: int | None = None,
        group_by_length: bool = False,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        num_proc: int = 1,
        cache_dir: str | None = None,
        cache: bool = True,
        seed: int = 0,
        noise: Noise = Noise(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        if not 0.0 <= validation_fraction < 1.0:
            raise UserError(f"--data.validation_fraction {validation_fraction} is outside [0, 1)")
        if format not in get_args(Format):
            raise UserError(f"--data.format {format!r}; known: {', '.join(get_args(Format))}")
        for name in column_map or {}:
            if name not in FIELDS:
                raise UserError(f"--data.column_map.{name}: no such field.{did_you_mean(name, FIELDS)}")
        if on_bad_row not in ("error", "skip"):
            raise UserError(f"--data.on_bad_row must be error or skip, not {on_bad_row!r}")
        if keep not in ("start", "end"):
            raise UserError(f"--data.keep must be start or end, not {keep!r}")
        if supervise not in get_args(Supervise):
            raise UserError(f"--data.supervise must be assistant, last or all, not {supervise!r}")
        if packing and group_by_length:
            raise UserError("--data.group_by_length means nothing with --data.packing: packed rows are full")
        if max_tokens_per_batch is not None and group_by_length:
            raise UserError("--data.max_tokens_per_batch groups by length already; leave out --data.group_by_length")
        if packing and max_tokens_per_batch is not None and max_tokens_per_batch < max_length:
            raise UserError(
                f"--data.max_tokens_per_batch {max_tokens_per_batch} is less than a packed row of --data.max_length"
                f" {max_length}"
            )
        if num_workers < 0 or tokenizer_size < 0:
            raise UserError("--data.num_workers and --data.tokenizer_size must not be negative")
        for name, value in (
            ("batch_size", batch_size),
            ("max_length", max_length),
            ("eval_batch_size", eval_batch_size),
            ("max_tokens_per_batch", max_tokens_per_batch),
            ("num_proc", num_proc),
        ):
            if value is not None and value < 1:
                raise UserError(f"--data.{name} must be at least 1, got {value}")
        self.source, self.format, self.column_map = source, format, dict(column_map or {})
        self.subset, self.split, self.on_bad_row = subset, split, on_bad_row
        self.validation_source, self.validation_fraction = validation_source, validation_fraction
        self.test_source = test_source
        self.benchmarks, self.benchmark_instruction = chosen(benchmarks), benchmark_instruction
        if self.benchmarks and test_source is not None:
            raise UserError("--data.test_source and --data.benchmarks exclude each other: leave one of them out")
        self.test_sets: list[TestSet] = []
        self.tokenizer_name, self.tokenizer_size, self.chat_template = tokenizer, tokenizer_size, chat_template
        self.max_length, self.batch_size, self.eval_batch_size = max_length, batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed, self.noise = num_workers, seed, noise
        self.keep, self.supervise, self.packing = keep, supervise, packing
        self.max_tokens_per_batch, self.group_by_length = max_tokens_per_batch, group_by_length
        self.num_proc, self.cache_dir, self.cache = num_proc, cache_dir, cache
        self.tokenizer: Any = None
        self._settled: str | None = None
        self._built = False
        self.reports: dict[str, Report] = {}
        self._rows: dict[str, PreparedDataset] = {}
        self._held_out: Iterable[Example] = ()
        self._temporary: Temporary | None = None

    # ---------------------------------------------------------------- tokenizer

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Use a tokenizer object, for example a checkpoint's, instead of naming or building one.

        A ``chat_template`` that was asked for still wins over the tokenizer's own.
        """
        self.tokenizer, self._settled, self._built = tokenizer, None, False
        if tokenizer is not None and self.chat_template is not None:
            set_template(tokenizer, self.chat_template)

    def _settle_tokenizer(self) -> None:
        model = getattr(self.trainer, "lightning_module", None) if self.trainer else None
        name = self.tokenizer_name or getattr(model, "pretrained", None)
        if self.tokenizer is not None and name in (None, self._settled):
            return
        self._settled = name
        self._rows, self._held_out = {}, ()  # what was prepared for another model is of another vocabulary
        if name is not None:
            trust = getattr(model, "trust_remote_code", False)
            self.tokenizer, self._built = load_tokenizer(name, trust), False
            set_template(self.tokenizer, self.chat_template)
            return
        folder = self._folder()
        self.tokenizer, self._built = load_tokenizer(str(folder / "tokenizer")), True

    # ---------------------------------------------------------------- preparing

    def _recipe(self, source: Source | None = None) -> Recipe:
        source = source or self.source
        if not source:
            raise UserError("no data: set --data.source to a file, a hub id or reasoning_gym:<task>")
        return Recipe(
            source, self.format, self.column_map, self.subset, self.split, self.validation_source,
            self.validation_fraction, self.seed, self.on_bad_row, self.tokenizer_size, self.max_length, self.keep,
            self.supervise, self.noise,
        )  # fmt: skip

    def _folder(self) -> Path:
        """Return the folder of the prepared data, prepared now if nobody has."""
        recipe, tokenizer = self._recipe(), None if self._built else self.tokenizer

        root = cache_root(self.cache_dir) / "data"
        if not self.cache:
            self._temporary = self._temporary or Temporary()
            root = self._temporary.path
        about = "built" if tokenizer is None else _tokenizer_identity(tokenizer)
        template = template_text(self.chat_template) if tokenizer is None and self.chat_template else None
        named = [name for source in (recipe.source, recipe.validation_source) if source for name in weights(source)]
        before = source_state(named)
        sources = [source_identity(name) for name in named]

        def fill(folder: Path) -> None:
            build(recipe, tokenizer, self.chat_template, folder, self.num_proc)
            if source_state(named) != before:  # it would be kept as what the files held before
                raise UserError(
                    f"{title(self.source)}: has changed while it was read; start again once nobody writes to it"
                )

        return cached(root, [__version__, recipe, sources, about, template], fill)

    def prepare_data(self) -> None:
        """Read, split, corrupt, tokenise and truncate, once a node; nothing if an earlier run has done so."""
        self._settle_tokenizer()
        if self.source is not None or not self._tested_apart:
            self._folder()

    def setup(self, stage: str | None = None) -> None:
        """Open what was prepared, the same on every rank. Needed once; later calls do nothing."""
        self._settle_tokenizer()
        if stage in ("test", "predict") and self._tested_apart:
            return
        if not self._rows:
            self._open(self._folder(), quiet=stage in ("test", "predict"))

    @property
    def _tested_apart(self) -> bool:
        """Whether `test` and `predict` need no training rows."""
        return self.test_source is not None or bool(self.benchmarks)

    def _open(self, folder: Path, quiet: bool) -> None:
        try:
            meta = self._load(folder)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise UserError(
                f"{folder}: holds something else than prepared data ({type(error).__name__}: {error}); remove that"
                " folder (--data.cache_dir)"
            ) from None
        for name, rows in self._rows.items():
            if rows.noise is not None:
                self.reports[name].count_noise(rows)
        if quiet:
            return
        if meta["skipped"]:
            kept = self._note_bad_rows(folder)
            rank_zero_warn(
                f"{title(self.source)}: skipped {meta['skipped']} rows, listed in {kept}; the first:"
                f" {meta['bad_rows'][0]}"
            )
        if self.validation_fraction and self.validation_source is None and not len(self._rows["validation"]):
            rank_zero_warn(f"{title(self.source)}: too few rows to hold any out; there will be no validation")
        for report in self.reports.values():
            if report.examples:
                rank_zero_info(str(report))
        self._check_end_of_turn(self._rows["train"])
        for found in self.samples("train", 2):
            text = as_text(found)
            shown = text if len(text) <= SHOWN else f"{text[:SHOWN]} …"
            id = visible(" ".join(found.id.split()))
            rank_zero_info(f"example {id}, [supervised], {{noisy}}, ~cut off~:\n{shown}")
        if self.packing:
            self._pack()

    def _load(self, folder: Path) -> dict[str, Any]:
        meta: dict[str, Any] = json.loads((folder / DONE).read_text(encoding="utf-8"))
        self._held_out = Spool(folder / "held_out.arrow")
        words = None
        if any(isinstance(op, TokenNoise) for op in self.noise.ops):
            words = vocabulary(self.tokenizer, np.load(folder / "counts.npy", allow_pickle=False))
        clean = replace(self.noise, ops=[])
        for name, counted in meta["reports"].items():
            if name not in SPLITS:
                raise ValueError(f"{name!r} is no split")
            noise = (
                clean if name == "validation" or (name == "train" and "train" not in self.noise.splits) else self.noise
            )
            examples = Tokens(folder / f"{name}.arrow")
            self._rows[name], self.reports[name] = PreparedDataset(examples, None, noise, words), Report.load(counted)
        return meta

    def _note_bad_rows(self, folder: Path) -> Path:
        """Put the list of skipped rows beside the logs, if there are any, and return where it is."""
        log_dir = self.trainer.log_dir if self.trainer else None
        if log_dir is None:
            return folder / BAD_ROWS
        target = Path(log_dir) / BAD_ROWS
        if self.trainer is not None and self.trainer.is_global_zero:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / BAD_ROWS, target)
        return target

    def _pack(self) -> None:
        for name, rows in self._rows.items():
            if len(rows):
                lengths = rows.examples.lengths()
                rows.rows = pack(lengths.tolist(), self.max_length)
                full = lengths.sum() / (len(rows.rows) * self.max_length)
                rank_zero_info(
                    f"{name}: packed into {len(rows.rows)} rows of {self.max_length} tokens, {full:.1%} full"
                )

    def _check_end_of_turn(self, rows: PreparedDataset) -> None:
        # One template writes every turn: a few examples show how it ends.
        few = [rows.examples[at] for at in range(min(len(rows.examples), 100))]
        last = [int(e.labels[e.labels != IGNORE_INDEX][-1]) for e in few]
        self._turn_ends = sorted(set(last) & set(markers(self.tokenizer).tolist()))
        if last and not self._turn_ends:
            rank_zero_warn(
                f"the last supervised token of a response, {self.tokenizer.decode([last[0]])!r}, is not a special"
                " token: the model will not learn where to stop (--data.chat_template)"
            )

    def samples(self, split: str, count: int) -> list[Sample]:
        """Describe some examples as they are trained on, to be looked at before anything is trained.

        Args:
            split: train, validation, or validation_noisy.
            count: How many; they are spread over the split.
        """
        names = [type(op).__name__ for op in self.noise.ops]
        chosen, rows = self.spread(split, count), self._rows[split]
        return [
            sample(self.tokenizer, rows.example(at), names, *rows.examples.cut(at), keep=self.keep) for at in chosen
        ]

    def spread(self, split: str, count: int | None = None) -> list[int]:
        """Return the positions of some examples, spread over the split in its order; all of them without a count."""
        if split not in self._rows:
            raise UserError(f"there is no split {split!r}; known: {', '.join(self._rows)}")
        total = len(self._rows[split].examples)
        wanted = total if count is None else min(count, total)
        return [total * i // wanted for i in range(wanted)]

    def example(self, split: str, at: int) -> Prepared:
        """Return an example as it is trained on in the first epoch."""
        return self._rows[split].example(at)

    def size(self, split: str) -> int:
        """Return the number of examples of a split."""
        return len(self._rows[split].examples)

    def truths(self, field: str) -> dict[str, bool]:
        """Return what a column of the training rows says of each example, by id."""
        return flags(self._recipe(), field)

    def batches_of(self, split: str, chosen: Sequence[int]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Yield chosen examples in batches that need no more memory than those of training, with their positions.

        They meet in an order drawn from `seed`, as in training; one example a row, packed or not.
        """
        rows, size = self._rows[split], self.batch_size
        lengths, room = rows.examples.lengths(), self.max_tokens_per_batch
        if room is None and self.packing:
            room = size * self.max_length
        if room is None:
            order = [chosen[i] for i in np.random.default_rng([self.seed]).permutation(len(chosen))]
            batches = [order[start : start + size] for start in range(0, len(order), size)]
        else:
            found = bounded_batches([int(lengths[at]) for at in chosen], room, self.seed)
            batches = [[chosen[i] for i in batch] for batch in found]
        collate = TrainCollator(self.tokenizer.pad_token_id)
        for batch in batches:
            yield batch, collate([rows.example(at) for at in batch])

    @property
    def longest(self) -> int:
        """Tokens of the longest prepared example; 0 before anything is prepared."""
        lengths = [rows.examples.lengths() for rows in self._rows.values()]
        return max((int(found.max()) for found in lengths if len(found)), default=0)

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens at which generation ends: end of sequence, and the end of a turn if it is another one."""
        self._settle_tokenizer()
        ends = {self.tokenizer.eos_token_id, *getattr(self, "_turn_ends", [])}
        if "<|im_end|>" in (self.tokenizer.chat_template or ""):
            ends |= {self.tokenizer.get_vocab().get("<|im_end|>", self.tokenizer.eos_token_id)}
        if (end := end_of_turn(self.tokenizer)) is not None:
            ends |= {end}
        return sorted(ends)


def _tokenizer_identity(tokenizer: Any) -> str:
    """Return a hash of everything about a tokenizer that changes tokens or labels."""
    # A version, how its author truncated and padded, which means nothing here, and then everything else.
    parts = (
        tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')[2],
        tokenizer.chat_template,
        sorted(tokenizer.special_tokens_map.items()),
    )
    return f"{key(*parts):032x}"
