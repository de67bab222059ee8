"""Prompts to generate for: of held-out examples, or of rows of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from deft_lightning.data.encoding.encode import ALL, prompts
from deft_lightning.data.encoding.supervise import Teaching
from deft_lightning.data.examples import Example, Prompt
from deft_lightning.data.prepared.ids import unique_ids
from deft_lightning.data.prepared.recipe import Recipe, read_examples, title
from deft_lightning.data.sources.rows import BadRows
from deft_lightning.errors import UserError
from deft_lightning.evaluation.benchmarks import TestSet


def read_all(recipe: Recipe, need_response: bool) -> list[Example]:
    """Return every example of a recipe's source under a unique id.

    Args:
        recipe: Says which rows, and whether bad ones are skipped.
        need_response: Refuse conversations without one.

    Raises:
        UserError: A row that cannot be used, or none is left.
    """
    bad = BadRows()
    rows = list(read_examples(recipe.source, recipe, recipe.skip(bad), need_response=need_response))
    if len(bad):
        rank_zero_warn(f"{title(recipe.source)}: skipped {len(bad)} rows; the first: {bad.first[0]}")
    if not rows:
        raise UserError(f"{title(recipe.source)}: no usable row; the first problem: {bad.first[0]}")
    renamed = unique_ids(lambda: (row.id for row in rows), lambda at: rows[at].digest)
    return [replace(row, id=renamed[at]) if at in renamed else row for at, row in enumerate(rows)]


def prompts_of(
    tokenizer: Any, examples: Iterable[Example], need_response: bool, teaching: Teaching = ALL
) -> list[Prompt]:
    """Return the prompts of examples.

    Args:
        tokenizer: With its chat template.
        examples: Those that are conversations have one.
        need_response: Refuse those whose right answer is not known.
        teaching: As the training rows are read.

    Raises:
        UserError: There is none, or a response is lacking.
    """
    ready = prompts(tokenizer, list(examples), teaching)
    if not ready:
        raise UserError(
            "nothing to generate for: there are no held-out conversations; set --data.test_source or"
            " --data.validation_fraction"
        )
    if need_response and any(prompt.gold is None for prompt in ready):
        raise UserError("test needs a response in every row (--data.test_source); predict does not")
    return ready


def fitting(tests: TestSet, ready: list[Prompt], positions: int | None) -> tuple[TestSet, list[Prompt]]:
    """Leave out the prompts after which the model has no position to write at, and say so.

    Every rank reads all prompts, and so leaves out the same.

    Args:
        tests: What the prompts belong to.
        ready: The prompts.
        positions: Of the model; None where nothing limits them.

    Returns:
        The set, with its longest prompt and how many were left out; and the prompts that are left.

    Raises:
        UserError: None is left.
    """
    kept = [prompt for prompt in ready if positions is None or len(prompt.input_ids) < positions]
    if len(kept) < len(ready):
        first = next(prompt for prompt in ready if positions is not None and len(prompt.input_ids) >= positions)
        named = tests.benchmark.name
        problem = (
            f"{named or 'test'}: skipped {len(ready) - len(kept)} of {len(ready)} prompts, which fill the model's"
            f" {positions} positions; the first: {first.id!r}, of {len(first.input_ids)} tokens"
            f" ({f'the rows of {named} in --data.benchmarks' if named else '--data.test_source'})"
        )
        if not kept:
            raise UserError(f"{problem}; there is nothing left to generate for")
        rank_zero_warn(problem)
        tests = replace(tests, skipped=len(ready) - len(kept))
    return replace(tests, longest=max(len(prompt.input_ids) for prompt in kept)), kept
