"""What is known of the tokens of a batch beside the model's prediction, for objectives that ask for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from deft_lightning.annotations import Batch
from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX, TokenContext, TokenStats
from deft_lightning.objectives.base import Objective
from deft_lightning.objectives.run_state import Needs

if TYPE_CHECKING:
    import numpy as np  # an objective needs torch alone
    from numpy.typing import NDArray

NOTHING = Needs()
DECAY = 0.9  # of the running mean prediction
UNIFORM = 0.01  # share of the unigram that is uniform: a label that no training row has must not be impossible


def unigram_log_prob(counts: Tensor | NDArray[np.int64], vocabulary: int) -> Tensor:
    """Return ``log u`` of every token: how frequent it is among labels, one percent of it uniform.

    Args:
        counts: How often each token is a label, shape ``(n,)`` with ``n <= vocabulary``.
        vocabulary: Number of tokens.

    Returns:
        Shape ``(vocabulary,)``, float32, in nats.

    Raises:
        UserError: There is no label, or one that is no token of the vocabulary.
    """
    if len(counts) > vocabulary or not counts.sum():
        raise UserError(f"{int(counts.sum())} labels of {len(counts)} tokens do not make a unigram over {vocabulary}")
    full = torch.zeros(vocabulary, dtype=torch.float64)
    full[: len(counts)] = torch.as_tensor(counts)
    return _smoothed(full / full.sum())


def _smoothed(prob: Tensor) -> Tensor:
    """Return the log of a distribution of which one percent is uniform: no label is impossible by chance."""
    return ((1 - UNIFORM) * prob + UNIFORM / len(prob)).log().float()


class Marginal:
    """The model's own mean prediction over the labels it is trained on, as a running mean over optimizer steps.

    One percent of its ``log_prob`` is uniform: else noise that the model never says would be no noise.

    It begins uniform; each step keeps :data:`DECAY` of what was. All micro-batches and ranks of a step are in its mean.

    Args:
        vocabulary: Number of tokens.

    Attributes:
        mean: Shape ``(V,)``, float64, sums to 1.
        sum: Predictions of the step in hand, shape ``(V,)``, float64.
    """

    def __init__(self, vocabulary: int) -> None:
        self.mean = torch.full((vocabulary,), 1 / vocabulary, dtype=torch.float64)
        self.sum = torch.zeros_like(self.mean)
        self.log_prob = _smoothed(self.mean)

    def to(self, device: torch.device) -> Self:
        """Put it where the tokens are."""
        if self.mean.device != device:
            self.mean, self.sum, self.log_prob = (x.to(device) for x in (self.mean, self.sum, self.log_prob))
        return self

    def fold(self, skipped: bool) -> None:
        """End a step: add its mean prediction, over all ranks; every rank has to call it."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.sum)
        total = self.sum.sum()
        if not skipped:
            # A step that has no token of any rank leaves everything as it is.
            step = torch.where(total > 0, self.sum / torch.where(total > 0, total, 1), self.mean)
            self.load(DECAY * self.mean + (1 - DECAY) * step)
        self.sum = torch.zeros_like(self.sum)

    def load(self, mean: Tensor) -> None:
        """Go on from a mean of an earlier run."""
        self.mean, self.log_prob = mean, _smoothed(mean)


