"""Scores of rows: how odd their tokens and their answer are for the file, and whether the answer belongs elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deft_lightning.probe.join import joined

Numbers = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

PARTS = ("odd", "answer", "elsewhere")  # of the audit's score
SUSPICIOUS = 2.302585  # ln 10: a token is ten times less probable than what is usual
PRIOR = 3.0  # tokens that a mean over few begins with
SHARED = 0.05  # share of the rows that have a text which is then the file's habit
# Quantiles of the file's tokens between which their tail is measured. The second is where wrong tokens may begin: one
# in twenty of all, one in ten of numbers, of which short answers have few.
TAIL = (0.8, 0.95)
TAIL_OF_NUMBERS = (0.7, 0.9)
LEAST = 0.25  # nats: scale of a tail at least, where a model knows a file by heart
LOUDEST = 3.0  # nats that one token says for or against the prompt at most
RIGHT = 0.1  # share of the answers that a prompt must help, as for the noise rate


class Tokens(NamedTuple):
    """The supervised tokens of all rows, row by row; every array has shape ``(N,)`` unless it says otherwise.

    Attributes:
        counts: Tokens of each row, shape ``(n,)``.
        target: Their labels.
        correct: Whether each is the model's first choice.
        log_prob: ``log p`` in nats.
        collision: Collision probability ``C``.
        bare: ``log q`` in nats, what the model says without the prompt; not a number where there is no prompt.
        number: Whether each is written in digits.
        last: Whether each is part of the last number of its row.
    """

    counts: Ints
    target: Ints
    correct: Flags
    log_prob: Numbers
    collision: Numbers
    bare: Numbers
    number: Flags
    last: Flags

    @property
    def row(self) -> Ints:
        """Return the row of each token."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def conflict(self) -> Numbers:
        """Return the confident conflict in nats, as :func:`deft_lightning.probe.conflict`."""
        return np.maximum(np.log(self.collision) - self.log_prob, 0.0)

    @property
    def before(self) -> Ints:
        """Return the label before each in its row, -1 at the first."""
        before = np.concatenate([[-1], self.target[:-1]])[: len(self.target)]
        before[np.cumsum([0, *self.counts[:-1]])[self.counts > 0]] = -1
        return before

    def summed(self, values: Numbers) -> Numbers:
        """Return the sums over the tokens of each row, shape ``(n,)``; 0 without any."""
        return np.bincount(self.row, values, minlength=len(self.counts)).astype(np.float64)


class Scored(NamedTuple):
    """Scores of rows.

    Attributes:
        tokens: What was scored.
        scores: By name, shape ``(n,)`` each; larger is more suspicious. The first ranks the audit.
        excess: How far ``-log p`` of each token is above what is usual for its text in this file, in nats, shape
            ``(N,)``.
        parts: Of the audit's score, with the rates of the kinds, shape ``(3, n)``, in nats.
    """

    tokens: Tokens
    scores: dict[str, Numbers]
    excess: Numbers
    parts: Numbers

    @property
    def largest(self) -> list[str]:
        """Return the part of each row's score that is the largest, one of :data:`PARTS`; the first of equals."""
        return [PARTS[i] for i in np.argmax(self.parts, axis=0)]


def score_rows(tokens: Tokens) -> Scored:
    """Score every row, and every token.

    ``audit``: :func:`~deft_lightning.probe.join.joined` of three kinds of evidence in nats. ``odd``: :func:`rarest` of
    the tokens' ``-log p`` above :func:`usual`. ``answer``: the same of the conflict of the last number of the row,
    among the numbers of the file. ``elsewhere``: :func:`elsewhere`. ``conflict``: root mean square of the conflict.
    ``nll``: mean NLL. ``length``: tokens. The last three are what a score has to beat.

    Chosen by measurement among the candidates that ``docs/guides/probe.md`` lists.
    """
    conflict, counts = tokens.conflict, np.maximum(tokens.counts, 1)
    excess = -tokens.log_prob - usual(tokens, -tokens.log_prob)
    every = np.ones(len(conflict), bool)
    among_numbers = np.zeros(len(conflict))
    among_numbers[tokens.number] = rarity(conflict[tokens.number], *TAIL_OF_NUMBERS)
    odd = rarest(tokens, rarity(excess, *TAIL), every)
    answer = rarest(tokens, among_numbers, tokens.last & tokens.number)
    belongs = elsewhere(tokens)
    whole = joined(odd, answer, belongs)
    scores = {
        "audit": whole.odds, "odd": odd, "answer": answer, "elsewhere": belongs,
        "conflict": np.sqrt(tokens.summed(conflict**2) / counts),
        "nll": tokens.summed(-tokens.log_prob) / counts, "length": tokens.counts.astype(np.float64),
    }  # fmt: skip
    return Scored(tokens, scores, excess, whole.parts)


