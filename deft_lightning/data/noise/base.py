"""Label noise as values: what is corrupted is a function of (seed, operation, example id) and of nothing else."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deft_lightning.errors import UserError
from deft_lightning.hashing import uniform

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Vocabulary:
    """What a token operation may draw from.

    Attributes:
        ids: Token ids that are not special.
        counts: How often each occurs among the clean supervised tokens of the training split.
    """

    ids: Ids
    counts: Ids


class NoiseOp(ABC):
    """A corruption of labels: frozen dataclass with a ``rate``; subclass one of the two kinds below.

    Selection draws ``u = hash(seed, operation, example id)`` and takes ``u < rate``, so what 30 % corrupts, 50 %
    corrupts too, whatever the order, the number of workers or of ranks.
    """

    rate: float

    def __post_init__(self) -> None:
        """Refuse a rate that is not a share."""
        if not 0.0 <= self.rate <= 1.0:
            raise UserError(f"{type(self).__name__}: rate {self.rate} is outside [0, 1] (--data.noise.ops)")


class ResponseNoise(NoiseOp):
    """Corrupts whole responses, before the template."""

    @abstractmethod
    def corrupt_responses(self, salt: str, ids: Sequence[str], responses: Sequence[str]) -> dict[int, str]:
        """Return the new response of each corrupted position, always different from the old one.

        Args:
            salt: Seed and name of this operation; goes into every key.
            ids: Example ids of the rows that may be corrupted.
            responses: Their last assistant turns.
        """


class TokenNoise(NoiseOp):
    """Corrupts single supervised tokens, after tokenisation and before truncation."""

    target: Literal["labels", "text"]

    @abstractmethod
    def corrupt_tokens(self, salt: str, example_id: str, labels: Ids, vocabulary: Vocabulary) -> Ids:
        """Return the new label of each supervised token of one example; unchanged where not selected.

        Args:
            salt: Seed and name of this operation.
            example_id: Id of the example.
            labels: Clean labels of its supervised tokens, in order.
            vocabulary: What to draw from.
        """


@dataclass(frozen=True)
class Noise:
    """Synthetic label noise, applied to the training split unless told otherwise.

    Args:
        seed: Draws another corruption of the same kind.
        splits: Which of train and validation are corrupted.
        trusted_fraction: Share of examples, chosen by hash, that no operation touches.
        ops: Operations, applied in order; ``noise_code`` of a corrupted token is the operation's place, from 1.
    """

    seed: int = 0
    splits: list[Literal["train", "validation"]] = field(default_factory=lambda: ["train"])
    trusted_fraction: float = 0.0
    ops: list[NoiseOp] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse shares outside the unit interval and more operations than a code can name."""
        if not 0.0 <= self.trusted_fraction <= 1.0:
            raise UserError(f"--data.noise.trusted_fraction {self.trusted_fraction} is outside [0, 1]")
        for split in self.splits:
            if split not in ("train", "validation"):
                raise UserError(f"--data.noise.splits: {split!r} is neither train nor validation")
        if len(self.ops) > 127:
            raise UserError("--data.noise.ops: at most 127 operations")

    def salts(self) -> list[str]:
        """Return one salt per operation; repeats of a class are numbered so that they draw independently."""
        names = [type(op).__name__ for op in self.ops]
        return [f"{self.seed}/{name}/{names[:i].count(name)}" for i, name in enumerate(names)]

    def trusts(self, example_id: str) -> bool:
        """Whether this example is kept clean."""
        return uniform(self.seed, "trusted", example_id) < self.trusted_fraction


def known_noise() -> dict[str, type[NoiseOp]]:
    """Return every concrete operation imported so far by name."""
    found: dict[str, type[NoiseOp]] = {}
    todo: list[type[NoiseOp]] = [NoiseOp]
    while todo:
        cls = todo.pop()
        todo.extend(cls.__subclasses__())
        if not inspect.isabstract(cls) and cls not in (NoiseOp, ResponseNoise, TokenNoise):
            found.setdefault(cls.__name__, cls)
    return dict(sorted(found.items()))
