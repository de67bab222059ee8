"""Everything that decides what is prepared, and the examples that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from deft_lightning.data.encoding.supervise import SpecialTokens, Supervise, Teaching
from deft_lightning.data.encoding.thoughts import Reasoning
from deft_lightning.data.examples import Example
from deft_lightning.data.noise import Noise
from deft_lightning.data.records.formats import FIELDS, detect_format, normalise
from deft_lightning.data.records.leftovers import ColumnReport
from deft_lightning.data.sources.given import GivenRows, Settled
from deft_lightning.data.sources.layouts import Expected
from deft_lightning.data.sources.names import source_names
from deft_lightning.data.sources.places import shown
from deft_lightning.data.sources.read import read_many
from deft_lightning.data.sources.remarks import OnRemark, Remark, SayOnce
from deft_lightning.data.sources.rows import BadRows, spelt_otherwise
from deft_lightning.errors import UserError
from deft_lightning.terminal import visible

HEADERS = 1000  # sets of columns whose spelling is looked at


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is prepared; see :class:`~deft_lightning.data.InstructionDataModule`."""

    source: Settled
    format: str
    column_map: dict[str, str]
    subset: str | None
    split: str
    validation_source: Settled | None
    validation_fraction: float
    seed: int
    on_bad_row: str
    tokenizer_size: int
    max_length: int
    keep: str
    supervise: Supervise
    noise: Noise
    ignore_columns: tuple[str, ...] = ()
    weight_column: str | None = None
    reasoning: Reasoning = "template"
    supervise_reasoning: bool = True
    special_tokens: SpecialTokens = "text"
    exclude: str | None = None
    exclude_top: str | int | None = None
    weights_from: str | None = None

    @property
    def teaching(self) -> Teaching:
        """Return what of a conversation is learnt."""
        return Teaching(self.supervise, self.reasoning, self.supervise_reasoning, self.special_tokens)

    def skip(self, bad: BadRows) -> BadRows | None:
        """Return what takes note of rows that cannot be used; None to stop at the first."""
        return bad if self.on_bad_row == "skip" else None


def read_examples(
    source: Settled,
    recipe: Recipe,
    skip: Callable[[UserError], None] | None,
    *,
    need_response: bool = True,
    on_remark: OnRemark | None = None,
    report: ColumnReport | None = None,
) -> Iterator[Example]:
    """Yield the normalised rows of one source or several.

    Args:
        source: Where they are.
        recipe: How they are read.
        skip: Told of rows that cannot be used; None raises at the first.
        need_response: Whether a conversation must have something to learn.
        on_remark: Told of what was decided about a source; default: it is said.
        report: Counts what became of the columns.
    """
    formats: dict[str, str] = {}
    places = {name: place for place, name in enumerate(source_names(source))}
    headers: set[tuple[str, ...]] = set()
    expected = Expected(recipe.format, recipe.column_map, need_response)
    on_remark = SayOnce() if on_remark is None else on_remark
    rows = read_many(
        source, subset=recipe.subset, split=recipe.split, on_bad_row=skip, seed=recipe.seed, expected=expected,
        on_remark=on_remark,
    )  # fmt: skip
    for where, record, name in rows:
        try:
            format = formats.get(name, recipe.format)
            if format == "auto":
                format = formats[name] = detect_format(
                    record, where, recipe.column_map, need_response=need_response, ignore=recipe.ignore_columns
                )
            example = normalise(
                record, where, format, recipe.column_map, need_response=need_response, ignore=recipe.ignore_columns,
                weight_column=recipe.weight_column, report=report,
            )  # fmt: skip
            yield replace(example, source=place) if (place := places[name]) else example
        except UserError as error:
            if skip is None:
                raise
            skip(error)
            continue
        if (header := (name, *record)) not in headers and len(headers) < HEADERS:
            headers.add(header)
            if columns := spelt_otherwise(record, FIELDS, recipe.column_map):
                read = ", ".join(f"{column!r} as {field}" for column, field in columns.items())
                on_remark(Remark("names", f"{shown(name)}: read {read}"))


def title(source: Settled | None) -> str:
    """Return the name of a source, or of several, for messages."""
    names = [str(source)] if isinstance(source, str | GivenRows) else list(source or ())
    return visible(", ".join(map(shown, names)))