def usual(tokens: Tokens, values: Numbers) -> Numbers:
    """Return what the rows of a file have in common: the value that its habits give each token, shape ``(N,)``.

    A format that a model does not write is surprising in every row; this takes it out. It is the mean value of the same
    text behind the same token elsewhere in the file. Of few such tokens the mean is drawn towards that of the same text
    anywhere, and this towards the whole file's. No token is part of its own mean. Text that fewer than
    :data:`SHARED` of the rows have is no habit and has the file's mean: short answers that share nothing are compared
    as they are.

    Args:
        tokens: Of all rows.
        values: Of each, such as ``-log p``.
    """
    mean = np.full(len(values), values.mean() if len(values) else 0.0)
    of_text = _others(tokens.target, values, mean)
    pairs = (tokens.before + 1) * (int(tokens.target.max(initial=0)) + 1) + tokens.target
    return np.where(shares(tokens) >= SHARED, _others(pairs, values, of_text), mean)


def shares(tokens: Tokens) -> Numbers:
    """Return the share of the rows that have the text of each token, shape ``(N,)``."""
    texts, place = np.unique(tokens.target, return_inverse=True)
    rows = np.bincount(np.unique(place * len(tokens.counts) + tokens.row) // max(len(tokens.counts), 1))
    share: Numbers = rows[place] / max(int((tokens.counts > 0).sum()), 1) if len(texts) else np.zeros(0)
    return share


def _others(kind: Ints, values: Numbers, prior: Numbers) -> Numbers:
    """Return the mean of the other values of each one's kind, with some of a prior mean."""
    _, place = np.unique(kind, return_inverse=True)
    total, count = np.bincount(place, values), np.bincount(place)
    result: Numbers = (total[place] - values + PRIOR * prior) / (count[place] - 1 + PRIOR)
    return result


def rarity(values: Numbers, body: float, room: float) -> Numbers:
    """Return minus the logarithm of the share of values that are at least as large as each, in nats.

    Where half of the rows are noisy the largest values are not rare, and yet not what the others are like. So the share
    is counted up to one quantile alone; above it the tail is taken for an exponential one, whose scale comes from what
    is below another, where wrong tokens hardly are. A scale that held them would make light of all of them. Values
    beyond the second count as if they ended there: the scale is a quarter to a third too small, so that one rare token
    outweighs what is a little odd about others. An unbiased scale ranked worse.

    Args:
        values: Shape ``(N,)``.
        body: The first quantile.
        room: The second.
    """
    if not len(values):
        return values
    counted = -np.log(1 - np.searchsorted(np.sort(values), values, side="left") / len(values))
    low, high = np.quantile(values, (body, room))
    scale = max(float((np.clip(values, low, high) - low).sum() / max(int((values > low).sum()), 1)), LEAST)
    return np.where(values > low, (values - low) / scale - np.log(1 - body), counted)


def rarest(tokens: Tokens, nats: Numbers, among: Flags) -> Numbers:
    r"""Return how odd each row's worst tokens are, ``max_k log k - log(n S(x_k))`` in nats, shape ``(n,)``.

    ``x_k`` is the k-th largest value of a row of ``n`` tokens and ``S`` the share of tokens that are as large: ``n
    S(x_k)`` such tokens are to be expected in the row, and k are there (Simes, Biometrika 73, 1986). One wrong token
    counts in a long row, many that are a little odd count too, and length is no part of it.

    Args:
        tokens: Of all rows.
        nats: ``-log S`` of each.
        among: Which of them are looked at. A row without any has 0.
    """
    row, nats = tokens.row[among], nats[among]
    counts = np.bincount(row, minlength=len(tokens.counts))
    order = np.lexsort((-nats, row))
    starts = np.cumsum([0, *counts[:-1]])
    place = np.arange(len(order)) - starts[row] + 1
    odd = nats[order] + np.log(place) - np.log(counts[row])
    result = np.zeros(len(counts))
    there = counts > 0
    if there.any():
        result[there] = np.maximum.reduceat(odd, starts[there])
    return result


def elsewhere(tokens: Tokens) -> Numbers:
    """Return the evidence that each answer belongs to another prompt, in nats, shape ``(n,)``; 0 without a prompt.

    ``sum log q / p``, each token within :data:`LOUDEST`: what the model says of the answer behind other answers alone,
    against what it says behind the prompt. A right answer becomes more probable by its prompt; that of another prompt
    does not. The bound keeps one wrong number, which the prompt makes improbable, from being an answer to another
    prompt. Where the prompt helps fewer than a tenth of the answers, it is 0 for all: such a model reads no prompts.
    """
    total = tokens.summed(np.clip(tokens.bare - tokens.log_prob, -LOUDEST, LOUDEST))
    asked = np.isfinite(total) & (tokens.counts > 0)
    helped = asked.any() and float(np.quantile(total[asked], RIGHT)) < 0
    return np.where(asked, total, 0.0) if helped else np.zeros(len(total))


def last_numbers(counts: Ints, texts: list[str]) -> tuple[Flags, Flags]:
    """Return which tokens are written in digits, and which of all are part of the last number of their row.

    Args:
        counts: Tokens of each row.
        texts: Of the N tokens.
    """
    number = np.array([text.strip().isdecimal() for text in texts], bool)
    inside = number | np.array([text in (".", ",") for text in texts], bool)
    last = np.zeros(len(texts), bool)
    for end, count in zip(np.cumsum(counts).tolist(), counts.tolist(), strict=True):
        digits = np.flatnonzero(number[end - count : end])
        if not len(digits):
            continue
        place = end - count + int(digits[-1])
        while place >= end - count and inside[place]:
            last[place] = True
            place -= 1
    return number, last
