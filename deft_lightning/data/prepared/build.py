"""From sources to prepared tokens on disk: read, split, corrupt, tokenise, truncate, in memory that does not grow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from deft_lightning.data.encoding.template import set_template
from deft_lightning.data.encoding.tokenizer import build_tokenizer
from deft_lightning.data.examples import Example, Ints
from deft_lightning.data.noise import Noise
from deft_lightning.data.noise.apply import corrupted
from deft_lightning.data.prepared.audited import apply_audits
from deft_lightning.data.prepared.cache import DONE
from deft_lightning.data.prepared.encoder import CHUNK, Encoder, encode_all
from deft_lightning.data.prepared.findings import Findings
from deft_lightning.data.prepared.recipe import Recipe, title
from deft_lightning.data.prepared.report import Report
from deft_lightning.data.prepared.split import split_rows
from deft_lightning.data.prepared.spool import ROWS, TOKENS, Writer, row_of
from deft_lightning.data.sources.names import told_apart
from deft_lightning.data.sources.rows import BadRows
from deft_lightning.errors import UserError
from deft_lightning.progress import progress

BAD_ROWS = "bad_rows.tsv"
COUNTS, ALL_COUNTS = "counts.npy", "all_counts.npy"  # of labels that are trained on, and with those that are left out
NOT_AUDITED: dict[str, list[str]] = {"lines": [], "warnings": []}


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
    found = Findings()
    bad = found.bad
    splits = split_rows(recipe, folder, found)
    audited = apply_audits(recipe, splits)
    if tokenizer is None:
        train = splits["train"]
        if all(train[at].tokens for at in range(len(train))):
            raise UserError(
                f"{title(recipe.source)}: rows of tokens need the tokenizer they were made with (--data.tokenizer)"
            )
        tokenizer = build_tokenizer(_texts(train), recipe.tokenizer_size)
        if chat_template is not None:
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
        factors = audited.factors if audited is not None and name == "train" else None
        encoder = Encoder(
            splits[split], tokenizer, recipe.teaching, recipe.on_bad_row == "skip", recipe.max_length, recipe.keep,
            factors,
        )  # fmt: skip
        counts, left_out = _prepare(encoder, noise, folder / f"{name}.arrow", report, bad, num_proc)
        if name == "train":
            np.save(folder / COUNTS, counts)
            np.save(folder / ALL_COUNTS, counts + left_out)
        reports[name] = asdict(report)
    with Writer(folder / "held_out.arrow", ROWS) as out:
        for example in splits["validation"]:
            out.add(row_of(example))
    for spool in ("rows.arrow", "validation_rows.arrow"):
        (folder / spool).unlink(missing_ok=True)
    if len(bad):
        bad.write(folder / BAD_ROWS)
    apart = {
        split: told_apart(source, found.remarks)
        for split, source in (("train", recipe.source), ("validation", recipe.validation_source))
        if source is not None
    }
    meta = {
        "reports": reports, "skipped": len(bad), "bad_rows": bad.first, "remarks": found.remarks.lines(),
        "columns": found.columns.state(), "sources": apart, "audited": audited.state() if audited else NOT_AUDITED,
    }  # fmt: skip
    (folder / DONE).write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _prepare(
    encoder: Encoder, noise: Noise, path: Path, report: Report, bad: BadRows, workers: int
) -> tuple[Ints, Ints]:  # fmt: skip
    """Write the examples of a split; return how often each token is a label there, and in what an audit leaves out."""
    # What an audit leaves out is corrupted like the others: noise is that of the whole split, whoever stays.
    examples = encoder.examples
    changed, report.applied = corrupted(examples, noise)
    counts, left_out = np.zeros((2, len(encoder.tokenizer)), dtype=np.int64)
    supervised_before, refused = 0, 0
    with Writer(path, TOKENS) as out, progress(None, f"preparing {report.name}", len(examples)) as bar:
        for chunk in encode_all(encoder, changed, workers):
            for problem in chunk.refused:
                bad(problem)
            refused += len(chunk.refused)
            supervised_before += chunk.supervised
            report.merge(chunk.counted)
            counts[chunk.labels[0]] += chunk.labels[1]
            left_out[chunk.left_out[0]] += chunk.left_out[1]
            if chunk.batch is not None:
                out.write(pa.ipc.read_record_batch(chunk.batch, TOKENS))
            bar.update(CHUNK)
    if len(examples) and not report.examples:
        report.explain(len(examples) - refused, supervised_before, encoder.max_length, bad.first)
    return counts, left_out


def _texts(examples: Iterable[Example]) -> Iterator[str]:
    for example in examples:
        yield from [example.text] if example.text else [m["content"] for m in example.messages or ()]
        calls = [message["tool_calls"] for message in example.messages or () if message.get("tool_calls")]
        if example.tools or calls:
            yield json.dumps([example.tools, calls], ensure_ascii=False)
