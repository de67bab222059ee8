"""Generation, graders of what was generated, and benchmarks.

Names load on first use: grading, unlike generation, needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deft_lightning.evaluation.benchmarks import BENCHMARKS, Benchmark, TestSet, find_benchmark
    from deft_lightning.evaluation.completions import Completion
    from deft_lightning.evaluation.evaluator import Evaluator, prediction_records
    from deft_lightning.evaluation.generate import Generation, complete
    from deft_lightning.evaluation.graders.base import Grade, Grader, known_graders
    from deft_lightning.evaluation.graders.choice import Choice
    from deft_lightning.evaluation.graders.exact import ExactMatch, exact_match
    from deft_lightning.evaluation.graders.figfont import FigFont, jaro_winkler
    from deft_lightning.evaluation.graders.mathematics import Math

_HOMES = {
    "BENCHMARKS": "benchmarks",
    "Benchmark": "benchmarks",
    "Choice": "graders.choice",
    "Completion": "completions",
    "Evaluator": "evaluator",
    "ExactMatch": "graders.exact",
    "FigFont": "graders.figfont",
    "Generation": "generate",
    "Grade": "graders.base",
    "Grader": "graders.base",
    "Math": "graders.mathematics",
    "TestSet": "benchmarks",
    "complete": "generate",
    "exact_match": "graders.exact",
    "find_benchmark": "benchmarks",
    "jaro_winkler": "graders.figfont",
    "known_graders": "graders.base",
    "prediction_records": "evaluator",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Choice",
    "Completion",
    "Evaluator",
    "ExactMatch",
    "FigFont",
    "Generation",
    "Grade",
    "Grader",
    "Math",
    "TestSet",
    "complete",
    "exact_match",
    "find_benchmark",
    "jaro_winkler",
    "known_graders",
    "prediction_records",
]
