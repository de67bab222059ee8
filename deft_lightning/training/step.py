"""One optimizer step over many micro-batches and ranks: what they agree on, and what is done when numbers go wrong."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deft_lightning.hashing import key

NAMED = 5  # how many examples, and how many parameters, a message names
PATIENCE = 20  # steps in a row that may be skipped


class SkippedStep(Exception):
    """Raised inside an optimizer step to leave weights and optimizer state as they are."""


@dataclass
class StepTotals:
    """What the ranks add up in an optimizer step, in one all-reduce.

    Attributes:
        tokens: Supervised tokens of this rank so far.
        bad: Micro-batches of this rank whose loss was not finite so far.
        gates: Sum of a gate over the tokens of this rank so far, float64; None where no mean gate is wanted.
        batches: Ids of the examples of each micro-batch, and whether its loss was finite.
        summed: Tokens, bad micro-batches, wishes to stop and, where wanted, gates of all ranks, once they are known:
            integers, or float64, which is exact up to 2^53 tokens.
    """

    tokens: Tensor | None = None
    bad: Tensor | None = None
    gates: Tensor | None = None
    batches: list[tuple[Sequence[str], Tensor]] = field(default_factory=list)
    summed: Tensor | None = None

    def count(self, tokens: Tensor) -> None:
        """Add a micro-batch."""
        self.tokens = tokens if self.tokens is None else self.tokens + tokens

    def watch(self, ids: Sequence[str], loss: Tensor) -> None:
        """Take note of the loss of a micro-batch."""
        bad = ~torch.isfinite(loss.detach())
        self.batches.append((ids, bad))
        self.bad = bad.long() if self.bad is None else self.bad + bad.long()

    def weigh(self, gate: Tensor) -> None:
        """Add the gates of the tokens of a micro-batch; every rank has to call it, or none."""
        total = gate.sum(dtype=torch.float64)
        self.gates = total if self.gates is None else self.gates + total

    def reduce(self, stop: bool) -> Tensor:
        """Return the supervised tokens of all ranks; every rank has to call it."""
        assert self.tokens is not None
        bad = self.tokens.new_zeros(()) if self.bad is None else self.bad
        counts = [self.tokens, bad.to(self.tokens), torch.full_like(self.tokens, int(stop))]
        self.summed = torch.stack(counts if self.gates is None else [*(n.double() for n in counts), self.gates])
        if ranks() > 1:
            dist.all_reduce(self.summed)
        return self.summed[0]

    def bad_examples(self) -> list[str]:
        """Return the ids of the micro-batches whose loss was not finite, of all if it was only the gradient."""
        chosen = [ids for ids, bad in self.batches if bool(bad)] or [ids for ids, _ in self.batches]
        return [str(id) for ids in chosen for id in ids]


@dataclass
class RunningMean:
    """Exponentially weighted mean over the tokens of optimizer steps.

    A ratio of two sums that forget alike: it is right from the first step on, where a decaying mean that starts at 0
    would have to be corrected, and a step with few tokens counts little.

    Attributes:
        total: Weighted sum of the values.
        tokens: Weighted number of tokens.
    """

    total: float = 0.0
    tokens: float = 0.0

    @property
    def mean(self) -> float:
        """The mean; 1 before the first token."""
        return self.total / self.tokens if self.tokens else 1.0

    def add(self, total: float, tokens: float, decay: float) -> None:
        """Add the tokens of a step; those of earlier steps count ``decay`` times what they did."""
        self.total, self.tokens = decay * self.total + total, decay * self.tokens + tokens


def ranks() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's share of sharded tensors, and others as they are."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def whole(norm: Tensor) -> Tensor:
    """Return a norm over sharded gradients as a plain tensor."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def parameters_of(optimizer: Any) -> Iterator[Tensor]:
    """Yield what an optimizer trains."""
    for group in optimizer.param_groups:
        yield from group["params"]


def describe_nonfinite(totals: StepTotals, model: Any, step: int) -> str:
    """Say in one line which examples and parameters a step that is not finite is about; every rank has to call it."""
    named = [name for name, p in model.named_parameters() if p.grad is not None and _bad(p.grad)]
    # Of the ranks whose loss was not finite, or of all if it was only the gradient.
    mine = (totals.bad is not None and bool(totals.bad), totals.bad_examples())
    found: list[Any] = [mine]
    if ranks() > 1:
        found = [None] * ranks()
        dist.all_gather_object(found, mine)
    guilty = [ids for bad, ids in found if bad] or [ids for _, ids in found]
    ids = [id for part in guilty for id in part]
    what = "loss" if any(bad for bad, _ in found) else "gradient"
    return (
        f"step {step}: the {what} is not finite; examples: {_some(ids)};"
        f" parameters with such a gradient: {_some(named) if named else 'none here'}"
    )


def _bad(gradient: Tensor) -> bool:
    (share,) = local([gradient])
    return not bool(torch.isfinite(share).all())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def reseed(epoch: int, batch_idx: int, rank: int) -> None:
    """Make what is random in a micro-batch (dropout) a function of its place, so that a resumed run draws the same.

    The seed of the run is the one of ``--seed_everything``.
    """
    seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
    torch.manual_seed(key(seed, "micro-batch", epoch, batch_idx, rank) >> 65)
