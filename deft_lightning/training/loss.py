"""From a batch to the terms of its loss: the model, its head, the objective, the router of a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX, TokenStats, supervised_stats, weighted_loss
from deft_lightning.metrics import TokenSources
from deft_lightning.models import (
    HeadSeam,
    Reference,
    base_causal_lm,
    check_causal,
    check_head,
    check_packing,
    fused_forward,
)
from deft_lightning.models.unprompted import UnpromptedReader
from deft_lightning.objectives import Needs, Objective
from deft_lightning.objectives.context import ContextSource
from deft_lightning.ops import ColumnSparsity
from deft_lightning.training.batch_checks import check_places, check_weight, places_of


class NoObjective(NamedTuple):
    """Stands in for an objective where the statistics alone are wanted.

    Attributes:
        topk: How many of the largest probabilities the entropy of the largest covers; 0 for none.
    """

    topk: int

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return the plain NLL, which nobody reads."""
        return -stats.log_prob


class RouterLoss(NamedTuple):
    """Auxiliary loss of a mixture of experts.

    Attributes:
        mean: As the model gives it, a scalar.
        weighted: Times its factor and what the supervised tokens count: what is added to the sum of the objective.
    """

    mean: Tensor
    weighted: Tensor


class StepOutput(NamedTuple):
    """What one micro-batch gives.

    Attributes:
        loss: Sum of the objective over the N supervised tokens, each times its weight where the batch has weights;
            without any token, a zero that is part of the graph.
        stats: Their detached statistics, with the weights.
        keep: Shape ``(B, T - 1)``: the positions whose next token is supervised.
        router: The router's loss, None where the model has none.
    """

    loss: Tensor
    stats: TokenStats
    keep: Tensor
    router: RouterLoss | None = None

    @property
    def total(self) -> Tensor:
        """Return what is differentiated: objective and router together."""
        return self.loss if self.router is None else self.loss + self.router.weighted


