"""``python -m deft_lightning score FILE``: grade what `predict` wrote; needs no model, no data and no torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from deft_lightning.errors import UserError
from deft_lightning.evaluation.aggregate import add, figure_names, figures, no_sums, summary, table
from deft_lightning.evaluation.benchmarks import HELD_OUT, Benchmark, TestSet, find_benchmark
from deft_lightning.evaluation.choice import Choice
from deft_lightning.outputs import check_output_file


class Prediction(NamedTuple):
    """A line of a predictions file."""

    where: str
    benchmark: str
    id: str
    completions: list[str]
    gold: str
    truncated: list[bool]
    record: dict[str, Any]


def read_predictions(path: Path) -> Iterator[Prediction]:
    """Yield the lines of a file that `predict` wrote, or another program in its layout.

    A line is an object with ``completions`` (texts) and ``gold``, and may have ``id``, ``benchmark``, ``truncated``
    (one truth value for each completion) and ``record`` (``options`` of a multiple choice, ``source``, ``error``).

    Raises:
        UserError: The file cannot be read, or a line is something else; file, row and field.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _prediction(f"{path}, row {number}", line)
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _prediction(where: str, line: str) -> Prediction:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, got {type(row).__name__}")

    def field(name: str, kind: type[Any], default: Any = None) -> Any:
        value = row.get(name, default)
        if value is None:
            raise UserError(f"{where}, field {name!r}: is missing (the row has {', '.join(row) or 'none'})")
        if not isinstance(value, kind):
            raise UserError(f"{where}, field {name!r}: expected {_WORDS[kind]}, got {type(value).__name__}")
        return value

    completions = field("completions", list)
    if not completions or not all(isinstance(text, str) for text in completions):
        raise UserError(f"{where}, field 'completions': expected a list of at least one text")
    truncated = field("truncated", list, [False] * len(completions))
    if len(truncated) != len(completions) or not all(isinstance(cut, bool) for cut in truncated):
        raise UserError(f"{where}, field 'truncated': expected {len(completions)} truth values, one a completion")
    id = row.get("id")
    if isinstance(id, bool) or not isinstance(id, str | int | None):
        raise UserError(f"{where}, field 'id': expected text, got {type(id).__name__}")
    return Prediction(
        where, field("benchmark", str, ""), "" if id is None else str(id), completions, field("gold", str), truncated,
        field("record", dict, {}),
    )  # fmt: skip


_WORDS: dict[type[Any], str] = {str: "text", list: "a list", dict: "an object"}


def score(path: Path, benchmark: str | None = None) -> dict[str, dict[str, float]]:
    """Grade a predictions file.

    Args:
        path: The file.
        benchmark: Whose grader grades every line; default: each line's own, exact match for lines without one.

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
    return {name: _figures(_benchmark(name, benchmark, rows), rows) for name, rows in groups.items()}


def _benchmark(name: str, asked: str | None, rows: Sequence[Prediction]) -> Benchmark:
    if not name:
        return HELD_OUT
    return find_benchmark(name, "--benchmark" if asked else f"{rows[0].where}, field 'benchmark'")


def _figures(benchmark: Benchmark, rows: Sequence[Prediction]) -> dict[str, float]:
    n = len(rows[0].completions)
    named = [row for row in rows if "source" in row.record]
    tests = TestSet(benchmark, tuple(sorted({str(row.record["source"]) for row in named})))
    sums = no_sums(len(tests.sources) or 1, len(figure_names(benchmark.grader, n)))
    for row in rows:
        if len(row.completions) != n:
            raise UserError(
                f"{row.where}, field 'completions': has {len(row.completions)}, {rows[0].where.rpartition(', ')[2]} has"
                f" {n}; avg@n and pass@k want the same number everywhere"
            )
        if named and "source" not in row.record:
            raise UserError(f"{row.where}, field 'record.source': is missing, other rows have it")
        _check_options(benchmark, row)
        gold = benchmark.gold(row.gold)
        pairs = zip(row.completions, row.truncated, strict=True)
        grades = [benchmark.grader.grade(text, gold, row.record, cut, n > 1) for text, cut in pairs]
        add(sums, tests.place(row.record), figures(benchmark.grader, grades))
    return summary(sums, benchmark.grader, n, tests.sources)


def _check_options(benchmark: Benchmark, row: Prediction) -> None:
    if not isinstance(benchmark.grader, Choice):
        return
    options = row.record.get("options")
    if not isinstance(options, dict) or not options or not all(isinstance(text, str) for text in options.values()):
        raise UserError(f"{row.where}, field 'record.options': expected an object of labels and texts")
    if row.gold not in options:
        raise UserError(f"{row.where}, field 'gold': {row.gold!r} is none of the options {', '.join(options)}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        sys.stderr.write(f"error: score: {message}\n")
        self.exit(2)


def main(arguments: Sequence[str]) -> None:
    """Run the verb; mistakes end with one line and status 2."""
    parser = _Parser(
        prog="python -m deft_lightning score", allow_abbrev=False,
        description="Grade a file of predictions without a model; the figures are those of `test`.",
    )  # fmt: skip
    parser.add_argument("predictions", type=Path, help="file that `predict` wrote")
    parser.add_argument("--benchmark", help="whose grader grades it; default: the one each line names, or exact match")
    parser.add_argument("--output", type=Path, help="JSON file for the figures, under the tags of `test`")
    options = parser.parse_args(arguments)
    try:
        if options.output is not None:
            check_output_file(options.output, "score: --output", make=False)
        found = score(options.predictions, options.benchmark)
        print(table(found))
        if options.output is not None:
            tags = {
                f"{TestSet(find_benchmark(name) if name else HELD_OUT).prefix}{figure}": value
                for name, figures in found.items()
                for figure, value in figures.items()
            }
            options.output.write_text(json.dumps(tags, indent=2) + "\n", encoding="utf-8")
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
