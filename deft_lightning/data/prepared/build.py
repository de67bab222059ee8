"""From sources to prepared tokens on disk: read, split, corrupt, tokenise, truncate, in memory that does not grow."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from deft_lightning.data.encoding.encode import Changed, Report, Supervise, corrupted, tokenise
from deft_lightning.data.encoding.tokenizer import build_tokenizer
from deft_lightning.data.examples import Example, Ints, Prepared
from deft_lightning.data.lazy import Lazy
from deft_lightning.data.noise import Noise
from deft_lightning.data.prepared.cache import DONE
from deft_lightning.data.prepared.spool import ROWS, TOKENS, SpooledExamples, Writer, record_batch, row_of
from deft_lightning.data.prepared.workers import in_order
from deft_lightning.data.records.formats import detect_format, normalise
from deft_lightning.data.sources.read import read_many
from deft_lightning.data.sources.rows import BadRows
from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX
from deft_lightning.hashing import uniform
from deft_lightning.terminal import visible

CHUNK = 500  # examples a job of a worker
SHOWN = 32  # tokens beyond a cut that are kept, for people to look at
BAD_ROWS = "bad_rows.tsv"
Source = str | list[str] | dict[str, float]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is prepared; see :class:`~deft_lightning.data.InstructionDataModule`."""

    source: Source
    format: str
    column_map: dict[str, str]
    subset: str | None
    split: str
    validation_source: Source | None
    validation_fraction: float
    seed: int
    on_bad_row: str
    tokenizer_size: int
    max_length: int
    keep: str
    supervise: Supervise
    noise: Noise

    def skip(self, bad: BadRows) -> BadRows | None:
        """Return what takes note of rows that cannot be used; None to stop at the first."""
        return bad if self.on_bad_row == "skip" else None


def read_examples(
    source: Source, recipe: Recipe, skip: Callable[[UserError], None] | None, *, need_response: bool = True
) -> Iterator[Example]:
    """Yield the normalised rows of one source or several; rows that cannot be used are told to ``skip``, or raise."""
    formats: dict[str, str] = {}
    rows = read_many(source, subset=recipe.subset, split=recipe.split, on_bad_row=skip, seed=recipe.seed)
    for where, record, name in rows:
        try:
            format = formats.get(name, recipe.format)
            if format == "auto":
                format = formats[name] = detect_format(record, where, recipe.column_map, need_response=need_response)
            yield normalise(record, where, format, recipe.column_map, need_response=need_response)
        except UserError as error:
            if skip is None:
                raise
            skip(error)


def title(source: Source | None) -> str:
    """Return the name of a source, or of several, for messages."""
    return visible(source if isinstance(source, str) else ", ".join(source or ()))


def _spool(source: Source, recipe: Recipe, path: Path, bad: BadRows) -> SpooledExamples:
    with Writer(path, ROWS) as out:
        for example in progress(read_examples(source, recipe, recipe.skip(bad)), f"reading {title(source)}"):
            out.add(row_of(example))
    if not out.count:
        problem = f"no usable row; the first problem: {bad.first[0]}" if bad.first else "no row (--data.source)"
        raise UserError(f"{title(source)}: {problem}")
    return SpooledExamples(path)


def progress(items: Iterable[Any] | None, text: str, total: int | None = None) -> Any:
    """Show a bar if this takes more than a few seconds and somebody looks."""
    return tqdm(items, desc=text, total=total, delay=5, unit=" rows", leave=False, disable=not sys.stderr.isatty())