class ContextSource:
    """Makes the context of batches: their weights, the chance of their labels, which answer and source they are of.

    Args:
        objective: Whose needs are met; None where nothing is asked for.
        unigram: ``log u`` of every token, shape ``(V,)``; None where nothing is known of the training labels.
        vocabulary: Number of tokens.
        watched: What callbacks want to know beside.
    """

    def __init__(
        self, objective: Objective | None = None, unigram: Tensor | None = None, vocabulary: int = 0,
        watched: Needs = NOTHING,
    ) -> None:  # fmt: skip
        self.trained = Needs() if objective is None else objective.needs
        # What callbacks want is theirs where the objective does not say.
        self.needs = self.trained._replace(answer_chance=self.trained.answer_chance or watched.answer_chance)
        self.own = () if objective is None else objective.sources
        self._places: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}  # of the sources of a batch among its own
        self.unigram, self.legend = unigram, repr(objective)
        self.marginal = Marginal(vocabulary) if self._kinds & {"marginal", "least", "best"} else None

    def end_step(self, skipped: bool) -> None:
        """End an optimizer step; every rank has to call it."""
        if self.marginal is not None:
            self.marginal.fold(skipped)

    def go_on_from(self, other: ContextSource) -> None:
        """Keep the mean prediction of the same model's run, for a validation after it."""
        if self.marginal is not None and other.marginal is not None:
            if len(self.marginal.mean) == len(other.marginal.mean):
                self.marginal = other.marginal

    def state_dict(self) -> dict[str, list[float]]:
        """Return what a checkpoint keeps."""
        return {} if self.marginal is None else {"marginal": self.marginal.mean.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; what it does not know begins anew.

        Raises:
            UserError: It is of another vocabulary.
        """
        mean = state.get("marginal")
        if self.marginal is None or mean is None:
            return
        if len(mean) != len(self.marginal.mean):
            raise UserError(
                f"the checkpoint's mean prediction is over {len(mean)} tokens, not {len(self.marginal.mean)}"
            )
        self.marginal.load(torch.tensor(mean, dtype=torch.float64, device=self.marginal.mean.device))

    @property
    def _kinds(self) -> set[str | None]:
        return {self.needs.chance, self.needs.answer_chance} - {None}

    @property
    def unprompted(self) -> bool:
        """Return whether anybody looks at what the model finds of the labels without the prompt."""
        return _asks(self.needs)

    @property
    def trains_on_unprompted(self) -> bool:
        """Return whether the objective does, and not callbacks alone, which look at logged steps."""
        return _asks(self.trained)

    @property
    def prediction_sum(self) -> Tensor | None:
        """Return where the predictions of a step are added up, shape ``(V,)``; None where nobody asks."""
        return None if self.marginal is None else self.marginal.sum

    def __call__(self, batch: Batch, complete: bool = True) -> TokenContext:
        """Return the context of what a batch teaches, each field of shape ``(B, T - 1)``: of the labels from 1 on.

        Args:
            batch: As for :class:`~deft_lightning.training.loss.BatchLoss`.
            complete: Whether all that is looked at has to be there; it need not be for statistics alone.

        Raises:
            UserError: The batch lacks what the objective looks at.
        """
        targets, example = batch["labels"][:, 1:], self._examples(batch)
        context = TokenContext(
            weight=batch["token_weight"][:, 1:] if "token_weight" in batch else None,
            chance=self._chance(self.needs.chance or "unigram", batch, targets),
            answer_chance=None if self._same else self._answer_chance(batch, targets, example),
            example=example,
            source=self._sources(batch),
        )
        if complete:
            self._check(self.trained.chance, context.chance)
            self._check(None if self._same else self.trained.answer_chance, context.answer_chance)
        return context

    def _check(self, kind: str | None, chance: Tensor | None) -> None:
        if kind is None or chance is not None:
            return
        if self.unigram is None and kind != "unprompted":
            raise UserError(
                f"{self.legend}: nothing is known of how frequent the training labels are; train with"
                " InstructionDataModule"
            )
        raise UserError(f"{self.legend}: the batch lacks `unprompted`, what the model says without the prompt")

    @property
    def _same(self) -> bool:
        return self.needs.answer_chance in (None, self.needs.chance)

    def _chance(self, kind: str, batch: Batch, targets: Tensor) -> Tensor | None:
        """Return one chance of every label; None where it is not known.

        An example without a prompt that could be left out has NaN in ``unprompted``: the unigram stands for it. A label
        that was not read has 0: it is no evidence.
        """
        if kind == "unprompted":
            if "unprompted" not in batch:
                return None
            asked, known = batch["unprompted"][:, 1:], self._chance("unigram", batch, targets)
            return asked if known is None else torch.where(asked.isnan(), known, asked)
        if kind == "marginal":
            table = self._marginal(targets)
        elif self.unigram is None:
            return None
        else:
            if self.unigram.device != targets.device:
                self.unigram = self.unigram.to(targets.device)
            table = self.unigram if kind == "unigram" else self._least(self.unigram, self._marginal(targets))
        return table[targets.clamp_min(0)]

    def _answer_chance(self, batch: Batch, targets: Tensor, example: Tensor | None) -> Tensor | None:
        kind = str(self.needs.answer_chance)
        if kind != "best":
            return self._chance(kind, batch, targets)
        known = self._chance("least", batch, targets)
        if known is None or "unprompted" not in batch or example is None:
            return None
        asked = torch.where((asked := batch["unprompted"][:, 1:]).isnan(), known, asked)
        # Of two explanations of a whole answer by chance the better one counts, for all its tokens.
        learnt, place = (targets != IGNORE_INDEX) & (asked < 0), example.clamp_min(0)
        gain = torch.where(learnt, asked - known, 0).double().flatten()
        # As many as there can be: a device would be waited for to count them.
        sums = gain.new_zeros(batch["labels"].numel()).index_add_(0, place.flatten(), gain)
        return torch.where(sums[place] > 0, asked, known)

    @staticmethod
    def _least(unigram: Tensor, marginal: Tensor) -> Tensor:
        """Return the smaller chance of each token, but that of a draw from all tokens at least.

        A model that knows its language hardly ever says most of a large vocabulary: without a bound, a token that was
        put there at random would be as improbable by chance as it is for the model, and would count as right.
        """
        return torch.minimum(unigram, marginal).clamp_min(-math.log(len(unigram)))

    def _marginal(self, like: Tensor) -> Tensor:
        assert self.marginal is not None
        return self.marginal.to(like.device).log_prob

    def _examples(self, batch: Batch) -> Tensor | None:
        if "segment" in batch:
            return batch["segment"][:, 1:].long()
        if not self.needs.example:
            return None
        if "position_ids" in batch:
            raise UserError(f"{self.legend}: packed batches need `segment`, the example of each token, shape (B, T)")
        rows = torch.arange(len(batch["labels"]), device=batch["labels"].device)
        return rows.unsqueeze(1).expand_as(batch["labels"][:, 1:])

    def _sources(self, batch: Batch) -> Tensor | None:
        if not self.own or "source" not in batch:
            return None
        names: Sequence[str] = batch["source_names"]
        # Made once: CUDA would wait for a copy in each micro-batch.
        key = (tuple(names), batch["source"].device)
        if (table := self._places.get(key)) is None:
            places = [self.own.index(name) if name in self.own else -1 for name in names]
            table = self._places[key] = torch.tensor(places, device=batch["source"].device)
        segment = batch["segment"][:, 1:].long().clamp_min(0)  # padding teaches nothing
        return table[batch["source"]][segment]


def _asks(needs: Needs) -> bool:
    return bool({needs.chance, needs.answer_chance} & {"unprompted", "best"})


def joined(parts: Sequence[TokenStats]) -> TokenStats:
    """Return the statistics of all tokens, one after another, and no number for two answers."""
    first, parts = 0, list(parts)
    for at, part in enumerate(parts):
        if part.example is not None and len(part.example):
            parts[at] = part._replace(example=part.example + first)
            first += int(part.example.max()) + 1

    def field(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return TokenStats(**{name: field(name) for name in TokenStats._fields})  # type: ignore[arg-type]
