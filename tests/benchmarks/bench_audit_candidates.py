"""Candidates for the audit's score, on tokens that were read once.

    python tests/benchmarks/bench_audit_rows.py --model DIR --source gsm8k_test.jsonl --rows 100 --keep tokens
    python tests/benchmarks/bench_audit_candidates.py tokens/*.npz [--output FILE.json]

Prints the AUROC over rows of every candidate on every file: ways to measure a token, what is taken off as usual, ways
to pool the tokens of a row, quantiles between which the tail is measured, evidence of the prompt, and ways to join the
three kinds of evidence.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from deft_lightning.metrics import exact_auroc
from deft_lightning.probe import join, scores
from deft_lightning.probe.scores import Numbers, Tokens, rarest, rarity, score_rows, usual

TAILS = ((0.8, 0.98), (0.8, 0.95), (0.8, 0.9), (0.6, 0.9), (0.5, 0.8))
TAILS_OF_NUMBERS = ((0.9, 0.99), (0.8, 0.95), (0.7, 0.9), (0.6, 0.85))
CAPS = (1.0, 2.3, 3.0)  # nats that one token may say for another prompt; 2.3 is ten to one
Score = Callable[[Tokens], Numbers]


def of_text(tokens: Tokens, values: Numbers) -> Numbers:
    """Mean of the same text elsewhere in the file, whatever stands before."""
    return scores._others(tokens.target, values, np.full(len(values), values.mean()))


MEASURES: dict[str, Score] = {"conflict": lambda t: t.conflict, "-log p": lambda t: -t.log_prob}


def after_text(tokens: Tokens, values: Numbers) -> Numbers:
    """Mean of the same text behind the same text elsewhere, however few rows have it."""
    pairs = (tokens.before + 1) * (int(tokens.target.max(initial=0)) + 1) + tokens.target
    return scores._others(pairs, values, of_text(tokens, values))


def of_chance(tokens: Tokens, values: Numbers) -> Numbers:
    """``-log`` of the mean of ``e^-x`` in place of the mean of x: what is probable in some place is no habit."""
    return -np.log(np.maximum(after_text(tokens, np.exp(-values)), 1e-30))


def shared_by(share: float) -> Callable[[Tokens, Numbers], Numbers]:
    """The package's, with another share of rows that makes text a habit."""
    return lambda t, values: np.where(scores.shares(t) >= share, after_text(t, values), values.mean())


USUAL: dict[str, Callable[[Tokens, Numbers], Numbers]] = {
    "": lambda t, values: values,
    " less text": lambda t, values: values - of_text(t, values),
    " less text after text": lambda t, values: values - after_text(t, values),
    " less log mean": lambda t, values: values - of_chance(t, values),
    " less text of 20 % of the rows": lambda t, values: values - shared_by(0.2)(t, values),
    " less text of 10 %": lambda t, values: values - shared_by(0.1)(t, values),
    " less text of 5 %": lambda t, values: values - usual(t, values),
}  # fmt: skip


def simes(tokens: Tokens, nats: Numbers) -> Numbers:
    """The package's pooling, over all tokens."""
    return rarest(tokens, nats, np.ones(len(nats), bool))


def largest(tokens: Tokens, values: Numbers) -> Numbers:
    """The largest value of each row; 0 without any."""
    result = np.zeros(len(tokens.counts))
    np.maximum.at(result, tokens.row, values)
    return result


def pooled(tokens: Tokens, values: Numbers) -> dict[str, Numbers]:
    """Ways to pool the tokens of a row."""
    nats = rarity(values, *scores.TAIL)
    soft = {f"sum above {c:g} nats": tokens.summed(np.logaddexp(0, nats - c)) for c in (3, 4.5, 6)}
    counts = np.maximum(tokens.counts, 1)
    return {
        "rarest": simes(tokens, nats), "largest": largest(tokens, values), "mean": tokens.summed(values) / counts,
        **soft,
    }  # fmt: skip


