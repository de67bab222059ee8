"""What is refused of a batch, and where its labels are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX


def places_of(batch: dict[str, Any]) -> Tensor | None:
    """Return the places of the labels that count, where the batch says them; on a CPU a look at them costs nothing."""
    if batch["labels"].device.type == "cpu":
        check_places(batch)
    places: Tensor | None = batch.get("supervised_at")
    return places


def check_places(batch: dict[str, Any]) -> None:
    """Refuse places that are not those of the labels, as where somebody changes labels of a batch that is made.

    Raises:
        UserError: They are not.
    """
    labels, places = batch["labels"], batch.get("supervised_at")
    if places is None:
        return
    learnt = labels != IGNORE_INDEX
    learnt[:, 0] = False
    if not torch.equal(learnt.flatten().nonzero().squeeze(1), places):
        raise UserError(
            "supervised_at of the batch is not where its labels are: leave it out, or change it with labels"
        )


def check_weight(weight: Tensor, labels: Tensor, values: bool = True) -> None:
    """Refuse weights that are none; a look at their values is one that CUDA waits for.

    Raises:
        UserError: There is not one for each label, or, where ``values`` count, one is not finite or below 0.
    """
    fits = weight.shape == labels.shape
    if not fits or (values and not bool((torch.isfinite(weight) & (weight >= 0)).all())):
        raise UserError("token_weight of the batch: want finite numbers of at least 0, one for each label")
