"""The noise rate of data before training: EM of the two-level noise model to convergence, with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deft_lightning.annotations import JsonObject
from deft_lightning.objectives import NoiseRates
from deft_lightning.objectives.noise_rates import HIGHEST, LOWEST, bounded, logit
from deft_lightning.probe.evidence import GRID, Answers, Numbers

RESAMPLES, SEED = 200, 0
LEVEL = 0.9  # of the interval
STEPS, SETTLED = 1000, 1e-5  # EM ends where no rate moves any more; of a resample ten times that is enough
ALARM = 1 / 3


class Estimate(NamedTuple):
    """Noise rates of the answers that were looked at.

    Attributes:
        rates: By EM; those of tokens are of answers that are not noise as a whole.
        low: Lower end of the interval of the rate of answers.
        high: Upper end.
        right: Posterior that an answer is right, shape ``(n,)``, in ``[0, 1]``.
        tokens_right: Sum of the posteriors of its tokens where it is, shape ``(n,)``.
        evidence: How much better the model explains it than chance, in nats, shape ``(n,)``.
    """

    rates: NoiseRates
    low: float
    high: float
    right: Numbers
    tokens_right: Numbers
    evidence: Numbers


def noise_rate(answers: Answers) -> Estimate:
    """Estimate the noise rates, from the same start and within the same bounds as in training.

    The interval is that of a bootstrap over answers, with EM inside. A bootstrap of answers that all look alike has no
    width; the interval is at least that of n draws without an exception (``1 - 0.05^(1/n)`` at the edge).

    Args:
        answers: At least one.
    """
    rates = _converged(answers, np.ones(len(answers)), NoiseRates(LOWEST, LOWEST))
    generator, count = np.random.default_rng(SEED), len(answers)
    drawn = []
    for _ in range(RESAMPLES):
        times = np.bincount(generator.integers(0, count, count), minlength=count).astype(np.float64)
        drawn.append(_converged(answers, times, rates, 10 * SETTLED).answers)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]).tolist()
    unseen = 1 - tail ** (1 / count)
    evidence, kept = _at(answers, rates.tokens)
    return Estimate(
        rates, min(low, max(1 - unseen, LOWEST)), max(high, min(unseen, HIGHEST)), _right(evidence, rates.answers),
        kept, evidence,
    )  # fmt: skip


def _converged(answers: Answers, times: Numbers, start: NoiseRates, settled: float = SETTLED) -> NoiseRates:
    """Return the rates at which EM stays, each answer counted so many times."""
    rates, total, tokens = start, times.sum(), times * answers.tokens
    for _ in range(STEPS):
        evidence, kept = _at(answers, rates.tokens)
        right = _right(evidence, rates.answers)
        believed = float((right * tokens).sum())
        moved = NoiseRates(
            bounded(1 - float((right * times).sum() / total)),
            bounded(1 - float((right * times * kept).sum()) / believed) if believed > 0 else rates.tokens,
        )
        still = max(abs(a - b) for a, b in zip(moved, rates, strict=True)) < settled
        rates = moved
        if still:
            break
    return rates


def _at(answers: Answers, rate: float) -> tuple[Numbers, Numbers]:
    """Return evidence and sums of token posteriors at a rate of tokens, between two points of the grid."""
    place = (logit(rate) - GRID[0]) / (GRID[1] - GRID[0])
    left = min(max(int(place), 0), len(GRID) - 2)
    share = min(max(place - left, 0.0), 1.0)
    evidence, kept = ((1 - share) * table[left] + share * table[left + 1] for table in (answers.evidence, answers.kept))
    return evidence, kept


def _right(evidence: Numbers, rate: float) -> Numbers:
    odds = np.clip(evidence - logit(rate), -500, 500)
    right: Numbers = 1 / (1 + np.exp(-odds))
    return right


def rate_record(answers: Answers, estimate: Estimate) -> JsonObject:
    """Return the estimate for ``probe.json``."""
    wrong = 1 - estimate.right * estimate.tokens_right / answers.tokens
    return {
        "answers": estimate.rates.answers, "answers_low": estimate.low, "answers_high": estimate.high,
        "tokens": estimate.rates.tokens, "tokens_all": float((wrong * answers.tokens).sum() / answers.tokens.sum()),
        "level": LEVEL, "examples": len(answers),
    }  # fmt: skip


def measured(answers: Answers, estimate: Estimate) -> JsonObject:
    """Return what an objective is recommended by.

    ``gain_answer`` and ``gain_token``: how much better the model explains the labels than chance, in nats, means over
    answers and tokens; ``gain_positive``: share of answers where it does. ``sure``: share of the tokens where the model
    is sure (collision probability of at least one half); ``sure_right``: how often its first choice is the label there,
    ``sure_right_kept`` the same in answers that the noise model holds to be right; None without such tokens.
    """
    kept = estimate.right >= 0.5
    return {
        "gain_answer": float(answers.gain.mean()), "gain_token": float(answers.gain.sum() / answers.tokens.sum()),
        "gain_positive": float((answers.gain > 0).mean()), "sure": float(answers.sure.sum() / answers.tokens.sum()),
        "sure_right": _share(answers.sure_right.sum(), answers.sure.sum()),
        "sure_right_kept": _share(answers.sure_right[kept].sum(), answers.sure[kept].sum()),
    }  # fmt: skip


def _share(part: float, total: float) -> float | None:
    return float(part / total) if total else None


def rate_text(record: JsonObject, operations: Sequence[JsonObject], truth: JsonObject | None) -> list[str]:
    """Return what a report says of the estimate, a paragraph each."""
    low, high = (f"{record[key]:.2f}" for key in ("answers_low", "answers_high"))
    shares = (
        f"{_rate(record['answers'])} of the answers (90 % interval {low} to {high}),"
        f" {_rate(record['tokens'])} of the tokens in the others"
    )
    lines = [
        f"noise: {shares}" if record["reliable"] else
        "noise: no estimate, since the model explains hardly any answer better than chance does (the noise model says"
        f" {shares})"
    ]  # fmt: skip
    if record["injected"] is not None:
        known = record["injected"]
        lines.append(
            f"  {known['answers']:.2f} injected; of all tokens {record['tokens_all']:.2f} estimated,"
            f" {known['tokens']:.2f} injected"
        )
    for row in operations:
        judged = "-" if row["judged_noise"] is None else f"{row['judged_noise']:.2f}"
        lines.append(
            f"  {row['operation']}: {row['examples']} answers, {judged} of them judged noise; AUROC of the evidence"
            f" {_figure(row['auroc_evidence'])}, of tokens {_figure(row['auroc_evidence_token'])}"
        )
    if truth is not None and truth["field"] is not None:
        lines.append(f"  {truth['field']}: AUROC of the evidence {_figure(truth['auroc_evidence'])}")
    lines.append("  chance: " + _chance(record))
    if record["reliable"] and record["answers"] >= ALARM:
        lines.append(
            "  Warning: a third of the answers or more look like noise. They are wrong, or the model does not know"
            " the task."
        )
    lines.append(
        "  It cannot see noise that agrees with itself, nor one wrong number in a long answer; and it takes what the"
        " model does not know for noise."
    )
    return lines


def _rate(rate: float) -> str:
    bound = "at most " if rate <= LOWEST else "at least " if rate >= HIGHEST else ""
    return f"{bound}{rate:.2f}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _chance(record: JsonObject) -> str:
    second = record["second_pass"]
    if second is None:
        return "frequencies of the training labels (--unprompted false)"
    text = (
        "frequencies of the training labels, or the model without the prompt where that explains an answer better"
        f" ({record['asked']:.0%} of them); this second pass read {second['read']} tokens, {second['share']:.0%} of the"
        " first"
    )
    whole = second["whole"]
    return text + (f"; {whole} answers have no prompt to leave out" if whole else "")