def of_half(evidence: Numbers, share: float = 0.5) -> Numbers:
    """Evidence that applies to a share of the rows."""
    return np.logaddexp(np.log1p(-share), evidence + np.log(share))


def joined(odd: Numbers, answer: Numbers, belongs: Numbers) -> dict[str, Numbers]:
    """Ways to join three kinds of evidence."""
    return {
        "log of the sum of e^x": np.logaddexp(np.logaddexp(odd, answer), belongs),
        "largest": np.maximum(np.maximum(odd, answer), belongs), "sum": odd + answer + belongs,
        "sum, none below 0": odd + answer + np.maximum(belongs, 0),
        "sum, half": odd + answer + of_half(belongs), "sum, 4 in 5": odd + answer + of_half(belongs, 0.8),
        "sum, 19 in 20": odd + answer + of_half(belongs, 0.95),
        "sum, half of each": of_half(odd) + of_half(answer) + of_half(belongs),
        "larger of two, half": np.maximum(odd, answer) + of_half(belongs),
        "noise rates by EM": join.joined(odd, answer, belongs).odds,
    }  # fmt: skip


def densities(tokens: Tokens) -> Numbers:
    """Log ratio of two normal densities of the standardised sum: what the audit joined before."""
    lift = (1 - np.exp(np.minimum(tokens.bare, 0.0))) * (tokens.bare - tokens.log_prob)
    total = tokens.summed(lift)
    asked = np.isfinite(total) & (tokens.counts > 0)
    result, own = np.zeros(len(total)), asked[tokens.row]
    mean = (total / np.maximum(tokens.counts, 1))[tokens.row]
    spread = np.sqrt(((lift - mean)[own] ** 2).sum() / max(int(own.sum() - asked.sum()), 1))
    if spread > 0:
        t = total[asked] / (spread * np.sqrt(tokens.counts[asked]))
        right = min(float(np.quantile(t, 0.25)), 0.0)
        result[asked] = right**2 / 2 - t * right
    return result


def prompts(tokens: Tokens) -> dict[str, Numbers]:
    """Evidence that an answer belongs to another prompt: sums of ``log q / p``, in nats."""
    lift = np.nan_to_num(tokens.bare - tokens.log_prob)
    weighted = lift * (1 - np.exp(np.minimum(np.nan_to_num(tokens.bare), 0)))
    numbers = np.where(tokens.number, np.clip(weighted, -3, 3), 0.0)
    return {
        "nats": tokens.summed(weighted), "half the nats": tokens.summed(weighted) / 2,
        "a fourth of the nats": tokens.summed(weighted) / 4,
        **{f"nats, {cap:g} a token at most": tokens.summed(np.minimum(weighted, cap)) for cap in CAPS},
        **{f"nats within {cap:g} a token": tokens.summed(np.clip(weighted, -cap, cap)) for cap in CAPS},
        **{f"half the nats, {cap:g} at most": tokens.summed(np.minimum(weighted, cap)) / 2 for cap in CAPS},
        "nats of numbers within 3": tokens.summed(numbers),
        "nats of plain log q / p within 3": tokens.summed(np.clip(lift, -3, 3)),
    }  # fmt: skip


def of_numbers(tokens: Tokens, values: Numbers, tail: tuple[float, float]) -> Numbers:
    """Evidence of the last number, with another measure or tail."""
    nats = np.zeros(len(values))
    nats[tokens.number] = rarity(values[tokens.number], *tail)
    return rarest(tokens, nats, tokens.last & tokens.number)


def unbiased(values: Numbers, body: float, room: float) -> Numbers:
    """As the package's rarity, with the most likely scale of an exponential tail that is cut at the second quantile."""
    nats = rarity(values, body, room)
    low, high = np.quantile(values, (body, room))
    ended = int(((values > low) & (values <= high)).sum()) / max(int((values > low).sum()), 1)
    floor = -np.log(1 - body)
    return np.where(values > low, floor + (nats - floor) * ended, nats)


