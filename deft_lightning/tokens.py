"""What is known of tokens: before the model has spoken, their context; after it, their statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100  # label of a token that is not supervised, as in torch and transformers


class TokenStats(NamedTuple):
    r"""What an objective may know about each token. Every field has the shape of the targets.

    Attributes:
        log_prob: ``log p`` in nats, at most 0. Differentiable, as is ``reference_kl`` and no other field.
        collision: Collision probability ``C = sum_v pi_v^2 = exp(-H_2)`` in ``[1/V, 1]``.
        entropy: Shannon entropy ``H`` in nats, in ``[0, ln V]``.
        correct: Whether the target is the arg-max (bool).
        topk_entropy: Entropy in nats of the ``k`` largest probabilities renormalised, in ``[0, ln k]``; present only
            where an objective asked for it through ``topk``.
        arg_max: Token the model would say, its first choice (int64); not there in statistics made by hand.
        weight: What the token's loss is multiplied by, finite and at least 0; None where every token counts 1. The
            loss of a token is without it; what looks at the whole batch takes its means over it (:meth:`mean`).
        chance: ``log u`` in nats, at most 0: how probable the label is without looking at what stands before it.
        answer_chance: The same, where a whole answer is judged; None where that is ``chance``.
        example: Which answer a token belongs to (int64): the tokens of one have one number in ``[0, N)``.
        source: Place of the token's source among those that have an objective of their own (int64), -1 for others.
        reference_kl: ``KL(pi0 || pi)`` in nats, at least 0: how far the prediction is from that of a reference model
            at the same position; None where there is no reference.
    """

    log_prob: Tensor
    collision: Tensor
    entropy: Tensor
    correct: Tensor
    topk_entropy: Tensor | None = None
    arg_max: Tensor | None = None
    weight: Tensor | None = None
    chance: Tensor | None = None
    answer_chance: Tensor | None = None
    example: Tensor | None = None
    source: Tensor | None = None
    reference_kl: Tensor | None = None

    def within(self, context: TokenContext) -> TokenStats:
        """Return the statistics with what is known of the tokens beside them, floats in their own dtype."""
        dtype = self.log_prob.dtype
        known = context.map(lambda field: field.detach().to(dtype if field.is_floating_point() else field.dtype))
        return self._replace(**known._asdict())

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of values, one a token, over the batch: ``sum w v / sum w`` where tokens have weights.

        Args:
            values: Shape ``(N,)``.

        Returns:
            A scalar; where all weights are 0 it is 0, without any token not a number.
        """
        if self.weight is None:
            return values.mean()
        total = self.weight.sum()
        return (self.weight * values).sum() / torch.where(total > 0, total, 1)

    @staticmethod
    def joined(parts: Sequence[TokenStats]) -> TokenStats:
        """Return the statistics of several lots of tokens, at least one, as one; all have the same fields."""
        if len(parts) == 1:
            return parts[0]
        found: Any = (None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
        return TokenStats(*found)

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenStats:
        """Return the statistics with ``function`` applied to every field that is there; not all of them are floats."""
        found: Any = (None if field is None else function(field) for field in self)
        return TokenStats(*found)

    def select(self, index: Tensor | slice) -> TokenStats:
        """Return the statistics of the tokens that ``index`` (a mask, positions or a slice) picks, flattened."""
        return self.map(lambda field: field[index])

    def detach(self) -> TokenStats:
        """Return the same statistics without a graph."""
        return self.map(Tensor.detach)


class TokenContext(NamedTuple):
    """What is known of tokens before the model has said anything of them; None for what is not known.

    The fields are those of :class:`TokenStats` of the same names, in the shape of the targets.
    """

    weight: Tensor | None = None
    chance: Tensor | None = None
    answer_chance: Tensor | None = None
    example: Tensor | None = None
    source: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenContext:
        """Return the context with ``function`` applied to every field that is there."""
        return TokenContext(*(None if field is None else function(field) for field in self))

    def select(self, index: Any) -> TokenContext:
        """Return the context of the tokens that ``index`` (a mask, positions or a slice) picks."""
        return self.map(lambda field: field[index])


LossFn = Callable[[TokenStats], Tensor]  # an objective, as the heads see it: losses of shape (N,)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype statistics are computed in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def topk_entropy_of(shifted: Tensor, k: int) -> Tensor:
    """Return the entropy of the ``k`` largest probabilities renormalised; the largest of the logits is 0."""
    largest = shifted.topk(min(k, shifted.shape[-1]), dim=-1).values[..., 1:]
    exps = largest.exp()
    tail = exps.sum(-1)
    weighted = torch.where(exps > 0, exps * largest, torch.zeros_like(exps))
    return torch.log1p(tail) - weighted.sum(-1) / (1 + tail)
