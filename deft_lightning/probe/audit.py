"""Audit: which examples contradict what the model is sure of, and where."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deft_lightning.annotations import JsonObject, Tokenizer
from deft_lightning.atomic import whole_file
from deft_lightning.data.examples import Prepared
from deft_lightning.data.prepared.origins import Origin
from deft_lightning.functional import IGNORE_INDEX, TokenStats
from deft_lightning.probe.reading import Read
from deft_lightning.probe.scores import SUSPICIOUS, Scored, Tokens, last_numbers, score_rows

SPANS = 20  # of an example, the worst ones
BEFORE = 8  # tokens of context that decide how a span is written


def conflict(stats: TokenStats) -> Tensor:
    r"""Return the confident conflict of each token, ``max(0, log(C / p)) = max(0, -log p - H_2)`` in nats.

    ``C = sum_v pi_v^2`` is the probability that the model gives, on average, to what it would say itself: the score is
    how many nats the target is below that. 0 where the target is as probable as the model's own words, and where the
    prediction is flat (``C`` and ``p`` are both about 1/V): that the model does not know is not held against a label.

    Measured against ``-log p``, ``C (1 - p)``, ``C^a (-log p)``, ``-log p - H`` and ``1 - p^C`` in
    ``tests/benchmarks/bench_audit.py``.

    Args:
        stats: Statistics of N tokens.

    Returns:
        Shape ``(N,)``, in ``[0, inf)``.
    """
    return (stats.collision.log() - stats.log_prob).clamp_min(0)


def example_score(values: Tensor) -> float:
    """Return the root mean square of an example's token scores, in nats; 0 without any.

    Between the mean, which hides one wrong token among many, and the largest, which overlooks a response that is
    slightly wrong everywhere. It does not grow with the length of the example.

    Args:
        values: Token scores, shape ``(n,)``.
    """
    return float(values.square().mean().sqrt()) if len(values) else 0.0


@dataclass(frozen=True, eq=False)
class Suspect:
    """One example and how suspicious it is.

    Attributes:
        at: Position in its split.
        id: Example id.
        scores: By name, the one that ranks first.
        nll: Mean negative log-likelihood of its supervised tokens; None without any.
        tokens: How many are supervised.
        places: Positions of its suspicious tokens in the example.
        learnt: The same among its supervised tokens.
        excess: How far ``-log p`` of each is above that of the file's tokens of its kind, in nats.
        part: The largest part of the score.
        number: Position of its last number in the example, and of the token after it; None without one.
        operations: Codes of the noise operations that corrupted it.
        marked: What a column of the data says of it; None where nothing does.
        noisy: Whether it is known to be noisy, by injected noise or that column; None where nothing is known.
        right: Probability that its answer is right, by the noise model; None where that claims no estimate.
    """

    at: int
    id: str
    scores: Mapping[str, float]
    nll: float | None
    tokens: int
    places: NDArray[np.int64]
    learnt: NDArray[np.int64]
    excess: NDArray[np.float64]
    part: str
    number: tuple[int, int] | None
    operations: frozenset[int] = field(default_factory=frozenset)
    marked: bool | None = None
    noisy: bool | None = None
    right: float | None = None

    @property
    def score(self) -> float:
        """Return what the audit is ranked by."""
        return next(iter(self.scores.values()))


class AuditTally:
    """Keeps what a score needs to know of every token, some twenty bytes each: a score compares with the whole file."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, str, frozenset[int]]] = []
        self._parts: list[tuple[NDArray[Any], ...]] = []

    def update(self, read: Read) -> None:
        """Add a batch."""
        bare: list[NDArray[Any]] = []
        places = (read.keep.nonzero()[:, 1] + 1).split(read.counts)
        for at, count in zip(read.positions, read.counts, strict=True):
            alone = None if read.bare is None else read.bare.of(at)
            bare.append(np.full(count, np.nan, np.float32) if alone is None else alone)
        columns = zip(
            read.positions, read.batch["example_id"], bare, places, read.codes.split(read.counts),
            *(values.split(read.counts) for values in (
                read.labels, read.stats.log_prob.float(), read.stats.collision.float(), read.stats.correct)),
            strict=True,
        )  # fmt: skip
        for at, id, alone, own, codes, *values in columns:
            self._rows.append((at, id, frozenset(codes[codes > 0].tolist())))
            self._parts.append((own.numpy().astype(np.int32), alone, *(part.numpy() for part in values)))

    def suspects(
        self, truth: Mapping[str, bool] | None, noise_known: bool, text: Callable[[int], str]
    ) -> tuple[list[Suspect], Scored]:
        """Return all examples, the most suspicious first, equals by position; and the scores in the order of the split.

        Args:
            truth: What a column says of examples, by id; None without one.
            noise_known: Whether noise was injected, so that an example without any is known to be clean.
            text: Of a token.
        """
        order = sorted(range(len(self._rows)), key=lambda i: self._rows[i][0])
        parts = [self._parts[i] for i in order]
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        places, bare, target, log_prob, collision, correct = columns
        counts = np.array([len(part[0]) for part in parts], np.int64)
        number, last = last_numbers(counts, [text(token) for token in target.tolist()])
        tokens = Tokens(
            counts, target.astype(np.int64), correct.astype(bool), log_prob.astype(np.float64),
            collision.astype(np.float64), bare.astype(np.float64), number, last,
        )  # fmt: skip
        scored = score_rows(tokens)
        ends, parts_of_scores = np.cumsum(counts), scored.largest
        result = []
        for row, i in enumerate(order):
            at, id, operations = self._rows[i]
            own = slice(ends[row] - counts[row], ends[row])
            bad = scored.excess[own] >= SUSPICIOUS
            digits = places[own][last[own] & number[own]]
            known = None if truth is None else truth.get(id)
            noisy = known if not noise_known else bool(operations) or bool(known)
            result.append(
                Suspect(
                    at, id, {name: float(values[row]) for name, values in scored.scores.items()},
                    -float(log_prob[own].mean()) if counts[row] else None, int(counts[row]),
                    places[own][bad].astype(np.int64), np.flatnonzero(bad), scored.excess[own][bad],
                    parts_of_scores[row], (int(digits[0]), int(digits[-1]) + 1) if len(digits) else None, operations,
                    known, noisy,
                )
            )  # fmt: skip
        return sorted(result, key=lambda suspect: (-suspect.score, suspect.at)), scored


