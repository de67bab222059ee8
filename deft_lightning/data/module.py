"""InstructionDataModule: any instruction file in, batches with exact masks and noise codes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from deft_lightning.data.collate import Prepared, PromptCollator, TrainCollator
from deft_lightning.data.noise import Noise
from deft_lightning.data.order import ResumableLoader, ShardedSampler
from deft_lightning.data.prepare import (
    Report,
    corrupt_responses,
    corrupt_tokens,
    finish,
    prompts,
    tokenise,
    vocabulary,
)
from deft_lightning.data.records import FIELDS, Example, Format, detect_format, normalise
from deft_lightning.data.sources import read
from deft_lightning.data.template import end_of_turn, markers, set_template
from deft_lightning.data.tokenizer import build_tokenizer, load_tokenizer
from deft_lightning.errors import UserError, did_you_mean
from deft_lightning.hashing import uniform


class InstructionDataModule(LightningDataModule):
    """Instruction data for supervised fine-tuning, with synthetic label noise.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, a folder or hub id that `datasets` loads, or
            `reasoning_gym:<task>[?option=value&...]` (generated, no network).
        format: Layout of a row; auto looks at the first one. messages, sharegpt (conversations), prompt_completion,
            alpaca (instruction, input, output or response), question_answer, text, tokens (input_ids, labels).
        column_map: Canonical field to the column that holds it, dotted for nested ones, for example
            `--data.column_map.question extra_info.question`.
        subset: Configuration of a hub dataset.
        split: Split of a hub dataset or folder.
        validation_source: Validation rows; default: held out of `source`.
        validation_fraction: Share held out of `source` by a hash of each example, in [0, 1); duplicates stay together.
        test_source: Rows for `test` and `predict`; default: the validation rows.
        on_bad_row: Stop at a row that cannot be used, or skip it; skipped rows are counted and the first is shown.
        tokenizer: Hub id or folder; default: the one of `model.pretrained`, else one built from the training rows.
        tokenizer_size: Vocabulary of a tokenizer that is built; at most 262 means one token a byte.
        chat_template: None is the tokenizer's own (ChatML if it has none); `chatml`, a file, or a Jinja template.
        max_length: Longest example in tokens; what exceeds it is cut off at the end.
        batch_size: Examples per device and step.
        eval_batch_size: Examples per device in validation, test and predict; default: `batch_size`.
        num_workers: Loader processes.
        seed: Seed of the order and of the split.
        noise: Synthetic label noise.

    Raises:
        UserError: On `setup`, for unreadable rows (file, row, field), or when nothing is left to train on.
    """

    def __init__(
        self,
        source: str | None = None,
        format: Format = "auto",
        column_map: dict[str, str] | None = None,
        subset: str | None = None,
        split: str = "train",
        validation_source: str | None = None,
        validation_fraction: float = 0.05,
        test_source: str | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        tokenizer: str | None = None,
        tokenizer_size: int = 4096,
        chat_template: str | None = None,
        max_length: int = 1024,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
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
        if num_workers < 0 or tokenizer_size < 0:
            raise UserError("--data.num_workers and --data.tokenizer_size must not be negative")
        for name, value in (
            ("batch_size", batch_size),
            ("max_length", max_length),
            ("eval_batch_size", eval_batch_size),
        ):
            if value is not None and value < 1:
                raise UserError(f"--data.{name} must be at least 1, got {value}")
        self.source, self.format, self.column_map = source, format, dict(column_map or {})
        self.subset, self.split, self.on_bad_row = subset, split, on_bad_row
        self.validation_source, self.validation_fraction = validation_source, validation_fraction
        self.test_source = test_source
        self.tokenizer_name, self.tokenizer_size, self.chat_template = tokenizer, tokenizer_size, chat_template
        self.max_length, self.batch_size, self.eval_batch_size = max_length, batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed, self.noise = num_workers, seed, noise
        self.tokenizer: Any = None
        self._settled: str | None = None
        self.reports: dict[str, Report] = {}
        self._examples: dict[str, list[Example]] = {}
        self._prepared: dict[str, list[Prepared]] = {}

    # ---------------------------------------------------------------- reading

    def _read(self, source: str, *, need_response: bool = True) -> list[Example]:
        examples: list[Example] = []
        skipped: list[str] = []
        format: str = self.format

        def skip(error: UserError) -> None:
            if self.on_bad_row == "error":
                raise error
            skipped.append(str(error))

        for where, record in read(source, subset=self.subset, split=self.split, on_bad_row=skip):
            try:
                if format == "auto":
                    format = detect_format(record, where, self.column_map, need_response=need_response)
                examples.append(normalise(record, where, format, self.column_map, need_response=need_response))
            except UserError as error:
                skip(error)
        if skipped:
            rank_zero_warn(f"{source}: skipped {len(skipped)} rows; the first: {skipped[0]}")
        if not examples:
            raise UserError(f"{source}: no usable row; the first problem: {skipped[0]}")
        return _unique_ids(examples)

    def _split(self) -> None:
        if self._examples:
            return
        if self.source is None:
            raise UserError("no data: set --data.source to a file, a hub id or reasoning_gym:<task>")
        rows = self._read(self.source)
        if self.validation_source is not None:
            self._examples = {"train": rows, "validation": self._read(self.validation_source)}
        else:
            held_out = [uniform(self.seed, "split", row.digest) < self.validation_fraction for row in rows]
            self._examples = {
                "train": [row for row, out in zip(rows, held_out, strict=True) if not out],
                "validation": [row for row, out in zip(rows, held_out, strict=True) if out],
            }
            if self.validation_fraction and not self._examples["validation"]:
                rank_zero_warn(f"{self.source}: too few rows to hold any out; there will be no validation")
        if not self._examples["train"]:
            raise UserError(f"{self.source}: no row is left to train on; lower --data.validation_fraction")

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Use a tokenizer object, for example a checkpoint's, instead of naming or building one.

        A ``chat_template`` that was asked for still wins over the tokenizer's own.
        """
        self.tokenizer, self._settled = tokenizer, None
        if tokenizer is not None and self.chat_template is not None:
            set_template(tokenizer, self.chat_template)

    def _settle_tokenizer(self) -> None:
        model = getattr(self.trainer, "lightning_module", None) if self.trainer else None
        name = self.tokenizer_name or getattr(model, "pretrained", None)
        if self.tokenizer is not None and name in (None, self._settled):
            return
        self._settled = name
        self._prepared = {}  # what was prepared for another model is of another vocabulary
        if name is not None:
            self.tokenizer = load_tokenizer(name)
            set_template(self.tokenizer, self.chat_template)
            return
        self._split()
        train = self._examples["train"]
        if all(example.tokens for example in train):
            raise UserError(f"{self.source}: rows of tokens need the tokenizer they were made with (--data.tokenizer)")
        texts = [t for e in train for t in ([e.text] if e.text else [m["content"] for m in e.messages or ()])]
        self.tokenizer = build_tokenizer(texts, self.tokenizer_size)
        if self.chat_template is not None:
            set_template(self.tokenizer, self.chat_template)

    # ---------------------------------------------------------------- preparing

    def setup(self, stage: str | None = None) -> None:
        """Read, split, corrupt, tokenise and truncate; the same on every rank. Needed once; later calls do nothing."""
        self._settle_tokenizer()
        if stage in ("fit", "validate", None) and not self._prepared:
            self._split()
            self._prepare()
        if stage in ("test", "predict") and self.test_source is None:
            self._split()

    def _prepare(self) -> None:
        clean_train: list[Prepared] | None = None
        words = None
        for name, examples in self._examples.items():
            noise = self.noise if name in self.noise.splits else replace(self.noise, ops=[])
            corrupted, marks, applied = corrupt_responses(examples, noise)
            refused: list[str] = []
            prepared = tokenise(self.tokenizer, corrupted, marks, refused if self.on_bad_row == "skip" else None)
            if refused:
                rank_zero_warn(f"{name}: skipped {len(refused)} rows; the first: {refused[0]}")
            if refused and not prepared:
                raise UserError(f"{name}: no usable row; the first problem: {refused[0]}")
            if name == "train":
                clean_train = prepared
                self._check_end_of_turn(prepared)
            if noise.ops:
                words = words or vocabulary(self.tokenizer, clean_train or prepared)
                prepared = corrupt_tokens(prepared, noise, words)
            report = self.reports[name] = Report(name, applied=applied)
            self._prepared[name] = finish(prepared, self.max_length, report)
            rank_zero_info(str(report))

    def _check_end_of_turn(self, prepared: Sequence[Prepared]) -> None:
        # One template writes every turn: a few examples show how it ends.
        last = [int(e.labels[e.labels != -100][-1]) for e in prepared[:100] if (e.labels != -100).any()]
        self._turn_ends = sorted(set(last) & set(markers(self.tokenizer).tolist()))
        if last and not self._turn_ends:
            rank_zero_warn(
                f"the last supervised token of a response, {self.tokenizer.decode([last[0]])!r}, is not a special"
                " token: the model will not learn where to stop (--data.chat_template)"
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest prepared example; 0 before anything is prepared."""
        return max((len(example.input_ids) for rows in self._prepared.values() for example in rows), default=0)

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

    # ---------------------------------------------------------------- loaders

    def _loader(self, dataset: Sequence[Any], collate: Callable[..., Any], size: int, train: bool) -> DataLoader[Any]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if len(dataset) < world:
            raise UserError(
                f"{len(dataset)} examples are fewer than the {world} ranks (--data.source, --trainer.devices)"
            )
        sampler = ShardedSampler(len(dataset), rank=rank, world=world, seed=self.seed, shuffle=train, even=train)
        return (ResumableLoader if train else DataLoader)(
            dataset,  # type: ignore[arg-type]
            batch_size=size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of the training split in the order of (seed, epoch)."""
        collate = TrainCollator(self.tokenizer.pad_token_id)
        return self._loader(self._prepared["train"], collate, self.batch_size, train=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return batches of the validation split; an empty list when there is none."""
        rows = self._prepared["validation"]
        collate = TrainCollator(self.tokenizer.pad_token_id)
        return self._loader(rows, collate, self.eval_batch_size, train=False) if rows else []

    def _prompt_loader(self, need_response: bool) -> DataLoader[Any]:
        if self.test_source is not None:
            rows = self._read(self.test_source, need_response=need_response)
        else:
            rows = self._examples["validation"]
        ready = prompts(self.tokenizer, rows)
        if not ready:
            raise UserError(
                "nothing to generate for: there are no held-out conversations; set --data.test_source or"
                " --data.validation_fraction"
            )
        if need_response and any(prompt.gold is None for prompt in ready):
            raise UserError("test needs a response in every row (--data.test_source); predict does not")
        collate = PromptCollator(self.tokenizer.pad_token_id)
        return self._loader(ready, collate, self.eval_batch_size, train=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return left-padded prompts with their gold responses."""
        return self._prompt_loader(need_response=True)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return left-padded prompts; rows without a response are welcome."""
        return self._prompt_loader(need_response=False)


def _unique_ids(examples: list[Example]) -> list[Example]:
    """Make every id stand for one example, in a way that does not depend on the order of the rows.

    Rows of different content that share an id get the hash of their content beside it; repeats of the same content are
    numbered, which of them is which being all the same.
    """
    contents: dict[str, set[str]] = {}
    for example in examples:
        contents.setdefault(example.id, set()).add(example.digest)
    repeats: Counter[str] = Counter()
    taken: set[str] = set()
    result = []
    for example in examples:
        base = example.id if len(contents[example.id]) == 1 else f"{example.id}/{example.digest}"
        repeats[base] += 1
        id = base if repeats[base] == 1 else f"{base}#{repeats[base]}"
        while id in taken or (id != base and id in contents):
            repeats[base] += 1
            id = f"{base}#{repeats[base]}"
        taken.add(id)
        result.append(example if id == example.id else replace(example, id=id))
    return result
