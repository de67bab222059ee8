"""From the grades of samples to the figures of a benchmark; plain arithmetic, the same live and from a file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from deft_lightning.evaluation.graders.base import Grade, Grader

Sums = list[list[list[float]]]  # source x figure x (examples, sum, sum of squares)


def pass_at(k: int, n: int, right: int) -> float:
    """Return the probability that one of k samples drawn from n is right, ``1 - C(n - right, k) / C(n, k)``.

    The unbiased estimate of "one of k is right" from n samples (arXiv 2107.03374).
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(votes: Sequence[str | None], scores: Sequence[float]) -> float:
    """Score of the answer that most samples give; of answers that tie for it, the mean.

    Samples without an answer do not vote; where none votes, 0. An answer has the score of its first sample.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    return math.fsum(scores[votes.index(vote)] for vote, n in counts.items() if n == most) / sum(
        n == most for n in counts.values()
    )


def figure_names(grader: Grader, n: int) -> list[str]:
    """Return the names of the figures of n samples a prompt.

    The mean over samples is ``avg@n`` for a score named correct, and has the name of the score for others. With more
    than one sample, ``pass@k`` for the powers of two up to n and for n, and ``maj@n``, both of the first score.
    """
    means = [f"avg@{n}" if name == "correct" else name for name in grader.names]
    return [*means, *(f"pass@{k}" for k in _ks(n)), *([f"maj@{n}"] if n > 1 else []), "truncated"]


def _ks(n: int) -> list[int]:
    return sorted({2**i for i in range(1, n.bit_length()) if 2**i <= n} | ({n} - {1}))


def figures(grader: Grader, grades: Sequence[Grade]) -> list[float]:
    """Return the figures of one prompt, in the order of :func:`figure_names`, each in ``[0, 1]``.

    Args:
        grader: Names the scores.
        grades: One for each of its n >= 1 samples.
    """
    n, first = len(grades), [grade.scores[grader.names[0]] for grade in grades]
    right = sum(score == 1 for score in first)
    return [
        *(math.fsum(grade.scores[name] for grade in grades) / n for name in grader.names),
        *(pass_at(k, n, right) for k in _ks(n)),
        *([majority([grade.vote for grade in grades], first)] if n > 1 else []),
        sum(grade.truncated for grade in grades) / n,
    ]


def no_sums(sources: int, names: int) -> Sums:
    """Return the sums of no example."""
    return [[[0.0] * 3 for _ in range(names)] for _ in range(sources)]


def add(sums: Sums, source: int, values: Sequence[float]) -> None:
    """Add the figures of one example."""
    for figure, value in zip(sums[source], values, strict=True):
        for i, more in enumerate((1.0, value, value * value)):
            figure[i] += more


def summary(sums: Sums, grader: Grader, n: int, sources: Sequence[str] = ()) -> dict[str, float]:
    """Return the figures of a benchmark.

    Args:
        sums: As :func:`add` makes them; one row where the examples name no source.
        grader: Names the scores.
        n: Samples a prompt.
        sources: Name of each row of ``sums``, if examples name their source.

    Returns:
        Each figure as the mean over examples and, but for ``truncated``, its standard error ``<figure>_se``,
        ``s / sqrt(N)`` with s the standard deviation over the N examples. Where all of them score 0, or all 1, it is
        half of Wilson's 68 % interval, ``1 / (2 N + 2)``: none right of two is no proof that none ever is. With
        sources also ``macro``, the mean over sources of the first score's mean, ``macro_<score>`` of the others, with
        the error ``sqrt(sum of squared errors) / sources``, and ``source/<name>``. Last the number of ``examples``.
    """
    names = figure_names(grader, n)
    figures: dict[str, float] = {}
    for i, name in enumerate(names):
        mean, error = _mean([sum(row[i][j] for row in sums) for j in range(3)])
        figures[name] = mean
        if name != "truncated":
            figures[f"{name}_se"] = error
    seen = [(name, row) for name, row in zip(sources, sums, strict=False) if row[0][0]]
    for i, score in enumerate(grader.names if seen else ()):
        parts = [_mean(row[i]) for _, row in seen]
        macro = "macro" if i == 0 else f"macro_{score}"
        figures[macro] = math.fsum(mean for mean, _ in parts) / len(parts)
        figures[f"{macro}_se"] = math.sqrt(math.fsum(error**2 for _, error in parts)) / len(parts)
    figures |= {f"source/{name}": _mean(row[0])[0] for name, row in seen}
    return {**figures, "examples": sum(row[0][0] for row in sums)}


def _mean(sums: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error from the number of examples, their sum and their sum of squares."""
    n = max(sums[0], 1.0)
    mean = sums[1] / n
    if sums[0] and mean in (0.0, 1.0):  # scores lie between: all are the same, and their spread says nothing
        return mean, 0.5 / (n + 1)
    variance = max(sums[2] / n - mean**2, 0.0) * n / max(n - 1, 1.0)
    return mean, math.sqrt(variance / n)


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Return the figures of benchmarks as lines of text, each with its standard error."""
    rows = [("benchmark", "examples", "figure", "value", "error")]
    for benchmark, figures in results.items():
        shown = benchmark or "held out"
        for name, value in figures.items():
            if name == "examples" or name.endswith("_se"):
                continue
            error = f"{figures[f'{name}_se']:.4f}" if f"{name}_se" in figures else ""
            rows.append((shown, f"{figures['examples']:.0f}", name, f"{value:.4f}", error))
            shown = ""
    rows = [(row[0], row[1] if row[0] else "", *row[2:]) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    pad = (str.ljust, str.rjust, str.ljust, str.rjust, str.rjust)
    return "\n".join("  ".join(p(c, w) for p, c, w in zip(pad, row, widths, strict=True)).rstrip() for row in rows)