def describe(
    suspect: Suspect,
    rank: int,
    example: Prepared,
    tokenizer: Tokenizer,
    operations: Sequence[str],
    noise_known: bool,
    origin: Origin | None,
) -> JsonObject:
    """Return one record of the audit.

    Args:
        suspect: What was found.
        rank: Its place, from 1.
        example: The example.
        tokenizer: Turns tokens into text.
        operations: Names of the noise operations, in the order of their codes.
        noise_known: Whether noise was injected, so that an example without any is known to be clean.
        origin: Where it was read; None where nobody knows.

    Returns:
        ``rank``, ``id``, ``file``, ``row`` (from 1), ``score``, ``scores`` (every score by name), ``nll``, ``tokens``;
        ``right``: probability that the answer is right by the noise model, None where that claims no estimate;
        ``noisy``: true or false where that is known, else None; ``noise``: the operations that hit it, None without
        injected noise; ``part``: the largest part of the score; ``place``: what gives the row away, ``start``, ``end``
        and ``text``: its last number where ``part`` is ``answer``, the span of the largest excess where it is ``odd``,
        None where that is nowhere in particular; ``spans``: runs of suspicious tokens in the order of the text, each
        with ``start`` and ``end`` (exclusive, tokens of the example), the ``text`` that is learnt there and its largest
        ``excess`` in nats;
        ``prompt`` and ``answer``, the supervised part as it is learnt.
    """
    labels = example.labels.tolist()
    runs: list[list[int]] = []
    excess = dict(zip(suspect.places.tolist(), suspect.excess.tolist(), strict=True))
    for place in excess:
        if runs and runs[-1][-1] == place - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    worst = sorted(runs, key=lambda run: -max(excess[place] for place in run))[:SPANS]
    spans = [
        {
            "start": run[0], "end": run[-1] + 1, "text": _written(tokenizer, example, run[0], run[-1] + 1),
            "excess": max(excess[place] for place in run),
        }
        for run in sorted(worst)
    ]  # fmt: skip
    where: JsonObject | None = None
    if suspect.part == "answer" and suspect.number is not None:
        start, end = suspect.number
        where = {"start": start, "end": end, "text": _written(tokenizer, example, start, end)}
    elif suspect.part == "odd" and spans:
        span = max(spans, key=lambda span: float(span["excess"]))
        where = {name: span[name] for name in ("start", "end", "text")}
    return {
        "rank": rank, "id": suspect.id, "file": origin.file if origin else None, "row": origin.row if origin else None,
        "score": suspect.score, "scores": dict(suspect.scores), "nll": suspect.nll, "tokens": suspect.tokens,
        "right": suspect.right, "noisy": suspect.noisy,
        "noise": [operations[code - 1] for code in sorted(suspect.operations)] if noise_known else None,
        "part": suspect.part, "place": where, "spans": spans, "prompt": origin.prompt if origin else None,
        "answer": tokenizer.decode([label for label in labels if label != IGNORE_INDEX]),
    }  # fmt: skip


def _written(tokenizer: Tokenizer, example: Prepared, start: int, end: int) -> str:
    """Return the text that the labels of a run add to the tokens before; a token alone may lose its space."""
    context = example.input_ids[max(0, start - BEFORE) : start].tolist()
    learnt = example.labels[start:end].tolist()
    before, after = tokenizer.decode(context), tokenizer.decode(context + learnt)
    return str(after[len(before) :] if after.startswith(before) else tokenizer.decode(learnt))


def write_lines(path: Path, records: Iterable[JsonObject]) -> None:
    """Write records as lines of JSON; the file appears under its name once it is complete."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def finite(value: Any) -> Any:
    """Return a value with None for the numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
