"""From what a pass has kept to one HTML file that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from numpy.typing import NDArray

from deft_lightning.annotations import JsonObject
from deft_lightning.atomic import whole_file
from deft_lightning.objectives import Contaminated, NoiseRates
from deft_lightning.probe.audit import SUSPICIOUS, Suspect, finite
from deft_lightning.probe.page.codes import LEVELS, NATS, SHUT_CODE, Bytes, planes, shares, whole
from deft_lightning.probe.page.posterior import contaminated_gate
from deft_lightning.probe.page.spool import GATE, Column, TokenSpool
from deft_lightning.probe.page.texts import TextOfTokens
from deft_lightning.terminal import visible

ROWS = 2000  # of a page at most
LARGEST = 10_000_000  # bytes of a page
SPLIT = "train"


class Look(NamedTuple):
    """What one model says of the rows.

    Attributes:
        report: Of the probe.
        suspects: Every example, the most suspicious first.
        spool: The numbers of its tokens.
    """

    report: JsonObject
    suspects: Sequence[Suspect]
    spool: TokenSpool


def write_page(path: Path, data: Any, looks: Sequence[Look], operations: Sequence[str]) -> None:
    """Write the page; it appears under its name once it is complete.

    It has at most 2,000 rows and 10 MB: of more rows the most suspicious ones, and as many spread over the others.

    Args:
        path: The file.
        data: InstructionDataModule, set up.
        looks: One model, or two to compare, on the same examples.
        operations: Names of the noise operations, in the order of their codes.
    """
    most = ROWS
    while True:
        ranks = chosen_ranks(len(looks[0].suspects), most)
        html = _page(data, looks, operations, ranks)
        size = len(html.encode())
        if size <= LARGEST or len(ranks) <= 1:
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


def _page(data: Any, looks: Sequence[Look], operations: Sequence[str], ranks: Sequence[int]) -> str:
    shown = [looks[0].suspects[rank] for rank in ranks]
    texts = TextOfTokens(data.tokenizer)
    sources = list(data.splits.sources.get(SPLIT, ()))
    rows, lengths = [], list[int]()
    positions = [suspect.at for suspect in shown]
    for rank, suspect, tokens in zip(ranks, shown, looks[0].spool.tokens(positions), strict=True):
        example = data.example(SPLIT, suspect.at)
        row = texts.row(example)
        if len(row.lengths) != tokens:
            raise RuntimeError(f"row {suspect.id!r} has {len(row.lengths)} learnt tokens as text, {tokens} as numbers")
        lengths += row.lengths
        rows.append([
            visible(suspect.id), suspect.at, rank + 1, suspect.score, suspect.nll, example.source if sources else -1,
            sorted(suspect.operations), suspect.wrong, row.runs, row.text,
        ])  # fmt: skip
    words = _Words()
    models, blob = [], _Blob()
    shared = {"lengths": blob.add("units", planes(np.asarray(lengths, np.int64), 2))}
    for look in looks:
        models.append(_model(look, positions, words, blob, shared))
    meta = {
        "rows": rows, "total": len(looks[0].suspects), "models": models, "shared": shared,
        "sources": [visible(name) for name in sources], "operations": [visible(name) for name in operations],
        "words": [visible(texts.piece(token)) for token in words.tokens], "levels": [float(f"{v:.6g}") for v in LEVELS],
        "shut": SHUT_CODE, "nats": NATS, "suspicious": SUSPICIOUS, "data": visible(str(looks[0].report["data"])),
        "version": looks[0].report["version"],
    }  # fmt: skip
    packed = json.dumps(finite(meta), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return _document(f"Gates of {meta['data']}", {"meta": packed, "numbers": blob.content()})


def _model(look: Look, positions: Sequence[int], words: _Words, blob: _Blob, shared: dict[str, Any]) -> JsonObject:
    """Return what the page knows of a model: its name, and where its numbers lie; those of the data go to `shared`."""
    report, columns = look.report, look.spool.read(positions)
    gates = [column for column in columns if column.name.startswith(GATE)]
    chosen = next((row["name"] for row in report["objectives"] if row["chosen"]), None)
    about, noise_model = {}, _estimated(look, positions, columns)
    if noise_model is not None:
        column = Column(f"{GATE}Contaminated", "share")
        columns[column], about[column] = noise_model
        gates.append(column)
    order = sorted(gates, key=lambda column: (column.name != GATE + str(chosen), column.name))
    named = {column.name: column for column in columns}
    if "arg_max" in named:
        codes = columns[named["arg_max"]]
        columns[Column("said", "nats")] = words.codes(whole(codes), columns[named["flags"]][0] & 1 == 0)
    of_data = {"noise", "weight", "chance"}
    for column, codes in columns.items():
        if column.name in of_data:
            shared.setdefault(column.name, blob.add(column.kind, codes))
    own = {
        column.name: blob.add("units" if column.name == "said" else column.kind, codes)
        for column, codes in columns.items()
        if column.name not in of_data | {"arg_max"} and column not in gates
    }
    objectives = [
        {"name": visible(c.name.removeprefix(GATE)), "about": about.get(c, ""), **blob.add(c.kind, columns[c])}
        for c in order
    ]
    started = visible(str(report["model"]))
    return {
        "name": f"checkpoint {visible(str(report['checkpoint']))}" if report["checkpoint"] else started,
        "started": started, "objectives": objectives, "chosen": None if chosen is None else visible(chosen),
        "columns": own,
    }  # fmt: skip


def _estimated(look: Look, positions: Sequence[int], columns: Mapping[Column, Bytes]) -> tuple[Bytes, str] | None:
    """Return the gate of Contaminated and its rates; None where it is there already, or nothing is known of chance."""
    estimate, by_name = look.report.get("noise_estimate"), {column.name: codes for column, codes in columns.items()}
    if estimate is None or "chance" not in by_name or any(name.startswith(f"{GATE}Contaminated") for name in by_name):
        return None
    if estimate["reliable"]:
        rates, about = NoiseRates(estimate["answers"], estimate["tokens"]), "noise rates estimated by the probe"
    else:
        rates, about = Contaminated().rates, "the noise rates it starts with, since none could be estimated"
    log_prob, chance, unprompted = (
        torch.from_numpy(whole(by_name[name]) / -NATS) for name in ("log_prob", "chance", "unprompted")
    )
    example = torch.arange(len(positions)).repeat_interleave(torch.tensor(look.spool.tokens(positions)))
    gate = contaminated_gate(log_prob, chance, unprompted, example, rates)
    return shares(gate.numpy()), f"{about}: {rates.answers:.2g} of answers, {rates.tokens:.2g} of tokens"


class _Words:
    """Numbers the tokens that models would say, from 1; 0 stands for the label itself, and for those beyond 65,535."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._number: dict[int, int] = {}

    def codes(self, arg_max: NDArray[np.int64], other: NDArray[np.bool_]) -> Bytes:
        """Return the numbers of first choices where they are another token than the label."""
        numbers = np.zeros(len(arg_max), np.int64)
        distinct, inverse = np.unique(arg_max[other], return_inverse=True)
        for token in distinct.tolist():
            if token not in self._number and len(self.tokens) < 65_535:
                self.tokens.append(token)
                self._number[token] = len(self.tokens)
        table = np.array([self._number.get(token, 0) for token in distinct.tolist()], np.int64)
        if len(distinct):
            numbers[other] = table[inverse]
        return planes(numbers, 2)


class _Blob:
    """Numbers of tokens one after another; columns that are the same are there once."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._places: dict[bytes, int] = {}
        self._size = 0

    def add(self, kind: str, codes: Bytes) -> JsonObject:
        """Return where the codes of a column lie, and what they mean."""
        content = codes.tobytes()
        if content not in self._places:
            self._places[content] = self._size
            self._parts.append(content)
            self._size += len(content)
        return {"at": self._places[content], "kind": kind, "width": len(codes)}

    def content(self) -> bytes:
        """Return all of them."""
        return b"".join(self._parts)


def _document(title: str, parts: Mapping[str, bytes]) -> str:
    """Return the HTML. What is the user's is in it deflated and in base64, so that no text of a row can be markup.

    The policy lets nothing run but this script, and lets nothing be loaded.
    """
    folder = files("deft_lightning.probe.page")
    style, script, body = (
        (folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "page.html")
    )  # fmt: skip
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    packed = "\n".join(
        f'<script type="application/octet-stream" id="{name}">{_base64(zlib.compress(part, 9))}</script>'
        for name, part in parts.items()
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n{packed}\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _hash(content: str) -> str:
    return f"'sha256-{_base64(hashlib.sha256(content.encode()).digest())}'"
