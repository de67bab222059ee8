"""From sources to prepared tokens on disk: read, split, corrupt, tokenise, truncate, in memory that does not grow."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from deft_lightning.data.cache import DONE
from deft_lightning.data.collate import IGNORE, Prepared
from deft_lightning.data.noise import Noise, ResponseNoise
from deft_lightning.data.prepare import Report, Supervise, corrupt_responses, tokenise
from deft_lightning.data.records import Example, detect_format, normalise
from deft_lightning.data.sources import read
from deft_lightning.data.tables import ROWS, TOKENS, Lazy, Rows, Writer, row_of
from deft_lightning.data.template import Ints
from deft_lightning.data.tokenizer import build_tokenizer
from deft_lightning.errors import UserError
from deft_lightning.hashing import uniform

CHUNK = 500  # examples a job of a worker
LISTED = 1000  # skipped rows that are kept with their reason


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is prepared; see :class:`~deft_lightning.data.InstructionDataModule`."""

    source: str
    format: str
    column_map: dict[str, str]
    subset: str | None
    split: str
    validation_source: str | None
    validation_fraction: float
    seed: int
    on_bad_row: str
    tokenizer_size: int
    max_length: int
    keep: str
    supervise: Supervise
    noise: Noise


@dataclass
class BadRows:
    """Rows that were left out: how many, and why the first thousand were."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        """Count a row."""
        self.count += 1
        if len(self.first) < LISTED:
            self.first.append(problem)


def read_examples(
    source: str, recipe: Recipe, skip: Callable[[UserError], None], *, need_response: bool = True
) -> Iterator[Example]:
    """Yield the normalised rows of a source; rows that are none are told to ``skip``."""
    format = recipe.format
    for where, record in read(source, subset=recipe.subset, split=recipe.split, on_bad_row=skip):
        try:
            if format == "auto":
                format = detect_format(record, where, recipe.column_map, need_response=need_response)
            yield normalise(record, where, format, recipe.column_map, need_response=need_response)
        except UserError as error:
            skip(error)


def skipper(recipe: Recipe, bad: BadRows) -> Callable[[UserError], None]:
    """Return what to do with a row that cannot be used: stop, or count it."""

    def skip(error: UserError) -> None:
        if recipe.on_bad_row == "error":
            raise error
        bad.add(str(error))

    return skip


def _spool(source: str, recipe: Recipe, path: Path, bad: BadRows) -> Rows:
    with Writer(path, ROWS) as out:
        for example in progress(read_examples(source, recipe, skipper(recipe, bad)), f"reading {source}"):
            out.add(row_of(example))
    if not out.count:
        raise UserError(f"{source}: no usable row; the first problem: {bad.first[0]}")
    return Rows(path)


def progress(items: Iterable[Any] | None, text: str, total: int | None = None) -> Any:
    """Show a bar if this takes more than a few seconds and somebody looks."""
    return tqdm(items, desc=text, total=total, delay=5, unit=" rows", leave=False, disable=not sys.stderr.isatty())


def unique_ids(ids: Sequence[str], digests: Sequence[str]) -> dict[int, str]:
    """Return new ids for the rows that share one, in a way that does not depend on the order of the rows.

    Rows of different content that share an id get the hash of their content beside it; repeats of the same content are
    numbered, which of them is which being all the same.
    """
    contents: dict[str, set[str]] = {}
    for id, digest in zip(ids, digests, strict=True):
        contents.setdefault(id, set()).add(digest)
    repeats: Counter[str] = Counter()
    taken: set[str] = set()
    renamed: dict[int, str] = {}
    for at, (own, digest) in enumerate(zip(ids, digests, strict=True)):
        base = own if len(contents[own]) == 1 else f"{own}/{digest}"
        repeats[base] += 1
        id = base if repeats[base] == 1 else f"{base}#{repeats[base]}"
        while id in taken or (id != base and id in contents):
            repeats[base] += 1
            id = f"{base}#{repeats[base]}"
        taken.add(id)
        if id != own:
            renamed[at] = id
    return renamed


@dataclass
class View(Lazy[Example]):
    """Some rows of a spool, read when they are asked for."""

    rows: Rows
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


def _view(rows: Rows) -> View:
    renamed = unique_ids(list(rows.column("id")), list(rows.column("digest")))
    return View(rows, np.arange(len(rows)), renamed)


def _splits(recipe: Recipe, folder: Path, bad: BadRows) -> dict[str, View]:
    whole = _view(_spool(recipe.source, recipe, folder / "rows.arrow", bad))
    if recipe.validation_source is not None:
        held = _view(_spool(recipe.validation_source, recipe, folder / "validation_rows.arrow", bad))
        return {"train": whole, "validation": held}
    out = np.array(
        [uniform(recipe.seed, "split", digest) < recipe.validation_fraction for digest in whole.rows.column("digest")]
    )
    parts = {"train": np.flatnonzero(~out), "validation": np.flatnonzero(out)}
    splits = {name: replace(whole, places=places) for name, places in parts.items()}
    if not len(splits["train"]):
        raise UserError(f"{recipe.source}: no row is left to train on; lower --data.validation_fraction")
    return splits


def _texts(examples: Iterable[Example]) -> Iterator[str]:
    for example in examples:
        yield from [example.text] if example.text else [m["content"] for m in example.messages or ()]


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
                f"{recipe.source}: rows of tokens need the tokenizer they were made with (--data.tokenizer)"
            )
        tokenizer = build_tokenizer(_texts(train), recipe.tokenizer_size)
        if chat_template is not None:
            from deft_lightning.data.template import set_template

            set_template(tokenizer, chat_template)
        tokenizer.save_pretrained(folder / "tokenizer")
    clean = replace(recipe.noise, ops=[])
    plan = {
        "train": ("train", recipe.noise if "train" in recipe.noise.splits else clean),
        "validation": ("validation", clean),
    }
    if "validation" in recipe.noise.splits and recipe.noise.ops:
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
    meta = {"reports": reports, "skipped": bad.count, "bad_rows": bad.first}
    (folder / DONE).write_text(json.dumps(meta, indent=2), encoding="utf-8")


Job = list[tuple[Example, int]]


@dataclass(frozen=True)
class Encoder:
    """What a worker does to some examples.

    Args:
        tokenizer: Tokenizer with its chat template.
        supervise: Which turns are learnt.
        skip: Whether rows that the template refuses are left out.
        max_length: Longest example in tokens.
        keep: Which end of a longer one is kept.
    """

    tokenizer: Any
    supervise: Supervise
    skip: bool
    max_length: int
    keep: str

    def __call__(self, job: Job) -> tuple[list[Prepared], list[str], int, int]:
        """Return what is left of the examples, the refused rows, and how many were supervised and truncated."""
        refused: list[str] = []
        whole = tokenise(
            self.tokenizer, [e for e, _ in job], [c for _, c in job], refused if self.skip else None, self.supervise
        )
        short = [example.truncate(self.max_length, self.keep) for example in whole]
        supervised = sum(int((example.labels != IGNORE).any()) for example in whole)
        truncated = sum(len(example.input_ids) > self.max_length for example in whole)
        return short, refused, supervised, truncated


_encoder: Encoder | None = None


def _start(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    torch.set_num_threads(1)


def _work(job: Job) -> tuple[list[Prepared], list[str], int, int]:
    assert _encoder is not None
    return _encoder(job)


def _run(jobs: Iterator[Job], encoder: Encoder, workers: int) -> Iterator[tuple[list[Prepared], list[str], int, int]]:
    """Encode jobs in order; at most two a worker are under way, so that memory holds no more."""
    if workers <= 1:
        yield from map(encoder, jobs)
        return
    # A fork starts at once; after CUDA it is not allowed. Threads of the tokenizer do not survive it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    method = "spawn" if sys.platform != "linux" or torch.cuda.is_initialized() else "fork"
    with ProcessPoolExecutor(workers, multiprocessing.get_context(method), _start, (encoder,)) as pool:
        waiting: deque[Future[Any]] = deque(pool.submit(_work, job) for job in itertools.islice(jobs, 2 * workers))
        while waiting:
            result = waiting.popleft().result()
            for job in itertools.islice(jobs, 1):
                waiting.append(pool.submit(_work, job))
            yield result


def _prepare(
    examples: View, noise: Noise, recipe: Recipe, tokenizer: Any, path: Path, report: Report, bad: BadRows, workers: int
) -> Ints:
    changed: dict[int, tuple[Example, int]] = {}
    if any(isinstance(op, ResponseNoise) for op in noise.ops):
        corrupted, codes = corrupt_responses(examples, noise)
        changed = {i: (corrupted[i], code) for i, code in enumerate(codes) if code}
    jobs = (
        [changed.get(at) or (examples[at], 0) for at in range(start, min(start + CHUNK, len(examples)))]
        for start in range(0, len(examples), CHUNK)
    )
    encoder = Encoder(tokenizer, recipe.supervise, recipe.on_bad_row == "skip", recipe.max_length, recipe.keep)
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    supervised_before, refused_before = 0, bad.count
    with Writer(path, TOKENS) as out, progress(None, f"preparing {report.name}", len(examples)) as bar:
        for prepared, refused, supervised, truncated in _run(jobs, encoder, min(workers, -(-len(examples) // CHUNK))):
            for problem in refused:
                bad.add(problem)
            supervised_before += supervised
            report.truncated += truncated
            kept = [example for example in prepared if report.add(example)]
            if kept:
                labels = np.concatenate([example.labels for example in kept])
                counts += np.bincount(labels[labels != IGNORE], minlength=len(counts))
            for example in kept:
                out.add(
                    (example.id, *(x.astype(np.int32) for x in (example.input_ids, example.labels)), example.noise_code)
                )
            bar.update(len(prepared) + len(refused))
    if examples and not out.count:
        report.explain(len(examples) - (bad.count - refused_before), supervised_before, recipe.max_length, bad.first)
    return counts
