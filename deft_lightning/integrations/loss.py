"""The loss of another trainer: an objective over the logits that the model gave."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX, TokenStats, supervised_stats, weighted_loss
from deft_lightning.integrations.run import CALLBACK, ObjectiveRun
from deft_lightning.objectives import Objective
from deft_lightning.objectives.parse import as_objective


class ObjectiveLoss:
    """What :func:`compute_loss_func` returns: the mean of an objective over the label tokens of an optimizer step.

    Args:
        objective: Any objective that this trainer can give what it looks at, or its name.
        label_counts: How often each token is a label of the training data, shape ``(n,)``; None to have them counted.

    Attributes:
        run: Where the run stands.

    Raises:
        UserError: The objective looks at something that this trainer does not give.
    """

    def __init__(self, objective: Objective | str, label_counts: Tensor | None = None) -> None:
        objective = as_objective(objective)
        needs = objective.needs
        if needs.reference:
            raise UserError(f"compute_loss_func: {objective!r} needs a reference model, which only SFTModule runs")
        if {"unprompted", "best"} & {needs.chance, needs.answer_chance}:
            raise UserError(
                f"compute_loss_func: {objective!r} compares with the model's probability of answers without "
                "their prompts, which only SFTModule computes; here use Contaminated(answer_chance='least')"
            )
        self.run = ObjectiveRun(objective, None if label_counts is None else torch.as_tensor(label_counts))
        self._checked = False

    @property
    def objective(self) -> Objective:
        """Return the one that trains."""
        return self.run.objective

    def __call__(
        self,
        outputs: Any,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        token_weight: Tensor | None = None,
        source: Tensor | None = None,
    ) -> Tensor:
        """Return the sum of the objective over the label tokens, divided by those of the optimizer step.

        Args:
            outputs: Of the model, with ``logits`` of shape ``(B, T, V)``.
            labels: Shape ``(B, T)``, shifted here; -100 where nothing is learnt.
            num_items_in_batch: Label tokens of the step on all ranks, a scalar; None divides by those of the batch.
            token_weight: Shape ``(B, T)``, the factor on each token's loss.
            source: Shape ``(B,)`` or ``(B, T)``: place of a row's or a token's source in ``objective.sources``, -1 for
                none of them.

        Raises:
            UserError: Logits and labels do not fit, or the objective lacks what it looks at.
        """
        stats, logits, keep = self.measured(outputs, labels, token_weight, source)
        divisor = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=logits.device)
        if divisor is not None and divisor.ndim:
            raise UserError("compute_loss_func: start one process per device (torchrun), not one for all")
        total = weighted_loss(self.run.current, stats).sum()
        own = torch.full((), len(stats.log_prob), device=total.device) if stats.weight is None else stats.weight.sum()
        if torch.is_grad_enabled():
            self.run.add(stats.detach(), logits, keep, divisor)
            if (aux := _field(outputs, "aux_loss")) is not None:
                if not isinstance(aux, Tensor):  # 0 where transformers has recorded no router
                    raise UserError(
                        "compute_loss_func: the model gives no auxiliary loss though output_router_logits is set: leave"
                        " it out, or take a newer transformers"
                    )
                total = total + self._router_factor() * own * aux
        else:
            self.run.add_evaluated(stats)
        count = own if divisor is None else divisor
        return total / torch.where(count > 0, count, 1)

    def measured(
        self, outputs: Any, labels: Tensor | None, token_weight: Tensor | None = None, source: Tensor | None = None
    ) -> tuple[TokenStats, Tensor, Tensor]:
        """Return the statistics of the N label tokens of a batch, as the objective looks at them.

        The arguments are those of the call. Beside them are the logits that predict a label, shape ``(B, T - 1, V)``,
        and which of them count, shape ``(B, T - 1)``.
        """
        logits = _field(outputs, "logits")
        if labels is None or logits is None:
            raise UserError(f"compute_loss_func: the batch has no {'labels' if labels is None else 'logits'}")
        if logits.shape[:-1] != labels.shape:
            raise UserError(
                f"compute_loss_func: logits of shape {tuple(logits.shape[:-1])} do not fit labels of shape"
                f" {tuple(labels.shape)}; virtual tokens (prompt tuning) and parts of a row are not supported"
            )
        labels, current = labels.to(logits.device), self.run.current
        targets = labels[:, 1:]
        keep = targets != IGNORE_INDEX
        context = self.run.context(self._batch(labels, token_weight), logits.shape[-1])
        if current.sources:
            context = context._replace(source=self._sources(source, labels))
        logits = logits[:, :-1]
        stats = supervised_stats(logits, targets, topk=current.topk).within(context.select(keep))
        return stats, logits, keep

    def _batch(self, labels: Tensor, token_weight: Tensor | None) -> dict[str, Any]:
        batch = {"labels": labels, "segment": segments(labels, self.run.position_ids)}
        return batch if token_weight is None else {**batch, "token_weight": token_weight.to(labels.device)}

    def _sources(self, source: Tensor | None, labels: Tensor) -> Tensor:
        """Return the source of each label from 1 on, shape ``(B, T - 1)``."""
        known = self.objective.sources
        if source is None:
            raise UserError(
                f"compute_loss_func: {self.objective!r} needs the source of each row: put TokenWeights before "
                "Trainer among the base classes, and add a column `source`, the index in "
                f"{', '.join(known)} (-1: neither)"
            )
        source = source.to(labels.device)
        if source.shape not in (labels.shape, labels.shape[:1]):
            raise UserError("compute_loss_func: expected one source per row, or one per label")
        if not self._checked and not bool(((source >= -1) & (source < len(known))).all()):
            raise UserError(f"compute_loss_func: source must be -1 or an index in {', '.join(known)}, from 0")
        self._checked = True
        whole = source if source.shape == labels.shape else source.unsqueeze(1).expand_as(labels)
        return whole[:, 1:]

    def _router_factor(self) -> float:
        if self.run.router_factor is None:
            raise UserError(f"compute_loss_func: a mixture of experts has a loss of its router: add {CALLBACK}")
        return self.run.router_factor


def segments(labels: Tensor, position_ids: Tensor | None) -> Tensor:
    """Return the example of each token, shape ``(B, T)``, numbered over the batch.

    Args:
        labels: Shape ``(B, T)``.
        position_ids: Shape ``(B, T)`` or ``(1, T)``: an example begins where they do not go on; None where each row is
            one.
    """
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, 0] = True
    if position_ids is not None:
        if position_ids.ndim != 2:
            raise UserError(
                f"compute_loss_func: position_ids of shape {tuple(position_ids.shape)} do not separate the examples"
            )
        starts[:, 1:] |= (position_ids.diff(dim=1) != 1).to(labels.device)
    return starts.flatten().cumsum(0).view_as(labels) - 1


def _field(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, dict) else getattr(outputs, name, None)
