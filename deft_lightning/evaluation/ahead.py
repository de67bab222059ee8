"""The prompts that a loader of `test` or `predict` is going to give this rank, before it gives them."""

from __future__ import annotations

from typing import Any

from deft_lightning.evaluation.completions import Ask


def asks_ahead(trainer: Any, loader: int) -> list[Ask]:
    """Return the prompts of a loader that this rank will be given, in their order; none where that is not known.

    Args:
        trainer: That tests or predicts.
        loader: Number of the loader.
    """
    loaders, batches = (
        (trainer.predict_dataloaders, trainer.num_predict_batches)
        if trainer.predicting
        else (trainer.test_dataloaders, trainer.num_test_batches)
    )
    one = loaders[loader] if isinstance(loaders, list | tuple) else loaders
    sampler = getattr(one, "batch_sampler", None)
    order, size = getattr(sampler, "sampler", None), getattr(sampler, "batch_size", None)
    if order is None or size is None or not isinstance(rows := one.dataset, list):
        return []
    positions = list(order)[: int(batches[loader]) * size]
    if not all(hasattr(rows[at], "id") and hasattr(rows[at], "input_ids") for at in positions):
        return []
    return [Ask(rows[at].id, list(rows[at].input_ids)) for at in positions]
