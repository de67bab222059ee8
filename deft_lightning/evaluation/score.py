"""Grade a file that `predict` wrote: no model, no data and no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deft_lightning.errors import UserError
from deft_lightning.evaluation.aggregate import add, figure_names, figures, no_sums, summary
from deft_lightning.evaluation.benchmarks import BENCHMARKS, HELD_OUT, Benchmark, TestSet, find_benchmark
from deft_lightning.evaluation.graders.choice import Choice
from deft_lightning.evaluation.grading import Doubts, Item, grade_all
from deft_lightning.evaluation.predictions import Prediction, read_predictions


def score(
    path: Path, benchmark: str | None = None, *, trust: bool = False, bar: bool = False, doubts: Doubts | None = None
) -> dict[str, dict[str, float]]:
    """Grade a predictions file.

    Args:
        path: The file.
        benchmark: Whose grader grades every line; default: each line's own, exact match for lines without one.
        trust: Whether to import a benchmark that a line names by its path, which runs the code of that module.
        bar: Whether to show progress.
        doubts: Counts the completions that could not be judged.

    Returns:
        The figures of each benchmark, by its name; the name is empty where lines have none.

    Raises:
        UserError: As for :func:`read_predictions`; an id comes twice, a row lacks what the grader needs, or rows have
            different numbers of completions.
    """
    groups: dict[str, list[Prediction]] = {}
    seen: dict[tuple[str, str], str] = {}
    for row in read_predictions(path):
        name = benchmark or row.benchmark
        if row.id and (before := seen.setdefault((name, row.id), row.where)) != row.where:
            raise UserError(f"{row.where}, field 'id': {row.id!r} stands in {before.rpartition(', ')[2]} already")
        groups.setdefault(name, []).append(row)
    if not groups:
        raise UserError(f"{path}: is empty")
    benchmarks = {name: _benchmark(name, bool(benchmark), trust, rows[0].where) for name, rows in groups.items()}
    doubts = Doubts() if doubts is None else doubts
    return {name: _figures(benchmarks[name], rows, doubts, bar) for name, rows in groups.items()}


def _benchmark(name: str, asked: bool, trust: bool, where: str) -> Benchmark:
    if not name:
        return HELD_OUT
    if not asked and not trust and name not in BENCHMARKS and "." in name:
        raise UserError(
            f"{where}, field 'benchmark': {name} is code to import, and the file may not be yours; allow it "
            "with --trust_benchmarks, or grade every line by it with --benchmark"
        )
    return find_benchmark(name, "--benchmark" if asked else f"{where}, field 'benchmark'")


def _figures(benchmark: Benchmark, rows: Sequence[Prediction], doubts: Doubts, bar: bool) -> dict[str, float]:
    n = len(rows[0].completions)
    named = [row for row in rows if "source" in row.record]
    tests = TestSet(benchmark, tuple(sorted({str(row.record["source"]) for row in named})))
    sums = no_sums(len(tests.sources) or 1, len(figure_names(benchmark.grader, n)))
    for row in rows:
        if len(row.completions) != n:
            raise UserError(
                f"{row.where}, field 'completions': has {len(row.completions)}, {rows[0].where.rpartition(', ')[2]} has"
                f" {n}; avg@n and pass@k need the same number in every row"
            )
        if named and "source" not in row.record:
            raise UserError(f"{row.where}, field 'record.source': is missing, other rows have it")
        _check_options(benchmark, row)
    items = [
        Item(row.where.rpartition(", ")[2], text, cut, gold, row.record)
        for row in rows
        for gold in [benchmark.gold(row.gold)]
        for text, cut in zip(row.completions, row.truncated, strict=True)
    ]
    grades = grade_all(benchmark.grader, items, n > 1, doubts, bar)
    for i, row in enumerate(rows):
        add(sums, tests.place(row.record), figures(benchmark.grader, grades[n * i : n * (i + 1)]))
    return summary(sums, benchmark.grader, n, tests.sources)


def _check_options(benchmark: Benchmark, row: Prediction) -> None:
    if not isinstance(benchmark.grader, Choice):
        return
    options = row.record.get("options")
    if not isinstance(options, dict) or not options or not all(isinstance(text, str) for text in options.values()):
        raise UserError(f"{row.where}, field 'record.options': expected an object of labels and texts")
    if row.gold not in options:
        raise UserError(f"{row.where}, field 'gold': {row.gold!r} is not one of the options {', '.join(options)}")
