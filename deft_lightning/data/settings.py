"""The settings of a data module, checked together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from deft_lightning.data.encoding.supervise import SpecialTokens, Supervise, Teaching
from deft_lightning.data.encoding.thoughts import Reasoning
from deft_lightning.data.noise import Noise
from deft_lightning.data.prepared.audit_file import Top
from deft_lightning.data.prepared.recipe import Recipe
from deft_lightning.data.records.formats import FIELDS, Format
from deft_lightning.data.sources.choice import check_choice
from deft_lightning.data.sources.given import Settled, settled
from deft_lightning.data.sources.read import weights
from deft_lightning.errors import UserError, did_you_mean

SOURCES = ("source", "validation_source", "test_source")
Benchmarks = dict[str, str | None] | list[str] | str


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What :class:`~deft_lightning.data.InstructionDataModule` is made with, under the same names.

    Raises:
        UserError: A value that means nothing, or two that exclude each other; the message names the option.
    """

    source: Settled | None
    format: Format
    column_map: dict[str, str]
    subset: str | None
    split: str
    validation_source: Settled | None
    validation_fraction: float
    test_source: Settled | None
    benchmarks: Benchmarks | None
    benchmark_instruction: str | None
    on_bad_row: Literal["error", "skip"]
    tokenizer: str | None
    tokenizer_size: int
    chat_template: str | None
    max_length: int
    keep: Literal["start", "end"]
    supervise: Supervise
    packing: bool
    batch_size: int
    max_tokens_per_batch: int | None
    group_by_length: bool
    eval_batch_size: int | None
    num_workers: int
    num_proc: int
    cache_dir: str | None
    cache: bool
    seed: int
    noise: Noise
    ignore_columns: tuple[str, ...] = ()
    weight_column: str | None = None
    reasoning: Reasoning = "template"
    supervise_reasoning: bool = True
    special_tokens: SpecialTokens = "text"
    exclude: str | None = None
    exclude_top: str | int | None = None
    weights_from: str | None = None
    objectives: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, **given: Any) -> DataSettings:
        """Return the settings that the arguments of a data module say."""
        sources = {name: settled(given[name], f"--data.{name}") for name in SOURCES}
        columns = {
            "column_map": dict(given["column_map"] or {}),
            "ignore_columns": _names(given["ignore_columns"]),
            "objectives": {str(name): _called(value) for name, value in dict(given["objectives"] or {}).items()},
        }
        return cls(**{**given, **sources, **columns})

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not 0.0 <= self.validation_fraction < 1.0:
            raise UserError(f"--data.validation_fraction {self.validation_fraction} is outside [0, 1)")
        if self.format not in get_args(Format):
            raise UserError(f"--data.format {self.format!r}; known: {', '.join(get_args(Format))}")
        for name in self.column_map:
            if name not in FIELDS:
                raise UserError(f"--data.column_map.{name}: no such field.{did_you_mean(name, FIELDS)}")
        if self.on_bad_row not in ("error", "skip"):
            raise UserError(f"--data.on_bad_row must be error or skip, not {self.on_bad_row!r}")
        if self.keep not in ("start", "end"):
            raise UserError(f"--data.keep must be start or end, not {self.keep!r}")
        if self.supervise not in get_args(Supervise):
            raise UserError(f"--data.supervise must be assistant, last or all, not {self.supervise!r}")
        for name, value, known in (
            ("reasoning", self.reasoning, get_args(Reasoning)),
            ("special_tokens", self.special_tokens, get_args(SpecialTokens)),
        ):
            if value not in known:
                raise UserError(f"--data.{name} must be {', '.join(known[:-1])} or {known[-1]}, not {value!r}")
        self._check_batches()
        self._check_numbers()
        if self.exclude_top is not None:
            Top.read(self.exclude_top)
            if self.exclude is None:
                raise UserError("--data.exclude_top needs an audit; name it with --data.exclude FILE")
        if self.benchmarks and self.test_source is not None:
            raise UserError("--data.test_source and --data.benchmarks exclude each other: leave one out")

    def _check_batches(self) -> None:
        tokens = self.max_tokens_per_batch
        if self.packing and self.group_by_length:
            raise UserError("--data.group_by_length has no effect with --data.packing: packed rows are full")
        if tokens is not None and self.group_by_length:
            raise UserError("--data.max_tokens_per_batch groups by length already; leave out --data.group_by_length")
        if self.packing and tokens is not None and tokens < self.max_length:
            raise UserError(
                f"--data.max_tokens_per_batch {tokens} is less than a packed row of --data.max_length {self.max_length}"
            )

    def _check_numbers(self) -> None:
        if self.num_workers < 0 or self.tokenizer_size < 0:
            raise UserError("--data.num_workers and --data.tokenizer_size must not be negative")
        for name, value in (
            ("batch_size", self.batch_size),
            ("max_length", self.max_length),
            ("eval_batch_size", self.eval_batch_size),
            ("max_tokens_per_batch", self.max_tokens_per_batch),
            ("num_proc", self.num_proc),
        ):
            if value is not None and value < 1:
                raise UserError(f"--data.{name} must be at least 1, got {value}")

    @property
    def examples_per_evaluation_batch(self) -> int:
        """Return the number of examples per device in validation, test and predict."""
        return self.eval_batch_size or self.batch_size

    @property
    def teaching(self) -> Teaching:
        """Return what of a conversation is learnt."""
        return Teaching(self.supervise, self.reasoning, self.supervise_reasoning, self.special_tokens)

    @property
    def tests_apart(self) -> bool:
        """Return whether `test` and `predict` need no training rows."""
        return self.test_source is not None or bool(self.benchmarks)

    def recipe(self, source: Settled | None = None) -> Recipe:
        """Return what is prepared, of another source if one is given.

        Raises:
            UserError: Nothing says where the rows are, or a split or a subset is asked for where none are.
        """
        trained = [one for place in (self.source, self.validation_source) if place for one in weights(place)]
        if source is not None:  # --data.subset and --data.split may be meant for either
            check_choice([*weights(source), *trained], self.subset, self.split)
        elif trained:
            check_choice(trained, self.subset, self.split)
            if self.test_source is not None:
                check_choice(weights(self.test_source), None, "train")
        source = source or self.source
        if not source:
            raise UserError("no data: set --data.source to a file, a hub id or reasoning_gym:<task>")
        return Recipe(
            source, self.format, self.column_map, self.subset, self.split, self.validation_source,
            self.validation_fraction, self.seed, self.on_bad_row, self.tokenizer_size, self.max_length, self.keep,
            self.supervise, self.noise, self.ignore_columns, self.weight_column, self.reasoning,
            self.supervise_reasoning, self.special_tokens, self.exclude, self.exclude_top, self.weights_from,
        )  # fmt: skip

    def noise_of(self, split: str) -> Noise:
        """Return the noise of a split as it is prepared: `validation` is clean, beside it is `validation_noisy`."""
        corrupted = split == "validation_noisy" or (split == "train" and "train" in self.noise.splits)
        return self.noise if corrupted else replace(self.noise, ops=[])


def _called(value: Any, inside: bool = False) -> str:
    """Return the spelling ``NAME(option=value)`` of what YAML and the command line may give as a class and settings."""
    if isinstance(value, Mapping) and "class_path" in value:
        options = value.get("init_args") or {}
        return f"{value['class_path']}({', '.join(f'{name}={_called(one, True)}' for name, one in options.items())})"
    if not inside and not isinstance(value, str):
        raise UserError(f"--data.objectives: an objective is NAME or NAME(option=value), not {value!r}")
    return repr(value) if inside else value


def _names(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return names of columns: of a list, of one alone, or of a list that YAML refuses for brackets in a name."""
    if isinstance(given, str):
        inside = given[1:-1].split(",") if given.startswith("[") and given.endswith("]") else [given]
        given = [name.strip().strip("'\"") for name in inside]
    return tuple(name for name in given or () if name)
