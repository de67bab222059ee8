"""Token objectives inside ``transformers.Trainer`` and what derives from it (TRL's SFTTrainer)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX
from deft_lightning.integrations.loss import ObjectiveLoss
from deft_lightning.objectives import Objective

BESIDE_LABELS = ("token_weight", "source")  # of a batch: what the loss gets and the model does not


def compute_loss_func(objective: Objective | str, label_counts: Tensor | None = None) -> ObjectiveLoss:
    """Return a ``compute_loss_func`` for ``transformers.Trainer``.

    The trainer passes ``num_items_in_batch``, the label tokens of the whole optimizer step, so the mean is exact over
    accumulation and devices. Logits are dense here; the fused head belongs to :class:`deft_lightning.SFTModule`.

    An objective that changes as training goes on (`Schedule`, `Rescaled`, `Contaminated`) needs a
    :class:`~deft_lightning.integrations.GateCallback` among the trainer's callbacks, which tells it the step.

    Args:
        objective: Any token objective, or its name, that needs neither a reference model nor the chance of answers
            without their prompts.
        label_counts: How often each token is a label of the training data, shape ``(n,)``, for objectives that compare
            with word frequencies; None to have the callback count when training begins, which a stream does not allow.

    Returns:
        ``f(outputs, labels, num_items_in_batch=None, token_weight=None, source=None) -> scalar``: the summed loss
        divided by ``num_items_in_batch``, or by the supervised tokens of the batch when it is None. ``labels`` of shape
        ``(B, T)`` are shifted here, and so is ``token_weight`` of the same shape, the factor on each token's loss: with
        it the divisor is to be the sum of the weights, and is that of the batch when it is None. The trainer itself
        passes on neither that nor the ``source`` that `BySource` looks at; :class:`TokenWeights` makes it.

    Raises:
        UserError: The objective compares with a reference model, or with answers without their prompts: this trainer
            has neither.
    """
    return ObjectiveLoss(objective, label_counts)


class TokenWeights:
    """Before ``transformers.Trainer`` among the bases of a trainer: batches may have ``token_weight`` and ``source``.

    The loss of :func:`compute_loss_func` gets them, and a step is divided by the sum of its weights over accumulation
    and devices. ``TrainingArguments(label_names=["labels", "token_weight"])`` keeps the column in the batches.
    ``source`` is a row's place among ``objective.sources``, for `BySource`.

    Example:
        >>> from transformers import Trainer
        >>> class WeightedTrainer(TokenWeights, Trainer): ...
    """

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss with the weights and sources of the batch."""
        this: Any = self
        inputs = dict(inputs)
        beside, plain = {name: inputs.pop(name) for name in BESIDE_LABELS if name in inputs}, this.compute_loss_func
        this.compute_loss_func = partial(plain, **beside) if beside else plain
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
            raise UserError("token_weight: start one process per device (torchrun), not one for all")
        total = (
            torch.stack([_counted(batch["labels"], batch.get("token_weight")) for batch in batches]).sum().to(device)
        )
        if this.args.average_tokens_across_devices and this.args.world_size > 1:
            total = this.accelerator.gather(total).sum()
        return batches, total.float()


class OneForward:
    """Before TRL's ``SFTTrainer`` among the bases of a trainer: a micro-batch takes one forward pass, not two.

    Beside a ``compute_loss_func`` SFTTrainer runs the model once for the loss and once more, without gradient, for its
    own `entropy`, `mean_token_accuracy` and `num_tokens`. Here these are left out; the loss is the same.

    Example:
        >>> from trl import SFTTrainer  # doctest: +SKIP
        >>> class FastTrainer(OneForward, SFTTrainer): ...  # doctest: +SKIP
    """

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as transformers' own trainer does."""
        from transformers import Trainer

        this: Any = self
        # As SFTTrainer has it: packed rows are kept apart only without a cache, and experts tell their router's loss.
        inputs = {**inputs, "use_cache": False}
        if getattr(this, "aux_loss_enabled", False):
            inputs["output_router_logits"] = True
        return Trainer.compute_loss(this, model, inputs, *args, **kwargs)


def _counted(labels: Tensor, weight: Tensor | None) -> Tensor:
    """Return the sum of the weights of the labels that have something before them, in float64."""
    learnt = labels[:, 1:] != IGNORE_INDEX
    return (learnt if weight is None else learnt * weight[:, 1:]).sum(dtype=torch.float64)
