"""InstructionDataModule: any instruction file in, batches with exact masks and noise codes out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from deft_lightning.data.announce import announce
from deft_lightning.data.benchmarks import named_benchmarks, read_benchmark
from deft_lightning.data.encoding.settled import SettledTokenizer
from deft_lightning.data.encoding.supervise import SpecialTokens, Supervise
from deft_lightning.data.encoding.thoughts import Reasoning
from deft_lightning.data.examples import Ints, Prepared, Prompt
from deft_lightning.data.loading.factory import LoaderFactory
from deft_lightning.data.loading.prompts import fitting, prompts_of, read_all
from deft_lightning.data.loading.shape import BatchShape, largest_batch
from deft_lightning.data.noise import Noise
from deft_lightning.data.prepared.cache import Temporary, cache_root
from deft_lightning.data.prepared.folder import prepared_folder
from deft_lightning.data.prepared.origins import Origin, origins
from deft_lightning.data.prepared.report import Report
from deft_lightning.data.prepared.truth import flags
from deft_lightning.data.preview import Sample
from deft_lightning.data.protocols import Run
from deft_lightning.data.records.formats import Format
from deft_lightning.data.settings import Benchmarks, DataSettings
from deft_lightning.data.sources.given import Settled, Source, TestSource, settled
from deft_lightning.data.splits import Splits
from deft_lightning.evaluation.benchmarks import TestSet


class InstructionDataModule(LightningDataModule):
    """Instruction data for supervised fine-tuning, with synthetic label noise.

    Args:
        source: A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow; text also as .gz, .bz2, .xz, .zst), a folder or a
            pattern of these, a URL (`https://`, `hf://`, `s3://`), a hub id (`?subset=&split=&streaming=&limit=`), or
            `reasoning_gym:<task>[?option=value&...]` (generated). Several: a list, or a weight for each (0.5: half of
            it, chosen by hash; 2: twice). From Python also rows: a list of dicts, or a `datasets.Dataset`.
        format: Layout of a row; auto looks at the first one. messages, sharegpt (conversations), prompt_completion,
            alpaca (instruction, input, output or response), question_answer, text, tokens (input_ids, labels).
        column_map: Field to the column that holds it, for example `--data.column_map.question extra_info.question`.
        ignore_columns: One or more columns, or keys such as `messages[].images`, to leave out of every row.
        weight_column: Column that weights the loss of each row; default: `weight`, if it holds numbers.
        subset: Configuration of a hub dataset.
        split: Split of a hub dataset or folder.
        validation_source: Validation rows; default: held out of `source`.
        validation_fraction: Share held out of `source` by a hash of each example, in [0, 1); duplicates stay together.
        test_source: Rows for `test` and `predict`; default: the validation rows.
        benchmarks: Benchmarks for `test` and `predict` instead of rows: names, or where the rows of each are, for
            example `--data.benchmarks '{math500: math500.jsonl, gsm8k: gsm8k.jsonl}'`;
            docs/guides/evaluation.md lists them.
        benchmark_instruction: Text after each benchmark question, instead of the benchmark's own; empty for none.
        on_bad_row: Stop at a row that cannot be used, or skip it; skipped rows are counted, and the first is shown.
        tokenizer: Hub id or folder; default: the tokenizer of the model, else a tokenizer built from the training rows.
        tokenizer_size: Vocabulary size of a tokenizer built from the data; 262 or less means one token per byte.
        chat_template: Default: the tokenizer's own, else ChatML; `chatml`, a file, a Jinja template, or `trl:qwen3`.
        max_length: Longest example in tokens, and longest row when packing.
        keep: Which end of a longer example is kept.
        supervise: Train on every assistant turn, the last one, or all tokens.
        reasoning: Reasoning of a turn: written by the template, into the text between think tags, or dropped.
        supervise_reasoning: Train on the reasoning too; false reads it like a prompt.
        special_tokens: Whether a special token written in a message is plain text or that token.
        packing: Put several examples into a row of at most `max_length` tokens; they do not attend to each other.
        batch_size: Examples (rows when packing) per device and micro-batch.
        max_tokens_per_batch: Bound batches by tokens, padding included, instead of `batch_size`.
        group_by_length: Put examples of similar length into a batch: less padding, but a less random order.
        eval_batch_size: Examples per device in validation, test and predict; default: `batch_size`.
        num_workers: Loader processes.
        num_proc: Processes that prepare the data.
        cache_dir: Where prepared data is kept; default: $DEFT_LIGHTNING_CACHE, or deft_lightning in the user's cache.
        cache: Keep prepared data for the next run.
        seed: Seed of the order and of the split.
        objectives: Objective of a source in place of `model.objective`, by name: `--data.objectives.gsm8k NLL`.
        noise: Synthetic label noise.
        exclude: Audit of the training rows (`probe --audit FILE`); its rows are left out of training.
        exclude_top: Leave out only the worst rows of `exclude`: a share of the ranked rows (5%), or a count (50).
        weights_from: Audit that weights rows in training: by `weight` of a line, else by `right`, the probability
            that the answer is right.

    Raises:
        UserError: On `setup`, for unreadable rows (file, row, field), or when nothing is left to train on.
    """

    def __init__(
        self,
        source: Source | None = None,
        format: Format = "auto",
        column_map: dict[str, str] | None = None,
        ignore_columns: list[str] | str | None = None,
        weight_column: str | None = None,
        subset: str | None = None,
        split: str = "train",
        validation_source: Source | None = None,
        validation_fraction: float = 0.05,
        test_source: TestSource | None = None,
        benchmarks: Benchmarks | None = None,
        benchmark_instruction: str | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        tokenizer: str | None = None,
        tokenizer_size: int = 4096,
        chat_template: str | None = None,
        max_length: int = 1024,
        keep: Literal["start", "end"] = "start",
        supervise: Supervise = "assistant",
        reasoning: Reasoning = "template",
        supervise_reasoning: bool = True,
        special_tokens: SpecialTokens = "text",
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
        objectives: dict[str, Any] | None = None,
        noise: Noise = Noise(),  # noqa: B008 - frozen
        exclude: str | None = None,
        exclude_top: int | str | None = None,
        weights_from: str | None = None,
    ) -> None:
        self.settings = DataSettings.of(**{k: v for k, v in locals().items() if k not in ("self", "__class__")})
        super().__init__()
        self.benchmarks = named_benchmarks(benchmarks)
        self.test_sets: list[TestSet] = []  # what the prompts of each test loader belong to, once they are made
        self._tokenizer = SettledTokenizer(chat_template)
        self._splits: Splits | None = None
        self._turn_ends: list[int] | None = None  # None until the rows are announced
        self._temporary: Temporary | None = None

    @property
    def source(self) -> Settled | None:
        """Return where the training rows are."""
        return self.settings.source

    @property
    def noise(self) -> Noise:
        """Return the synthetic label noise."""
        return self.settings.noise

    @property
    def tokenizer_name(self) -> str | None:
        """Return the hub id or folder of the tokenizer that was asked for."""
        return self.settings.tokenizer

    @property
    def batch_size(self) -> int:
        """Return the number of examples per device and step; Lightning's tuner sets it."""
        return self.settings.batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.settings = replace(self.settings, batch_size=size)

    @property
    def test_source(self) -> Settled | None:
        """Return rows for `test` and `predict`; may be set between runs."""
        return self.settings.test_source

    @test_source.setter
    def test_source(self, source: TestSource | None) -> None:
        self.settings = replace(self.settings, test_source=settled(source, "--data.test_source"))

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer with its chat template; None before it is named, given or built."""
        return self._tokenizer.current

    @property
    def added_tokens(self) -> tuple[int, ...]:
        """Return ids of the tokens that `model.add_tokens` has added to the tokenizer."""
        return self._tokenizer.added

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Use a tokenizer object, for example a checkpoint's; a ``chat_template`` asked for wins over its own."""
        self._tokenizer.use(tokenizer)

    @property
    def stop_token_ids(self) -> list[int]:
        """Return tokens at which generation ends: end of sequence, and the end of a turn if it is another one."""
        self._settle_tokenizer()
        return self._tokenizer.stops(self._turn_ends or [])

    def _settle_tokenizer(self) -> None:
        run = Run.of(self.trainer)
        name = self.settings.tokenizer or run.pretrained
        if self._tokenizer.settle(name, run.trust_remote_code, run.add_tokens, self._folder):
            self._splits = None  # what was prepared for another model is of another vocabulary

    def _folder(self) -> Path:
        """Return the folder of the prepared data, prepared now if nobody has."""
        recipe, root = self.settings.recipe(), cache_root(self.settings.cache_dir) / "data"
        if not self.settings.cache:
            self._temporary = self._temporary or Temporary()
            root = self._temporary.path
        tokenizer = None if self._tokenizer.built else self.tokenizer
        return prepared_folder(recipe, tokenizer, self.settings.chat_template, root, self.settings.num_proc)

    def prepare_data(self) -> None:
        """Read, split, corrupt, tokenise and truncate, once a node; nothing if an earlier run has done so."""
        self._settle_tokenizer()
        if self.source is not None or not self.settings.tests_apart:
            self._folder()

    def setup(self, stage: str | None = None) -> None:
        """Open what was prepared, the same on every rank. Needed once; later calls do nothing."""
        self._settle_tokenizer()
        testing = stage in ("test", "predict")
        if testing and self.settings.tests_apart:
            return
        if self._splits is None:
            self._splits, self._turn_ends = Splits(self._folder(), self.settings, self.tokenizer), None
        if not testing and self._turn_ends is None:
            self._turn_ends = announce(self._splits, self.settings, self.trainer)
            if self.settings.packing:
                self._splits.pack()

    @property
    def splits(self) -> Splits:
        """Return the prepared rows.

        Raises:
            RuntimeError: Before `setup`.
        """
        if self._splits is None:
            raise RuntimeError("the data is not prepared yet: call prepare_data() and setup()")
        return self._splits

    @property
    def reports(self) -> dict[str, Report]:
        """Return what became of the examples, by split; empty before they are prepared."""
        return {} if self._splits is None else self._splits.reports

    @property
    def audited(self) -> list[str]:
        """Return what audits changed in the training rows, a line each; empty before they are prepared."""
        return [] if self._splits is None else self._splits.audited["lines"]

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest prepared example; 0 before anything is prepared."""
        return 0 if self._splits is None else self._splits.longest

    @property
    def label_counts(self) -> Ints | None:
        """Return how often each token is a label of the training rows, ``(V,)``; None before they are prepared."""
        return None if self._splits is None else self._splits.label_counts

    @property
    def largest_batch(self) -> BatchShape | None:
        """Return the shape of the largest micro-batch that a device trains on; None before anything is prepared."""
        if self._splits is None:
            return None
        rows = self._splits["train"]
        share = float(self._splits.label_counts.sum()) / max(1, int(rows.examples.lengths().sum()))
        return largest_batch(rows, self.settings, Run.of(self.trainer), min(share, 1.0))

    def size(self, split: str) -> int:
        """Return the number of examples of a split."""
        return self.splits.size(split)

    def example(self, split: str, at: int) -> Prepared:
        """Return an example as it is trained on in the first epoch."""
        return self.splits.example(split, at)

    def spread(self, split: str, count: int | None = None) -> list[int]:
        """Return the positions of some examples, spread over the split in its order; all of them without a count."""
        return self.splits.spread(split, count)

    def samples(self, split: str, count: int) -> list[Sample]:
        """Describe some examples, spread over the split, as they are trained on, to be looked at before."""
        return self.splits.samples(split, count)

    def batches_of(self, split: str, positions: Sequence[int]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Yield examples in batches that need no more memory than those of training, with their positions."""
        return self._loaders().some(self.splits[split], positions)

    def truths(self, field: str) -> dict[str, bool]:
        """Return what a column of the training rows says of each example, by id."""
        by_row = flags(self.settings.recipe(), field)
        return {id: by_row[origin.where] for id, origin in self.origins().items() if origin.where in by_row}

    def origins(self, wanted: Collection[str] | None = None) -> dict[str, Origin]:
        """Return where training examples come from, by id: file, row number and prompt; all of them by default."""
        return origins(self.settings.recipe(), wanted)

    def _loaders(self) -> LoaderFactory:
        return LoaderFactory(self.settings, Run.of(self.trainer), self.tokenizer.pad_token_id)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of the training split in the order of (seed, epoch)."""
        return self._loaders().train(self.splits["train"])

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return batches of the validation split; an empty list when there is none.

        With noise, a list of two loaders: the clean examples, and beside them corrupted ones. Those are the corrupted
        validation examples if `noise.splits` has `validation`, else as many of the training examples, on which what
        the model has memorised shows.
        """
        loaders, clean = self._loaders(), self.splits["validation"]
        if not len(clean):
            return []
        noisy = self.splits.corrupted(len(clean.examples), loaders.run.world)
        return [loaders.evaluate(clean), loaders.evaluate(noisy)] if noisy is not None else loaders.evaluate(clean)

    def test_dataloader(self) -> list[DataLoader[Any]] | DataLoader[Any]:
        """Return left-padded prompts with their gold responses; one loader for each benchmark, if any are named."""
        return self._prompt_loaders(need_response=True)

    def predict_dataloader(self) -> list[DataLoader[Any]] | DataLoader[Any]:
        """Return left-padded prompts; rows without a response are welcome, but for those of benchmarks."""
        return self._prompt_loaders(need_response=False)

    def _prompt_loaders(self, need_response: bool) -> list[DataLoader[Any]] | DataLoader[Any]:
        loaders = self._loaders()
        sets = [fitting(*prompts, loaders.run.positions) for prompts in self._prompts(need_response)]
        self.test_sets = [tests for tests, _ in sets]
        made = [loaders.prompts(ready) for _, ready in sets]
        return made if self.benchmarks else made[0]

    def _prompts(self, need_response: bool) -> list[tuple[TestSet, list[Prompt]]]:
        if self.benchmarks:
            asked = self.settings.benchmark_instruction
            return [read_benchmark(benchmark, rows, self.tokenizer, asked) for benchmark, rows in self.benchmarks]
        apart = self.test_source is not None
        rows = read_all(self.settings.recipe(self.test_source), need_response) if apart else self.splits.held_out
        return [(TestSet(), prompts_of(self.tokenizer, rows, need_response, self.settings.teaching))]
