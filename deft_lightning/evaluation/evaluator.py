"""What `test` and `predict` do with completions: grade them, or write down what grading them later needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from deft_lightning.annotations import Batch, CausalLM, JsonObject, Tokenizer
from deft_lightning.evaluation.aggregate import figure_names, figures, summary, table
from deft_lightning.evaluation.benchmarks import TestSet
from deft_lightning.evaluation.generate import Completion, Generation, complete, position_limit
from deft_lightning.evaluation.graders.judge import judge
from deft_lightning.evaluation.grading import Doubts, Item, grade_all
from deft_lightning.metrics import ExampleSums

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

    def complete(
        self, model: CausalLM, tokenizer: Tokenizer, batch: Batch, stops: Sequence[int], **how: Any
    ) -> Samples:
        """Complete the left-padded prompts of a batch: :func:`~deft_lightning.evaluation.generate.complete`."""
        samples = complete(model, tokenizer, batch, self.generation, stops, **how)
        return [] if batch.get("filler") else samples

    def check_prompts(self, model: CausalLM, test_sets: Iterable[TestSet]) -> None:
        """Refuse now what would stop the run at its longest prompt; say where the model has no room for its answer.

        Args:
            model: The Hugging Face model that generates.
            test_sets: What each loader's prompts belong to.

        Raises:
            UserError: A prompt fills the model's positions.
        """
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
