"""What `test` and `predict` do with completions: grade them, or write down what grading them later needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from deft_lightning.annotations import Batch, CausalLM, JsonObject, Tokenizer
from deft_lightning.evaluation.aggregate import figure_names, figures, summary, table
from deft_lightning.evaluation.benchmarks import TestSet
from deft_lightning.evaluation.completions import Ask, Completion, Completions, asks_of
from deft_lightning.evaluation.continuous import why_not
from deft_lightning.evaluation.generate import Generation, completions_of, position_limit, positions
from deft_lightning.evaluation.graders.judge import judge
from deft_lightning.evaluation.grading import Doubts, Item, grade_all
from deft_lightning.evaluation.vllm import Engine, check_vllm
from deft_lightning.metrics import ExampleSums
from deft_lightning.progress import progress

Samples = list[list[Completion]]  # of each prompt of a batch; nothing for a filler


class Evaluator:
    """Grades completions of test prompts, or makes records of them that can be graded later.

    Args:
        generation: How completions are generated.
    """

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self._doubts = Doubts()
        self._sums: list[ExampleSums] = []
        self._completions: dict[int, Completions] = {}
        self._bars: dict[int, Any] = {}
        self._engine: Engine | None = None
        self._together = False

    def begin(
        self,
        model: CausalLM,
        test_sets: Sequence[TestSet],
        together: bool = False,
        processes: int = 1,
        write: Callable[[Path], object] | None = None,
    ) -> None:
        """Refuse now what would stop the run later; say where it is slower or shorter than was asked for.

        Args:
            model: The Hugging Face model that generates.
            test_sets: What each loader's prompts belong to.
            together: Whether ranks share the weights.
            processes: Ranks of the run.
            write: Writes the model as a Hugging Face folder, for vLLM.

        Raises:
            UserError: A prompt fills the model's positions, or vLLM cannot be used.
        """
        self._completions, self._bars, self._engine = {}, {}, None
        self._check_prompts(model, test_sets)
        if self.generation.backend == "vllm":
            check_vllm(processes)
            assert write is not None
            length = max(tests.longest for tests in test_sets) + self.generation.max_new_tokens
            self._engine = Engine(model, write, min(length, positions(model) or length))
        elif reason := "ranks share its weights" if together else why_not(model):
            rank_zero_info(f"generation: whole batches, in which the longest completion decides: {reason}")
        self._together = together

    def complete(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        batch: Batch,
        stops: Sequence[int],
        longest: int = 0,
        loader: int = 0,
        ahead: Callable[[], Sequence[Ask]] = tuple,
    ) -> Samples:
        """Complete the left-padded prompts of a batch; those of the batches to come are begun beside them.

        Args:
            model: The Hugging Face model that generates.
            tokenizer: Decodes; gives the padding token.
            batch: As for :func:`~deft_lightning.evaluation.generate.complete`.
            stops: Tokens that end a completion.
            longest: Tokens of the longest prompt of all batches.
            loader: Number of the loader.
            ahead: Returns all prompts that the loader will give this rank; none where that is not known.
        """
        how: dict[str, Any] = {
            "places": len(batch["example_id"]), "longest": longest, "engine": self._engine,
            "device": batch["input_ids"].device,  # of the rank; its weights may be in host memory
        }  # fmt: skip
        given = (self.generation, stops)
        if self._together:
            made = completions_of(model, tokenizer, asks_of(batch), *given, **how, together=True)
            samples = made.take(range(how["places"]))
            return [] if batch.get("filler") else samples
        if loader not in self._completions and (asks := ahead()):
            self._completions[loader] = completions_of(model, tokenizer, asks, *given, **how)
        known = self._completions.get(loader)
        numbers = None if known is None else known.numbers(batch["example_id"])
        if known is None or numbers is None:  # a loader of one's own
            return completions_of(model, tokenizer, asks_of(batch), *given, **how).take(range(how["places"]))
        if loader not in self._bars and getattr(rank_zero_only, "rank", 0) == 0:
            self._bars[loader] = progress(None, "generate", known.total, "prompts")
        return known.take(numbers, self._tell(loader))

    def _tell(self, loader: int) -> Callable[[Completions], None] | None:
        """Return what shows how many prompts of a loader are done."""
        bar = self._bars.get(loader)
        if bar is None:
            return None

        def tell(known: Completions) -> None:
            if known.done > bar.n:
                bar.update(known.done - bar.n)
                if known.done == known.total:
                    bar.close()

        return tell

    def _check_prompts(self, model: CausalLM, test_sets: Iterable[TestSet]) -> None:
        """Refuse prompts that fill the model's positions; say where it has no room for its answer."""
        wanted = self.generation.max_new_tokens
        for tests in test_sets:
            left = position_limit(model, tests.longest, tests.benchmark.name) - tests.longest
            if left < wanted:
                rank_zero_warn(
                    f"{tests.benchmark.name or 'test'}: completions end after {left} tokens, not {wanted}"
                    f" (--model.generation.max_new_tokens): the longest prompt, of {tests.longest} tokens, leaves the"
                    " model no more positions"
                )

    def start(self, test_sets: Sequence[TestSet], device: torch.device, processes: int) -> None:
        """Start the sums of every loader.

        Args:
            test_sets: What each loader's prompts belong to.
            device: Where the sums are kept.
            processes: Of this machine, which share its cores for grading.
        """
        judge().share(processes)
        self._doubts = Doubts()
        self._sums = [
            ExampleSums(len(tests.sources) or 1, len(figure_names(tests.benchmark.grader, self.generation.samples))).to(
                device
            )
            for tests in test_sets
        ]

    def grade(self, samples: Samples, batch: Batch, tests: TestSet, loader: int) -> None:
        """Grade the completions of a batch and add them up.

        Args:
            samples: Of each prompt.
            batch: ``example_id``, ``gold`` and ``record`` of each.
            tests: What the prompts belong to.
            loader: Number of the loader.
        """
        grader, n = tests.benchmark.grader, self.generation.samples
        names = ("example_id", "gold", "record")
        items: list[Item] = []
        places = []
        for completions, id, gold, record in _rows(samples, batch, names):
            items += [Item(f"example {id}", one.text, one.truncated, gold, record) for one in completions]
            places.append(tests.place(record))
        grades = grade_all(grader, items, n > 1, self._doubts)
        for i, place in enumerate(places):
            self._sums[loader].update(place, figures(grader, grades[n * i : n * (i + 1)]))

    def results(self, test_sets: Sequence[TestSet]) -> list[dict[str, float]]:
        """Return the figures of every loader's prompts, over all ranks."""
        figures = []
        for tests, sums in zip(test_sets, self._sums, strict=True):
            own = summary(sums.compute().tolist(), tests.benchmark.grader, self.generation.samples, tests.sources)
            if tests.skipped:
                own["skipped_prompts"] = float(tests.skipped)
            figures.append(own)
        return figures

    def report(self, test_sets: Sequence[TestSet], log: Callable[..., None], rank: int, ranks: int) -> None:
        """Log the figures of every loader's prompts over all ranks, and print them as one table.

        Args:
            test_sets: What each loader's prompts belong to.
            log: Logs a value under a name.
            rank: Of this process.
            ranks: How many there are.
        """
        if str(self._doubts):
            where = f" (rank {rank})" if ranks > 1 else ""
            warnings.warn(f"test{where}: {self._doubts}", stacklevel=2)
        results = self.results(test_sets)
        for tests, own in zip(test_sets, results, strict=True):
            for name, value in own.items():
                log(f"{tests.prefix}{name}", value, sync_dist=True)
        named = {tests.benchmark.name: own for tests, own in zip(test_sets, results, strict=True)}
        if any(named) and rank == 0:
            print(f"\n{table(named)}")  # a bar stands on the line


def prediction_records(samples: Samples, batch: Batch, tests: TestSet) -> list[dict[str, Any]]:
    """Return one record a prompt: what grading it later needs.

    Args:
        samples: Of each prompt.
        batch: ``example_id``, ``prompt``, ``gold`` and ``record`` of each.
        tests: What the prompts belong to.
    """
    benchmark = tests.benchmark.path or tests.benchmark.name
    records = []
    for completions, id, prompt, gold, record in _rows(samples, batch, ("example_id", "prompt", "gold", "record")):
        one: JsonObject = {"benchmark": benchmark} if benchmark else {}
        one |= {"id": id, "prompt": prompt, "completions": [c.text for c in completions], "gold": gold}
        one |= {"truncated": [c.truncated for c in completions]}
        records.append({**one, "record": record} if record else one)
    return records


def _rows(samples: Samples, batch: Batch, names: Sequence[str]) -> Iterable[tuple[Any, ...]]:
    """Pair completions with fields of the batch; a filler has none."""
    return zip(samples, *(batch[name] for name in names), strict=not batch.get("filler"))
