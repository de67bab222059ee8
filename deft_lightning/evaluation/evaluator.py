"""What `test` and `predict` do with a module that generates."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any

from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn

from deft_lightning.errors import UserError
from deft_lightning.evaluation.aggregate import figure_names, figures, summary, table
from deft_lightning.evaluation.benchmarks import TestSet
from deft_lightning.evaluation.generate import Completion, Generation, position_limit
from deft_lightning.evaluation.graders.judge import judge
from deft_lightning.evaluation.grading import Doubts, Item, grade_all
from deft_lightning.metrics import ExampleSums


class Tested(LightningModule):
    """Grades completions of test prompts, and writes predictions that can be graded later.

    Attributes:
        generation: How completions are generated.
        model: The Hugging Face model that generates them.
    """

    generation: Generation
    model: Any

    @abstractmethod
    def generate(self, batch: dict[str, Any], longest: int = 0) -> list[list[Completion]]:
        """Return the samples of each prompt of a batch; nothing for a filler. No prompt is longer than the longest."""

    def _test_sets(self) -> list[TestSet]:
        """What each loader's prompts belong to."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise UserError("test needs the data module: it knows the prompts and who grades them")
        found: list[TestSet] = data.test_sets
        return found

    def _check_prompts(self) -> None:
        """Refuse now what would stop the run at its longest prompt; say where the model has no room for its answer."""
        for tests in self._test_sets():
            left = position_limit(self.model, tests.longest, tests.benchmark.name) - tests.longest
            if left < (wanted := self.generation.max_new_tokens):
                rank_zero_warn(
                    f"{tests.benchmark.name or 'test'}: completions end after {left} tokens, not {wanted}"
                    f" (--model.generation.max_new_tokens): the longest prompt, of {tests.longest} tokens, leaves the"
                    " model no more positions"
                )

    def on_predict_start(self) -> None:
        """Check the prompts."""
        self._check_prompts()

    def on_test_start(self) -> None:
        """Check the prompts, and start the sums of every loader."""
        self._check_prompts()
        n = self.generation.samples
        judge().share(self.trainer.num_devices)
        self._doubts = Doubts()
        self._sums = [
            ExampleSums(len(tests.sources) or 1, len(figure_names(tests.benchmark.grader, n))).to(self.device)
            for tests in self._test_sets()
        ]

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Generate and grade."""
        tests, sums = self._test_sets()[dataloader_idx], self._sums[dataloader_idx]
        grader, votes = tests.benchmark.grader, self.generation.samples > 1
        names = ("example_id", "gold", "record")
        rows = zip(
            self.generate(batch, tests.longest), *(batch[name] for name in names), strict=not batch.get("filler")
        )
        items: list[Item] = []
        places = []
        for samples, id, gold, record in rows:
            items += [Item(f"example {id}", s.text, s.truncated, gold, record) for s in samples]
            places.append(tests.place(record))
        grades, n = grade_all(grader, items, votes, self._doubts), self.generation.samples
        for i, place in enumerate(places):
            sums.update(place, figures(grader, grades[n * i : n * (i + 1)]))

    def on_test_epoch_end(self) -> None:
        """Log the figures of every loader's prompts over all ranks, and print them as one table."""
        if str(self._doubts):
            rank = f" (rank {self.global_rank})" if self.trainer.world_size > 1 else ""
            warnings.warn(f"test{rank}: {self._doubts}", stacklevel=2)
        results = {}
        for tests, sums in zip(self._test_sets(), self._sums, strict=True):
            found = summary(sums.compute().tolist(), tests.benchmark.grader, self.generation.samples, tests.sources)
            if tests.skipped:
                found["skipped_prompts"] = float(tests.skipped)
            for name, value in found.items():
                self.log(f"{tests.prefix}{name}", value, sync_dist=True)
            results[tests.benchmark.name] = found
        if any(results) and self.trainer.is_global_zero:
            print(f"\n{table(results)}")  # a bar stands on the line

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Return one record a prompt: what grading it later needs."""
        tests = self._test_sets()[dataloader_idx]
        named = tests.benchmark.path or tests.benchmark.name
        names = ("example_id", "prompt", "gold", "record")
        rows = zip(
            self.generate(batch, tests.longest), *(batch[name] for name in names), strict=not batch.get("filler")
        )
        records = []
        for samples, id, prompt, gold, record in rows:
            found: dict[str, Any] = {"benchmark": named} if named else {}
            found |= {"id": id, "prompt": prompt, "completions": [s.text for s in samples], "gold": gold}
            found |= {"truncated": [s.truncated for s in samples]}
            records.append({**found, "record": record} if record else found)
        return records
