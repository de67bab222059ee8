r"""Benchmarks as values: which columns a row has, what is asked, and who grades it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from types import MappingProxyType
from typing import Any

from deft_lightning.annotations import Record
from deft_lightning.answers.locate import boxed, hashed
from deft_lightning.errors import UserError, did_you_mean
from deft_lightning.evaluation.graders.base import Grader
from deft_lightning.evaluation.graders.choice import Choice
from deft_lightning.evaluation.graders.exact import ExactMatch
from deft_lightning.evaluation.graders.figfont import FigFont
from deft_lightning.evaluation.graders.mathematics import Math, Rule

Columns = Mapping[str, tuple[str, ...]]
BOX = "Solve this step by step and put the final answer in \\boxed{}."
LETTER = "Answer with the letter of the right option."


def as_text(value: object) -> str:
    """Return a gold value as text."""
    return str(value)


def final_answer(value: object) -> str:
    r"""Return the final answer that a row of mathematics gives: a number, a text, a list of answers, or a solution.

    Of a solution what stands behind ``####`` or in the last ``\boxed{}``; 42.0 is 42.
    """
    if isinstance(value, list | tuple):
        return ", ".join(map(final_answer, value))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return (hashed(text) or boxed(text) or text).strip().strip("$").strip()


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Args:
        name: Names it on the command line and in the tags.
        grader: Grades its completions.
        columns: Field to the columns that may hold it, dotted for nested ones, the first that is there counts:
            ``question``, ``gold``, and if it has them ``id``, ``context``, ``options``, ``source``, ``error``.
        default: Where its rows are if nobody says, as ``--data.source``; None where somebody has to.
        instruction: Stands behind the question; ``--data.benchmark_instruction`` replaces it.
        gold: Turns the gold column's value into the right answer; of its own output it makes the same.
        options: Labels of a multiple choice that is the same in every row.
        between: Stands between context and question.
        path: Where it was imported from, if somebody named it by that; what `predict` writes names it likewise.
    """

    name: str
    grader: Grader
    columns: Columns
    default: str | None = None
    instruction: str = ""
    gold: Callable[[Any], str] = as_text
    options: tuple[str, ...] = ()
    between: str = "\n\n"
    path: str = ""

    def prompt(self, question: str, context: str, options: Mapping[str, str], instruction: str | None) -> str:
        """Return what the user's turn says; options are listed where their labels do not say them."""
        listed = "\n".join(f"{label}. {text}" for label, text in options.items() if label != text)
        asked = f"{context}{self.between}{question}" if context.strip() else question
        asked = f"{asked}\n{listed}" if listed else asked
        request = self.instruction if instruction is None else instruction
        return f"{asked}\n\n{request}" if request else asked


HELD_OUT = Benchmark("", ExactMatch(), MappingProxyType({}))  # what is tested where no benchmark is named

_MATH: Columns = MappingProxyType(
    {
        "question": ("question", "problem", "Problem"),
        "gold": ("final_answer", "answer", "Answer", "solution"),
        "id": ("unique_id", "id", "ID"),
        "context": ("context",),
        "error": ("error",),
    }
)
_SVAMP: Columns = MappingProxyType(
    {"question": ("Question", "question"), "context": ("Body",), "gold": ("Answer", "answer"), "id": ("ID", "id")}
)
_PUBMEDQA: Columns = MappingProxyType(
    {
        "question": ("QUESTION", "question"),
        "context": ("CONTEXTS", "context.contexts"),
        "gold": ("final_decision",),
        "id": ("id", "pubid"),
    }
)
_MEDICAL: Columns = MappingProxyType(
    {
        "question": ("question",),
        "options": ("options", "choices"),
        "gold": ("answer_idx", "label", "answer"),
        "source": ("source",),
        "id": ("id",),
    }
)
_FIGFONT: Columns = MappingProxyType({"question": ("question",), "gold": ("answer",), "id": ("id",)})


def _math(name: str, default: str | None, *more: Rule, instruction: str = BOX, columns: Columns = _MATH) -> Benchmark:
    grader = Math(("boxed", *more))
    between = " " if columns is _SVAMP else "\n\n"
    return Benchmark(name, grader, columns, default, instruction, final_answer, between=between)


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        benchmark.name: benchmark
        for benchmark in (
            _math("gsm8k", "openai/gsm8k?subset=main&split=test", "hashes", "last_number", instruction=""),
            _math("svamp", "ChilleD/SVAMP?split=test", "hashes", "last_number", instruction="", columns=_SVAMP),
            _math("math500", "HuggingFaceH4/MATH-500?split=test"),
            _math("minerva", "math-ai/minervamath?split=test"),
            _math("olympiadbench", "Hothan/OlympiadBench?subset=OE_TO_maths_en_COMP&split=train"),
            _math("aime24", "HuggingFaceH4/aime_2024?split=train"),
            _math("amc23", "math-ai/amc23?split=test"),
            _math("math", None, "hashes", "last_number"),
            Benchmark(
                "pubmedqa", Choice(), _PUBMEDQA, "qiaojin/PubMedQA?subset=pqa_labeled&split=train",
                "Answer with yes, no or maybe.", options=("yes", "no", "maybe"),
            ),
            Benchmark("medical", Choice(), _MEDICAL, None, LETTER),
            # Far from any training block: a task's row i of seed s is row 0 of seed s + i.
            Benchmark(
                "figfont", FigFont(), _FIGFONT,
                "reasoning_gym:figlet_font?size=5000&seed=1000000&min_word_len=2&max_word_len=5",
            ),
        )
    }
)  # fmt: skip


def find_benchmark(name: str, option: str = "--data.benchmarks") -> Benchmark:
    """Return a benchmark by its name, or a user's own by the path of the object, ``my_package.module.MINE``.

    Args:
        name: The name or the path.
        option: Who gave it, for the message.

    Raises:
        UserError: There is none.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    module, _, attribute = name.rpartition(".")
    if module:
        try:
            benchmark = getattr(import_module(module), attribute)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise UserError(f"{option}: {name} cannot be imported ({error})") from None
        if not isinstance(benchmark, Benchmark):
            raise UserError(f"{option}: {name} is not a Benchmark of deft_lightning.evaluation")
        return replace(benchmark, path=name)
    raise UserError(
        f"{option}: no benchmark {name!r}.{did_you_mean(name, BENCHMARKS)} Known: {', '.join(BENCHMARKS)}, or"
        " the path of a Benchmark of your own"
    )


@dataclass(frozen=True)
class TestSet:
    """Prompts that are tested together.

    Attributes:
        benchmark: What they belong to.
        sources: Where its rows say they are from, sorted; empty where they do not say.
        longest: Tokens of the longest prompt.
        skipped: How many prompts are left out, since they fill the model's positions.
    """

    __test__ = False  # no test of pytest's

    benchmark: Benchmark = HELD_OUT
    sources: tuple[str, ...] = ()
    longest: int = 0
    skipped: int = 0

    @property
    def prefix(self) -> str:
        """Return what its tags begin with."""
        return f"test/{self.benchmark.name}/" if self.benchmark.name else "test/"

    def place(self, record: Record) -> int:
        """Return the place of an example's source among the sources."""
        return self.sources.index(str(record["source"])) if self.sources else 0