def unique_ids(ids: Callable[[], Iterable[str]], digest_of: Callable[[int], str]) -> dict[int, str]:
    """Return new ids for the rows that share one, in a way that does not depend on the order of the rows.

    Rows of different content that share an id get the hash of their content beside it; repeats of the same content are
    numbered, which of them is which being all the same. Memory holds eight bytes a row, and the rows that share an id.

    Args:
        ids: Gives the id of every row; called twice.
        digest_of: Row to the hash of its content.
    """

    def short(id: str) -> int:
        return int.from_bytes(hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")

    hashes = np.fromiter((short(id) for id in ids()), dtype=np.uint64)
    known, counts = np.unique(hashes, return_counts=True)
    if not (counts > 1).any():
        return {}

    def exists(id: str) -> bool:
        at = int(np.searchsorted(known, wanted := np.uint64(short(id))))
        return at < len(known) and known[at] == wanted

    shared = np.isin(hashes, known[counts > 1])
    own = {at: id for at, id in enumerate(ids()) if shared[at]}
    contents: dict[str, set[str]] = {}
    for at, id in own.items():
        contents.setdefault(id, set()).add(digest_of(at))
    repeats: Counter[str] = Counter()
    taken: set[str] = set()
    renamed: dict[int, str] = {}
    for at, id in own.items():
        base = id if len(contents[id]) == 1 else f"{id}/{digest_of(at)}"
        repeats[base] += 1
        new = base if repeats[base] == 1 else f"{base}#{repeats[base]}"
        while new in taken or (new != id and exists(new)):
            repeats[base] += 1
            new = f"{base}#{repeats[base]}"
        taken.add(new)
        if new != id:
            renamed[at] = new
    return renamed


@dataclass
class View(Lazy[Example]):
    """Some rows of a spool, read when they are asked for."""

    rows: SpooledExamples
    places: Ints
    renamed: dict[int, str]

    def __len__(self) -> int:
        """Return how many."""
        return len(self.places)

    def __getitem__(self, at: int) -> Example:
        """Return one example under its unique id."""
        row = int(self.places[at])
        example = self.rows[row]
        return replace(example, id=self.renamed[row]) if row in self.renamed else example


def _view(rows: SpooledExamples) -> View:
    renamed = unique_ids(lambda: rows.column("id"), lambda at: rows[at].digest)
    return View(rows, np.arange(len(rows)), renamed)


def _splits(recipe: Recipe, folder: Path, bad: BadRows) -> dict[str, View]:
    whole = _view(_spool(recipe.source, recipe, folder / "rows.arrow", bad))
    if recipe.validation_source is not None:
        held = _view(_spool(recipe.validation_source, recipe, folder / "validation_rows.arrow", bad))
        return {"train": whole, "validation": held}
    draws = (uniform(recipe.seed, "split", digest) for digest in whole.rows.column("digest"))
    out = np.fromiter(draws, dtype=np.float64) < recipe.validation_fraction
    parts = {"train": np.flatnonzero(~out), "validation": np.flatnonzero(out)}
    splits = {name: replace(whole, places=places) for name, places in parts.items()}
    if not len(splits["train"]):
        raise UserError(f"{title(recipe.source)}: no row is left to train on; lower --data.validation_fraction")
    return splits


def _texts(examples: Iterable[Example]) -> Iterator[str]:
    for example in examples:
        yield from [example.text] if example.text else [m["content"] for m in example.messages or ()]
        calls = [message["tool_calls"] for message in example.messages or () if message.get("tool_calls")]
        if example.tools or calls:
            yield json.dumps([example.tools, calls], ensure_ascii=False)


def build(recipe: Recipe, tokenizer: Any | None, chat_template: str | None, folder: Path, num_proc: int) -> None:
    """Prepare both splits in a folder.

    Args:
        recipe: What to prepare.
        tokenizer: None builds one from the training rows and keeps it in the folder.
        chat_template: Template of a tokenizer that is built.
        folder: Empty folder.
        num_proc: Worker processes.

    Raises:
        UserError: A row that cannot be used (file, row, field), or nothing is left to train on.
    """
    bad = BadRows()
    splits = _splits(recipe, folder, bad)
    if tokenizer is None:
        train = splits["train"]
        if all(train[at].tokens for at in range(len(train))):
            raise UserError(
                f"{title(recipe.source)}: rows of tokens need the tokenizer they were made with (--data.tokenizer)"
            )
        tokenizer = build_tokenizer(_texts(train), recipe.tokenizer_size)
        if chat_template is not None:
            from deft_lightning.data.encoding.template import set_template

            set_template(tokenizer, chat_template)
        tokenizer.save_pretrained(folder / "tokenizer")
    clean = replace(recipe.noise, ops=[])
    plan = {
        "train": ("train", recipe.noise if "train" in recipe.noise.splits else clean),
        "validation": ("validation", clean),
    }
    if "validation" in recipe.noise.splits and recipe.noise.ops and len(splits["validation"]):
        plan["validation_noisy"] = ("validation", recipe.noise)
    reports: dict[str, Any] = {}
    for name, (split, noise) in plan.items():
        report = Report(name)
        counts = _prepare(splits[split], noise, recipe, tokenizer, folder / f"{name}.arrow", report, bad, num_proc)
        if name == "train":
            np.save(folder / "counts.npy", counts)
        reports[name] = asdict(report)
    with Writer(folder / "held_out.arrow", ROWS) as out:
        for example in splits["validation"]:
            out.add(row_of(example))
    for spool in ("rows.arrow", "validation_rows.arrow"):
        (folder / spool).unlink(missing_ok=True)
    if len(bad):
        bad.write(folder / BAD_ROWS)
    meta = {"reports": reports, "skipped": len(bad), "bad_rows": bad.first}
    (folder / DONE).write_text(json.dumps(meta, indent=2), encoding="utf-8")


class EncodedChunk(NamedTuple):
    """What a job gives.

    Attributes:
        batch: The examples that are left, a record batch of :data:`TOKENS` as bytes; None if there is none.
        counted: What became of the examples.
        labels: Supervised tokens, and how often each occurs.
        refused: What is wrong with the rows that were left out.
        supervised: How many examples had a supervised token before truncation.
    """

    batch: pa.Buffer | None
    counted: Report
    labels: tuple[Ints, Ints]
    refused: list[UserError]
    supervised: int


@dataclass(frozen=True)
class Encoder:
    """What a worker does to some examples.

    Args:
        examples: Where they are read from.
        tokenizer: Tokenizer with its chat template.
        supervise: Which turns are learnt.
        skip: Whether rows that the template refuses are left out.
        max_length: Longest example in tokens.
        keep: Which end of a longer one is kept.
    """

    examples: View
    tokenizer: Any
    supervise: Supervise
    skip: bool
    max_length: int
    keep: str

    def __call__(self, start: int, changed: Changed) -> EncodedChunk:
        """Encode the examples from a position, those that noise has changed as they are now."""
        places = range(start, min(start + CHUNK, len(self.examples)))
        pairs = [changed[at] if at in changed else (self.examples[at], []) for at in places]
        refused: list[UserError] = []
        whole = tokenise(
            self.tokenizer, [e for e, _ in pairs], [m for _, m in pairs], refused if self.skip else None, self.supervise
        )
        counted, rows = Report(""), []
        for example in whole:
            counted.truncated += len(example.input_ids) > self.max_length
            short = example.truncate(self.max_length, self.keep)
            if counted.add(short):
                cut = self._cut(example)
                length = len(example.input_ids)
                rows.append((short.id, short.input_ids, short.labels, short.noise_code, length, short.skipped, cut))
        batch = record_batch(rows, TOKENS).serialize() if rows else None
        labels = np.concatenate([row[2] for row in rows]) if rows else np.zeros(0, dtype=np.int64)
        supervised = sum(int((example.labels != IGNORE_INDEX).any()) for example in whole)
        return EncodedChunk(
            batch, counted, np.unique(labels[labels != IGNORE_INDEX], return_counts=True), refused, supervised
        )

    def _cut(self, example: Prepared) -> Ints:
        if len(example.input_ids) <= self.max_length:
            return example.input_ids[:0]
        if self.keep == "end":
            return example.input_ids[: -self.max_length][-SHOWN:]
        return example.input_ids[self.max_length :][:SHOWN]


_encoder: Encoder | None = None


def _start(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    torch.set_num_threads(1)


def _work(start: int, changed: Changed) -> EncodedChunk:
    assert _encoder is not None
    return _encoder(start, changed)


def _run(encoder: Encoder, changed: Changed, workers: int) -> Iterator[EncodedChunk]:
    """Encode all examples in order."""
    jobs = (
        (start, {at: changed[at] for at in range(start, start + CHUNK) if at in changed})
        for start in range(0, len(encoder.examples), CHUNK)
    )
    if min(workers, -(-len(encoder.examples) // CHUNK)) <= 1:
        yield from itertools.starmap(encoder, jobs)
        return
    # A fork starts at once; after CUDA it is not allowed. Threads of the tokenizer do not survive it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    method = "spawn" if sys.platform != "linux" or torch.cuda.is_initialized() else "fork"
    yield from in_order(_work, jobs, workers, method, _start, (encoder,))


def _prepare(
    examples: View, noise: Noise, recipe: Recipe, tokenizer: Any, path: Path, report: Report, bad: BadRows, workers: int
) -> Ints:
    changed, report.applied = corrupted(examples, noise)
    encoder = Encoder(
        examples, tokenizer, recipe.supervise, recipe.on_bad_row == "skip", recipe.max_length, recipe.keep
    )
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    supervised_before, refused = 0, 0
    with Writer(path, TOKENS) as out, progress(None, f"preparing {report.name}", len(examples)) as bar:
        for found in _run(encoder, changed, workers):
            for problem in found.refused:
                bad(problem)
            refused += len(found.refused)
            supervised_before += found.supervised
            report.merge(found.counted)
            counts[found.labels[0]] += found.labels[1]
            if found.batch is not None:
                out.write(pa.ipc.read_record_batch(found.batch, TOKENS))
            bar.update(CHUNK)
    if len(examples) and not report.examples:
        report.explain(len(examples) - refused, supervised_before, recipe.max_length, bad.first)
    return counts
