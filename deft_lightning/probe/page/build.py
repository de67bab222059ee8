"""From what passes have kept to the page: which rows, their text, their numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.atomic import whole_file
from deft_lightning.data.prepared.origins import Origin
from deft_lightning.probe.audit import finite
from deft_lightning.probe.page.codes import LEVELS, NATS, SHUT_CODE, planes
from deft_lightning.probe.page.document import document
from deft_lightning.probe.page.numbers import Look, Numbers
from deft_lightning.probe.page.texts import TextOfTokens
from deft_lightning.terminal import visible

ROWS = 2000  # of a page at most
LARGEST = 10_000_000  # bytes of a page
SPLIT = "train"


def write_page(path: Path, data: Any, looks: Sequence[Look], operations: Sequence[str]) -> None:
    """Write the page; it appears under its name once it is complete.

    It has at most 2,000 rows and 10 MB: of more rows the most suspicious ones, and as many spread over the others.

    Args:
        path: The file.
        data: InstructionDataModule, set up.
        looks: One model, or two to compare, on the same examples.
        operations: Names of the noise operations, in the order of their codes.
    """
    most, texts = ROWS, TextOfTokens(data.tokenizer)
    suspects = looks[0].suspects
    origins = data.origins({suspects[rank].id for rank in chosen_ranks(len(suspects), most)})
    while True:
        ranks = chosen_ranks(len(suspects), most)
        html = _page(data, looks, operations, ranks, texts, origins)
        size = len(html.encode())
        if size <= LARGEST or len(ranks) == 1:
            break
        most = max(1, min(len(ranks) - 1, int(0.95 * len(ranks) * LARGEST / size)))
    with whole_file(path) as partial:
        partial.write_text(html, encoding="utf-8", newline="")
    rank_zero_info(f"probe: {len(ranks)} rows on the page {path.resolve()}, {size / 1e6:.1f} MB")


def chosen_ranks(count: int, most: int) -> list[int]:
    """Return which ranks are shown, from 0: all, or half of them the worst and half spread over the others."""
    if count <= most:
        return list(range(count))
    worst = (most + 1) // 2
    rest = most - worst
    return [*range(worst), *(worst + (count - worst) * i // rest for i in range(rest))]


def _page(
    data: Any,
    looks: Sequence[Look],
    operations: Sequence[str],
    ranks: Sequence[int],
    texts: TextOfTokens,
    origins: Mapping[str, Origin],
) -> str:
    shown = [looks[0].suspects[rank] for rank in ranks]
    numbers = Numbers([suspect.at for suspect in shown])
    sources = list(data.splits.sources.get(SPLIT, ()))
    rows, lengths = [], list[int]()
    counts = looks[0].spool.tokens(numbers.positions)
    for rank, suspect, tokens in zip(ranks, shown, counts, strict=True):
        example = data.example(SPLIT, suspect.at)
        row = texts.row(example)
        if len(row.lengths) != tokens:
            raise RuntimeError(f"row {suspect.id!r} has {len(row.lengths)} learnt tokens as text, {tokens} as numbers")
        lengths += row.lengths
        rows.append([
            visible(suspect.id), suspect.at, rank + 1, suspect.score, suspect.nll, example.source if sources else -1,
            sorted(suspect.operations), suspect.marked, row.runs, row.text,
            _where(origins.get(suspect.id)),
        ])  # fmt: skip
    numbers.shared["lengths"] = numbers.add("letters", planes(np.asarray(lengths, np.int64), 2))
    report, models = looks[0].report, [numbers.model(look) for look in looks]
    meta = {
        "rows": rows, "total": len(looks[0].suspects), "models": models, "shared": numbers.shared,
        "sources": [visible(name) for name in sources], "operations": [visible(name) for name in operations],
        "words": [visible(texts.piece(token)) for token in numbers.words], "version": report["version"],
        "levels": [float(f"{level:.6g}") for level in LEVELS], "shut": SHUT_CODE, "nats": NATS,
        "data": visible(str(report["data"])),
    }  # fmt: skip
    packed = json.dumps(finite(meta), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return document(f"Gates of {meta['data']}", {"meta": packed, "numbers": numbers.content()})


def _where(origin: Origin | None) -> str:
    """Return file and row of an example, without folder and options; empty where nothing is known of it."""
    if origin is None:
        return ""
    return visible(Path(origin.file.partition("?")[0]).name + ("" if origin.row is None else f", row {origin.row}"))