class BatchLoss:
    """Turns batches into the terms of their loss; the first one is checked before anything is trained.

    Args:
        model: The Hugging Face model, as trained.
        seam: Its head, where that is fused; None for the model's own.
        router_factor: Factor on the auxiliary loss of a mixture of experts, None where the model has none.

    Attributes:
        checked: Whether a batch was checked.
        context: Says what is known of the tokens of a batch beside the model's prediction; by default nothing but what
            the batch itself says.
        reference: What predictions are compared with, None for nothing.
        forgetting: Whether batches without gradient are compared, whatever the objective.
        unprompted: Reads answers without their prompts.
        watching: Whether callbacks look at the batch at hand.
    """

    def __init__(self, model: Any, seam: HeadSeam | None, router_factor: float | None) -> None:
        self.model, self.seam, self.router_factor = model, seam, router_factor
        self.context = ContextSource()
        self.reference: Reference | None = None
        self.checked = self.forgetting = self.watching = False
        self.unprompted = UnpromptedReader(model, seam)

    @property
    def sparsity(self) -> ColumnSparsity | None:
        """Return what the head is asked to leave out; None for nothing."""
        return None if self.seam is None else self.seam.sparsity

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        known = "" if self.reference is None else self.reference.fingerprint
        alone = {} if self.unprompted.alone is None else {"unprompted_alone": self.unprompted.alone}
        return {**self.context.state_dict(), **({"began_from": known} if known else {}), **alone}

    def load_state_dict(self, state: Mapping[str, Any], pretrained: str | None) -> None:
        """Go on from a checkpoint.

        Args:
            state: What it holds.
            pretrained: Name of the model that this run was made with, None where it has none.
        """
        self.context.load_state_dict(state)
        self.unprompted.alone = state.get("unprompted_alone")
        if self.reference is not None:
            self.reference.check(state.get("began_from"), pretrained)

    def __call__(self, batch: dict[str, Any], current: Objective, instead: NoObjective | None = None) -> StepOutput:
        """Return the terms of a batch.

        Args:
            batch: ``input_ids`` and ``labels`` of shape ``(B, T)``, right-padded; ``labels[:, t]`` is what the model
                should have said before token t, -100 where nothing is learnt. ``position_ids`` that start again keep
                examples of a packed row apart. ``token_weight``, if it is there, of the same shape: the factor on the
                loss of each label, finite and at least 0. ``supervised_at``, if it is there, shape ``(N,)``: the
                places of the labels that count, among all ``B * T``.
            current: The objective in force.
            instead: Stands in for it where the statistics alone are wanted.

        Raises:
            UserError: A first batch on which the objective would not be what trains.
        """
        if not self.checked:
            self._check(batch, current)
            self.checked = True
        # A callable of statistics with `topk`: all that the head asks of an objective.
        objective: Any = current if instead is None else instead
        targets = batch["labels"][:, 1:]
        keep, places = targets != IGNORE_INDEX, places_of(batch)
        batch = self._asked(batch, complete=instead is None)
        context = self.context(batch, complete=instead is None)
        predictions = self.context.prediction_sum if torch.is_grad_enabled() else None
        inputs, reference = self._inputs(batch), self._reference(objective)
        if self.seam is None:
            beside = None if reference is None else reference.logits(inputs)[:, :-1][keep]
            output = self.model(**inputs)
            logits, learnt = output.logits[:, :-1], targets
            if beside is not None:  # of a reference no more than what is compared is kept while the model runs
                logits, learnt = logits[keep], targets[keep]
            stats = supervised_stats(logits, learnt, topk=objective.topk, reference_logits=beside)
            stats = stats.within(context.select(keep))
            if predictions is not None:
                predictions += logits.detach()[learnt != IGNORE_INDEX].float().softmax(-1).sum(0)
            loss, aux = weighted_loss(objective, stats).sum(), getattr(output, "aux_loss", None)
        else:
            shifted = torch.nn.functional.pad(targets, (0, 1), value=IGNORE_INDEX)
            context = context.map(lambda field: torch.nn.functional.pad(field, (0, 1)))
            given = (self.model, self.seam, inputs, shifted, objective, context, predictions)
            with nullcontext() if reference is None else reference.compared(inputs) as head:
                loss, stats, aux = fused_forward(*given, head, None if places is None else places - 1)
        return StepOutput(loss, stats.detach(), keep, self._router(aux, stats))

    def _asked(self, batch: dict[str, Any], complete: bool) -> dict[str, Any]:
        """Return a batch with what the model says of its answers without their prompts, if somebody looks at that.

        ``unprompted``, shape ``(B, T)``, is ``log q`` of each label that was read, below 0; 0 for the rest of a long
        answer, which is no evidence then; NaN for an answer that has no prompt.
        """
        wanted = (complete and self.context.trains_on_unprompted) or (self.watching and self.context.unprompted)
        if not wanted or "unprompted" in batch or "unprompted_ids" not in batch:
            return batch
        found, places = self.unprompted(batch).clamp_max(-torch.finfo(torch.float32).eps), batch["unprompted_at"]
        prompted = batch["has_prompt"][batch["segment"].clamp_min(0)]
        values = torch.where(prompted, torch.zeros(places.shape, dtype=found.dtype, device=found.device), torch.nan)
        return {**batch, "unprompted": values.masked_scatter(places, found)}

    def _reference(self, objective: Any) -> Reference | None:
        """Return the reference where it is asked for: by the objective, or where forgetting is measured."""
        needs: Needs | None = getattr(objective, "needs", None)  # None where the statistics alone are wanted
        wanted = needs is not None and (needs.reference or (self.forgetting and not torch.is_grad_enabled()))
        if not wanted:
            return None
        if self.reference is None:
            raise UserError(f"{objective!r}: the model was built without a reference; make a new module to train it")
        self.reference.follow(self.model)
        return self.reference

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        # No attention mask: behind right padding causal attention cannot see it, and SDPA takes its fast path. A
        # router would count the padding.
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
        if "position_ids" in batch:
            inputs["position_ids"] = batch["position_ids"]
        elif self.router_factor is not None:
            inputs["attention_mask"] = batch.get("attention_mask")
        return inputs

    def _router(self, aux: Tensor | int | None, stats: TokenStats) -> RouterLoss | None:
        if self.router_factor is None:
            return None
        if not isinstance(aux, Tensor):  # 0 where transformers has recorded no router, as below 5.18 in Granite MoE
            raise UserError(
                f"{type(base_causal_lm(self.model)).__name__} gives no auxiliary loss though its config says"
                " output_router_logits; set it to false (--model.architecture.output_router_logits false)"
            )
        # The step is divided by the same count: the router's share of the gradient stays its factor.
        count = len(stats.log_prob) if stats.weight is None else stats.weight.sum()
        return RouterLoss(aux.detach(), self.router_factor * count * aux)

    def _check(self, batch: dict[str, Any], current: Objective) -> None:
        """Refuse a batch or a model with which the objective would not be what trains."""
        if "token_weight" in batch:
            check_weight(batch["token_weight"], batch["labels"])
        check_places(batch)
        mask, input_ids = batch.get("attention_mask"), batch["input_ids"]
        if mask is not None and bool((mask.diff(dim=1) > 0).any()):
            raise UserError("the batch is left-padded: training wants right padding (padding_side='right')")
        # Repeated, lest a short batch pass unchecked, or one rank run the model less often than the others.
        few = input_ids.repeat(1, 4)[:, : max(4, input_ids.shape[1])]
        check_causal(self.model, few)
        if "position_ids" in batch:
            check_packing(self.model, few)
        if self.seam is not None:
            check_head(self.model, self.seam, few, current)


class TokenFacts(TypedDict, total=False):
    """What is known of N supervised tokens beside their statistics.

    Attributes:
        noise_code: Shape ``(N,)``, 0 where a label is clean; None where nothing is known of noise.
        clean_labels: Shape ``(N,)``, labels before they were corrupted, -100 where unknown; or None.
        sources: Where they come from; only there where the data has several sources.
    """

    noise_code: Tensor | None
    clean_labels: Tensor | None
    sources: TokenSources


def facts_of(batch: dict[str, Any], keep: Tensor, noise: bool = True) -> TokenFacts:
    """Return what is known of the supervised tokens beside their statistics.

    Args:
        batch: ``noise_code`` and ``clean_labels`` of shape ``(B, T)``, if it has them; if it has ``source``, the place
            of each example in ``source_names``, also ``segment`` of shape ``(B, T)``, the example of each token.
        keep: Shape ``(B, T - 1)``: the positions whose next token is supervised.
        noise: Whether anybody looks at noise: callbacks do so on logged steps alone.
    """
    names = (*(("noise_code", "clean_labels") if noise else ()), *(("segment",) if "source" in batch else ()))
    fields = {name: batch.get(name) for name in names}
    if all(field is None for field in fields.values()):
        return {"noise_code": None, "clean_labels": None}
    if (places := batch.get("supervised_at")) is None:  # a device is waited for once
        places = torch.nn.functional.pad(keep, (1, 0)).flatten().nonzero().squeeze(1)
    known = {name: None if field is None else field.flatten()[places] for name, field in fields.items()}
    facts: TokenFacts = {"noise_code": known.get("noise_code"), "clean_labels": known.get("clean_labels")}
    if (segment := known.get("segment")) is not None:
        facts["sources"] = TokenSources(tuple(batch["source_names"]), batch["source"][segment.long()])
    return facts