def candidates(tokens: Tokens) -> dict[str, Numbers]:
    """Every candidate, by name."""
    own = score_rows(tokens).scores
    found = {f"score: {name}": values for name, values in own.items()}
    for measure, of in MEASURES.items():
        values = of(tokens)
        for less, without in USUAL.items():
            excess = without(tokens, values)
            found |= {f"token: {measure}{less}, {way}": score for way, score in pooled(tokens, excess).items()}
        for tail in TAILS_OF_NUMBERS:
            found[f"last number: {measure}, {tail}"] = of_numbers(tokens, values, tail)
    lift = np.nan_to_num(tokens.bare - tokens.log_prob)
    found["prompt: densities"] = densities(tokens)
    found["prompt: sum of log q / p"] = tokens.summed(lift)
    found["prompt: the same less text after text"] = tokens.summed(lift - after_text(tokens, lift))
    found["prompt: the same of numbers alone"] = tokens.summed(np.where(tokens.number, lift, 0.0))
    belongs, excess = densities(tokens), -tokens.log_prob - usual(tokens, -tokens.log_prob)
    for tail in TAILS:
        odd = simes(tokens, rarity(excess, *tail))
        for numbers in TAILS_OF_NUMBERS[:3]:
            ways = joined(odd, of_numbers(tokens, tokens.conflict, numbers), belongs)
            for way, score in ways.items():
                found[f"joined: {way}; odd {tail}, numbers {numbers}"] = score
    numbers = np.zeros(len(excess))
    if tokens.number.any():
        numbers[tokens.number] = unbiased(tokens.conflict[tokens.number], *scores.TAIL_OF_NUMBERS)
    number = rarest(tokens, numbers, tokens.last & tokens.number)
    rare = simes(tokens, unbiased(excess, *scores.TAIL))
    found["joined: sum, half; unbiased tails"] = rare + number + of_half(belongs)
    for name, evidence in prompts(tokens).items():
        found[f"prompt: {name}"] = evidence
        for way, score in joined(own["odd"], own["answer"], evidence).items():
            found[f"joined with {name}: {way}"] = score
        for way, score in joined(rare, number, evidence).items():
            found[f"joined with {name}, unbiased tails: {way}"] = score
    for less, without in USUAL.items():
        odd = simes(tokens, rarity(without(tokens, -tokens.log_prob), *scores.TAIL))
        way = odd + own["answer"] + of_half(belongs)
        found[f"joined: sum, half; odd of -log p{less}"] = way
    old = simes(tokens, rarity(tokens.conflict - after_text(tokens, tokens.conflict), 0.8, 0.98))
    old_answer = of_numbers(tokens, tokens.conflict, (0.9, 0.99))
    found["joined: as the audit did before"] = np.logaddexp(np.logaddexp(old, old_answer), belongs)
    return found


@cache
def tokens_of(path: Path) -> tuple[Tokens, list[bool]]:
    """Read what `bench_audit_rows.py --keep` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return Tokens(**{name: file[name] for name in Tokens._fields}), file["noisy"].tolist()


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", help="JSON to write")
    options = parser.parse_args(args)
    table: dict[str, dict[str, float]] = {}
    for path in options.files:
        tokens, noisy = tokens_of(path)
        truth = np.array(noisy)
        for name, values in candidates(tokens).items():
            auroc = exact_auroc(values[truth].tolist(), values[~truth].tolist())
            table.setdefault(name, {})[path.stem] = auroc
    for name, row in table.items():
        values = list(row.values())
        print(f"{name:75} " + " ".join(f"{value:.3f}" for value in values), f"  mean {np.mean(values):.3f}")
    if options.output:
        files = json.dumps([path.stem for path in options.files])
        rows = ",\n".join(f" {json.dumps(n)}: {[round(v, 4) for v in row.values()]}" for n, row in table.items())
        content = f'{{"files": {files},\n"candidates": {{\n{rows}\n}}}}\n'
        Path(options.output).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
