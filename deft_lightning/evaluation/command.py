"""The verb ``score``: grade a file that `predict` wrote, without a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from deft_lightning.atomic import check_output_file, whole_file
from deft_lightning.errors import UserError
from deft_lightning.evaluation.aggregate import table
from deft_lightning.evaluation.benchmarks import HELD_OUT, TestSet, find_benchmark
from deft_lightning.evaluation.grading import Doubts
from deft_lightning.evaluation.score import score

PROGRAM = "python -m deft_lightning"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        sys.stderr.write(f"error: score: {message}\n")
        self.exit(2)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = _Parser(
        prog=f"{PROGRAM} score", allow_abbrev=False,
        description="Grade a file of predictions without a model, with the same scores as `test`.",
    )  # fmt: skip
    parser.add_argument("predictions", type=Path, help="file that `predict` wrote")
    parser.add_argument(
        "--benchmark",
        help="benchmark whose grader is used; default: the benchmark that each line names, or exact match",
    )
    parser.add_argument("--output", type=Path, help="JSON file for the scores, under the tags of `test`")
    parser.add_argument(
        "--trust_benchmarks", action="store_true",
        help="import benchmarks that lines name by path (my_package.module.MINE), which runs their code",
    )  # fmt: skip
    return parser


def parsers() -> dict[str, list[argparse.ArgumentParser]]:
    """Return the parser of the verb, by its name."""
    return {"score": [parser()]}


def main(arguments: Sequence[str]) -> None:
    """Run the verb; mistakes end with one line and status 2."""
    options = parser().parse_args(arguments)
    doubts = Doubts()
    try:
        if options.output is not None:
            check_output_file(options.output, "score: --output", make=False)
        results = score(
            options.predictions, options.benchmark, trust=options.trust_benchmarks, bar=True, doubts=doubts
        )  # fmt: skip
        if str(doubts):
            sys.stderr.write(f"{options.predictions}: {doubts}\n")
        if options.output is not None:
            _write(options.output, results)
        print(table(results), flush=True)
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)


def _write(path: Path, results: Mapping[str, Mapping[str, float]]) -> None:
    tags = {
        f"{TestSet(find_benchmark(name) if name else HELD_OUT).prefix}{figure}": value
        for name, figures in results.items()
        for figure, value in figures.items()
    }
    text = json.dumps(tags, indent=2) + "\n"
    try:
        if path.exists() and not path.is_file():  # a pipe or a device
            path.write_text(text, encoding="utf-8")
            return
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror or error})") from None
