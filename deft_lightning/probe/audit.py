"""Audit: which examples contradict what the model is sure of, and where."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deft_lightning.annotations import JsonObject, Tokenizer
from deft_lightning.atomic import whole_file
from deft_lightning.data.examples import Prepared
from deft_lightning.functional import IGNORE_INDEX, TokenStats

SUSPICIOUS = 2.302585  # ln 10: C is ten times p
SPANS = 20  # of an example, the worst ones
BEFORE = 8  # tokens of context that decide how a span is written
SHOWN = 300  # letters of an example


def conflict(stats: TokenStats) -> Tensor:
    r"""Confident conflict of each token, ``max(0, log(C / p)) = max(0, -log p - H_2)`` in nats.

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
    """Root mean square of an example's token scores, in nats; 0 without any.

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
        score: Of the example, in nats.
        nll: Mean negative log-likelihood of its supervised tokens; None without any.
        tokens: How many are supervised.
        places: Positions of its suspicious tokens.
        scores: Their scores.
        operations: Codes of the noise operations that corrupted it.
        wrong: What a column of the data says of it, if one was named.
    """

    at: int
    id: str
    score: float
    nll: float | None
    tokens: int
    places: NDArray[np.int64]
    scores: NDArray[np.float64]
    operations: frozenset[int] = field(default_factory=frozenset)
    wrong: bool | None = None


def suspects(
    stats: TokenStats, keep: Tensor, positions: Sequence[int], ids: Sequence[str], codes: Tensor
) -> list[Suspect]:
    """Score every example of a batch with one example a row.

    Args:
        stats: Statistics of the N supervised tokens, row by row.
        keep: Shape ``(B, T - 1)``: whether the token after each position is supervised.
        positions: Position of each row's example in its split.
        ids: Their ids.
        codes: Shape ``(N,)``: noise code of each token.
    """
    result, counts = [], keep.sum(1).tolist()
    rows = zip(
        positions, ids, keep, conflict(stats).split(counts), stats.log_prob.split(counts), codes.split(counts),
        strict=True,
    )  # fmt: skip
    for at, id, kept, values, log_prob, code in rows:
        bad = values >= SUSPICIOUS
        result.append(
            Suspect(
                at, id, example_score(values), -float(log_prob.mean()) if len(values) else None, len(values),
                (kept.nonzero().squeeze(1)[bad] + 1).numpy(), values[bad].double().numpy(),
                frozenset(code[code > 0].tolist()),
            )
        )  # fmt: skip
    return result


def ranked(suspects: Iterable[Suspect]) -> list[Suspect]:
    """Sort by score, the most suspicious first; equals by position."""
    return sorted(suspects, key=lambda suspect: (-suspect.score, suspect.at))


def describe(
    suspect: Suspect, rank: int, example: Prepared, tokenizer: Tokenizer, operations: Sequence[str], noise_known: bool
) -> JsonObject:
    """Return one record of the audit.

    Args:
        suspect: What was found.
        rank: Its place, from 1.
        example: The example.
        tokenizer: Turns tokens into text.
        operations: Names of the noise operations, in the order of their codes.
        noise_known: Whether noise was injected, so that an example without any is known to be clean.

    Returns:
        ``rank``, ``id``, ``score``, ``nll``, ``tokens``; ``spans``: runs of suspicious tokens in the order of the text,
        each with ``start`` and ``end`` (exclusive, tokens of the example), the ``text`` that is learnt there and its
        largest ``score``; ``is_noisy`` and ``noise`` with injected noise, else None; ``is_wrong`` with a truth column;
        ``text``: the supervised part, cut off after some letters.
    """
    labels = example.labels.tolist()
    runs: list[list[int]] = []
    scores = dict(zip(suspect.places.tolist(), suspect.scores.tolist(), strict=True))
    for place in scores:
        if runs and runs[-1][-1] == place - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    worst = sorted(runs, key=lambda run: -max(scores[place] for place in run))[:SPANS]
    spans = [
        {
            "start": run[0], "end": run[-1] + 1, "text": _written(tokenizer, example, run[0], run[-1] + 1),
            "score": max(scores[place] for place in run),
        }
        for run in sorted(worst)
    ]  # fmt: skip
    text = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    record: JsonObject = {
        "rank": rank, "id": suspect.id, "score": suspect.score, "nll": suspect.nll, "tokens": suspect.tokens,
        "is_noisy": bool(suspect.operations) if noise_known else None,
        "noise": [operations[code - 1] for code in sorted(suspect.operations)] if noise_known else None,
        "spans": spans, "text": text if len(text) <= SHOWN else f"{text[:SHOWN]} …",
    }  # fmt: skip
    if suspect.wrong is not None:
        record["is_wrong"] = suspect.wrong
    return record


def _written(tokenizer: Tokenizer, example: Prepared, start: int, end: int) -> str:
    """Text of the labels of a run: what they add to the tokens before, since a token alone may lose its space."""
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
