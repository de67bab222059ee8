"""What the ranks add up in an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from deft_lightning.training.distributed import ranks


@dataclass
class StepTotals:
    """What the ranks add up in an optimizer step, in one all-reduce.

    Attributes:
        tokens: Supervised tokens of this rank so far; None before the first micro-batch.
        weight: Sum of their weights, float64; None where no batch has weights, so that each counts 1.
        bad: Micro-batches of this rank whose loss was not finite so far.
        tracked: What the objective wants to be added up of this rank so far, shape ``(k,)``, float64; None for nothing.
        batches: Ids of the examples of each micro-batch, and whether its loss was not finite.
        summed: Tokens, bad micro-batches, wishes to stop and, where there are any, weights and what is tracked of all
            ranks, once they are known: integers, or float64, which is exact up to 2^53 tokens.
        finite: Whether losses and gradient were finite, once :meth:`settle` has looked.
    """

    tokens: Tensor | None = None
    weight: Tensor | None = None
    bad: Tensor | None = None
    tracked: Tensor | None = None
    batches: list[tuple[Sequence[str], Tensor]] = field(default_factory=list)
    summed: Tensor | None = None
    finite: bool | None = None
    _host: list[float] = field(default_factory=list)

    def count(self, tokens: Tensor, weight: Tensor | None = None) -> None:
        """Add the supervised tokens of a micro-batch, and the sum of their weights.

        Batches of one rank may have weights or not; whether any has must be the same on every rank.
        """
        if weight is not None or self.weight is not None:
            before = self.weight if self.weight is not None or self.tokens is None else self.tokens.double()
            now = tokens.double() if weight is None else weight
            self.weight = now if before is None else before + now
        self.tokens = tokens if self.tokens is None else self.tokens + tokens

    def watch(self, ids: Sequence[str], loss: Tensor) -> None:
        """Take note of the loss of a micro-batch."""
        bad = ~torch.isfinite(loss.detach())
        self.batches.append((ids, bad))
        self.bad = bad.long() if self.bad is None else self.bad + bad.long()

    def measure(self, sums: Tensor) -> None:
        """Add what the objective wants of a micro-batch, shape ``(k,)``; every rank has to call it, or none."""
        self.tracked = sums if self.tracked is None else self.tracked + sums

    def reduce(self, stop: bool) -> Tensor:
        """Return what the gradients of all ranks are to be divided by; every rank has to call it.

        The number of supervised tokens, an integer, or the sum of their weights, float64.
        """
        assert self.tokens is not None
        bad = self.tokens.new_zeros(()) if self.bad is None else self.bad
        counts = [self.tokens, bad.to(self.tokens), torch.full_like(self.tokens, int(stop))]
        self.summed = torch.stack(counts)
        sums = [part.reshape(-1) for part in (self.weight, self.tracked) if part is not None]
        if sums:
            self.summed = torch.cat([self.summed.double(), *sums])
        if ranks() > 1:
            dist.all_reduce(self.summed)
        return self.divisor

    @property
    def divisor(self) -> Tensor:
        """Return the sum over all ranks that makes means: of the weights, or of the tokens where they have none."""
        assert self.summed is not None
        return self.summed[0 if self.weight is None else 3]

    def settle(self, norm: Tensor | None = None) -> None:
        """Bring the sums to the host, with whether the step is finite: the one wait for the device in a step.

        It comes before the optimizer, which nothing may reach unseen.

        Args:
            norm: Of the whole gradient; None where nobody has computed it.
        """
        assert self.summed is not None
        finite = (self.summed[1] == 0).to(self.summed)
        if norm is not None:
            finite = finite * torch.isfinite(norm).to(finite)
        first, *self._host = torch.cat([finite.reshape(1), self.summed]).tolist()
        self.finite = bool(first)

    @property
    def all_tokens(self) -> int:
        """Return the number of supervised tokens of all ranks, after :meth:`settle`."""
        return int(self._host[0])

    @property
    def stop(self) -> bool:
        """Return whether any rank wishes to stop, after :meth:`settle`."""
        return self._host[2] > 0

    @property
    def measured(self) -> list[float]:
        """Return what is tracked, of all ranks, after :meth:`settle`."""
        assert self.tracked is not None
        return self._host[-len(self.tracked) :]

    def bad_examples(self) -> list[str]:
        """Return the ids of the micro-batches whose loss was not finite, of all if it was only the gradient."""
        guilty = [ids for ids, bad in self.batches if bool(bad)] or [ids for ids, _ in self.batches]
        return [str(id) for ids in guilty for id in ids]
