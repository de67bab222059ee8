"""Token objectives inside ``transformers.Trainer`` and what derives from it (TRL's SFTTrainer)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
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
        ``f(outputs, labels, num_items_in_batch=None, token_weight=None) -> scalar``: the summed loss divided by
        ``num_items_in_batch``, or by the supervised tokens of the batch when it is None. ``labels`` of shape ``(B, T)``
        are shifted here, and so is ``token_weight`` of the same shape, the factor on each token's loss: with it the
        divisor is to be the sum of the weights, and is that of the batch when it is None. The trainer itself does not
        pass it on; :class:`TokenWeights` makes it.

    Raises:
        UserError: The objective has to be told how far the run is, or compares with a reference model: this trainer
            does neither.
    """
    if objective.scheduled or objective.tracks is not None:
        raise UserError(f"compute_loss_func: {objective!r} depends on the course of training: train with SFTModule")
    if objective.needs.reference:
        raise UserError(f"compute_loss_func: {objective!r} needs a reference model, which only SFTModule runs")

    def loss(
        outputs: Any,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        token_weight: Tensor | None = None,
    ) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        targets = labels[:, 1:].to(logits.device)
        shifted = None if token_weight is None else token_weight[:, 1:].to(logits.device)
        total = token_loss(logits[:, :-1], targets, objective, token_weight=shifted).sum()
        count = num_items_in_batch if num_items_in_batch is not None else _counted(labels, token_weight)
        return total / torch.where(torch.as_tensor(count) > 0, count, 1)

    return loss


class TokenWeights:
    """Before ``transformers.Trainer`` among the bases of a trainer: batches may have ``token_weight``.

    The loss of :func:`compute_loss_func` gets it, and a step is divided by the sum of its weights over accumulation and
    devices. ``TrainingArguments(label_names=["labels", "token_weight"])`` keeps the column in the batches.

    Example:
        >>> from transformers import Trainer
        >>> class WeightedTrainer(TokenWeights, Trainer): ...
    """

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss with the weights of the batch."""
        this: Any = self
        inputs = dict(inputs)
        weight, plain = inputs.pop("token_weight", None), this.compute_loss_func
        this.compute_loss_func = plain if weight is None else partial(plain, token_weight=weight)
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            this.compute_loss_func = plain

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the batches of a step and the sum of their weights."""
        this: Any = self
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if count is None or not any("token_weight" in batch for batch in batches):
            return batches, count
        if this.args.n_gpu > 1:
            raise UserError("token_weight: start one process a device (torchrun), not one for all of them")
        total = (
            torch.stack([_counted(batch["labels"], batch.get("token_weight")) for batch in batches]).sum().to(device)
        )
        if this.args.average_tokens_across_devices and this.args.world_size > 1:
            total = this.accelerator.gather(total).sum()
        return batches, total.float()


def _counted(labels: Tensor, weight: Tensor | None) -> Tensor:
    """Return the sum of the weights of the labels that have something before them, in float64."""
    learnt = labels[:, 1:] != IGNORE_INDEX
    return (learnt if weight is None else learnt * weight[:, 1:]).sum(dtype=torch.float64)
