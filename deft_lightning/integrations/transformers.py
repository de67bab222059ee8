"""Token objectives inside ``transformers.Trainer`` and what derives from it (TRL's SFTTrainer)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX, token_loss
from deft_lightning.objectives import Objective


def compute_loss_func(objective: Objective) -> Callable[..., Tensor]:
    """Return a ``compute_loss_func`` for ``transformers.Trainer``.

    The trainer passes ``num_items_in_batch``, the label tokens of the whole optimizer step, so the mean is exact over
    accumulation. Logits are dense here; the fused head belongs to :class:`deft_lightning.SFTModule`.

    Args:
        objective: Any token objective that does not depend on the course of training.

    Returns:
        ``f(outputs, labels, num_items_in_batch=None) -> scalar``: the summed loss divided by ``num_items_in_batch``, or
        by the supervised tokens of the batch when it is None. ``labels`` of shape ``(B, T)`` are shifted here.

    Raises:
        UserError: The objective has to be told how far the run is, which this trainer does not do.
    """
    if objective.scheduled or objective.tracks is not None:
        raise UserError(f"compute_loss_func: {objective!r} depends on the course of training: train with SFTModule")

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        targets = labels[:, 1:].to(logits.device)
        total = token_loss(logits[:, :-1], targets, objective).sum()
        count = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORE_INDEX).sum().clamp_min(1)
        return total / count

    return loss
