"""Label noise as values: what is corrupted is a function of (seed, operation, example id) and of nothing else."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar, Literal

from deft_lightning.data.noise.edits import Edit
from deft_lightning.data.noise.vocabulary import Ids, Vocabulary
from deft_lightning.errors import UserError
from deft_lightning.hashing import uniform
from deft_lightning.registry import concrete


class NoiseOp(ABC):
    """A corruption of labels: frozen dataclass with a ``rate``; subclass one of the kinds below.

    Selection draws ``u = hash(seed, operation, example id)`` and takes ``u < rate``, so what 30 % corrupts, 50 %
    corrupts too, whatever the order, the number of workers or of ranks. With ``exact``, the ``floor(rate * n)``
    smallest draws are taken instead: nested all the same, but who is taken depends on who else is there.
    """

    rate: float
    exact: bool = False

    def __post_init__(self) -> None:
        """Refuse a rate that is not a share."""
        if not 0.0 <= self.rate <= 1.0:
            raise UserError(f"{type(self).__name__}: rate {self.rate} is outside [0, 1] (--data.noise.ops)")

    def _refuse_unless(self, meant: bool, says: str) -> None:
        if not meant:
            raise UserError(f"{type(self).__name__}: {says} (--data.noise.ops)")


class ResponseNoise(NoiseOp):
    """Corrupts responses before the template; the edits are the truth, to the character.

    Attributes:
        whole: A corrupted response is another one altogether, so that the end of its turn counts as noise as well.
    """

    whole: ClassVar[bool] = False

    @abstractmethod
    def edits(
        self, salt: str, ids: Sequence[str], responses: Sequence[str], prompts: Sequence[str]
    ) -> dict[int, list[Edit]]:
        """Return the edits of each corrupted position: sorted, disjoint, and never the same text in the end.

        Args:
            salt: Seed and name of this operation; goes into every key.
            ids: Example ids of the rows that may be corrupted.
            responses: Their last assistant turns.
            prompts: Their last user turns, empty where there is none.
        """

    def select(self, salt: str, ids: Sequence[str], eligible: Iterable[int]) -> list[int]:
        """Return which of the eligible positions are corrupted, in the order of their draws.

        Eligible means that there is something to corrupt, at whatever rate. By the plain rule this takes the share
        ``rate`` of all examples and leaves out what is not eligible: 30 % of them may become 20 % of the data. With
        ``exact`` the share is counted among the eligible: ``floor(rate * n)`` of ``n``, ties broken by id.
        """
        drawn = sorted((uniform(salt, ids[i]), ids[i], i) for i in eligible)
        if self.exact:
            return [i for _, _, i in drawn[: exact_count(self.rate, len(drawn))]]
        return [i for u, _, i in drawn if u < self.rate]


class ExampleNoise(ResponseNoise):
    """Corrupts each response by itself, without a look at the others."""

    @abstractmethod
    def edit(self, salt: str, example_id: str, response: str, prompt: str) -> list[Edit] | None:
        """Return the edits of one response, or None where there is nothing that this operation can corrupt.

        Whether it can must not depend on ``rate``, or a lower rate would not corrupt a part of what a higher one does.
        """

    def edits(
        self, salt: str, ids: Sequence[str], responses: Sequence[str], prompts: Sequence[str]
    ) -> dict[int, list[Edit]]:
        """Return the edits of the selected responses."""
        # Without `exact`, who is selected is known without a look at the text: most of it need not be read.
        candidates = range(len(ids)) if self.exact else self.select(salt, ids, range(len(ids)))
        made = {i: self.edit(salt, ids[i], responses[i], prompts[i]) for i in candidates}
        possible = {i: edits for i, edits in made.items() if edits is not None}
        return {i: possible[i] for i in self.select(salt, ids, possible)} if self.exact else possible


class TokenNoise(NoiseOp):
    """Corrupts single supervised tokens, after tokenisation and before truncation."""

    target: Literal["labels", "text"]

    @abstractmethod
    def corrupt_tokens(self, salt: str, example_id: str, labels: Ids, vocabulary: Vocabulary, skipped: int = 0) -> Ids:
        """Return the new label of each supervised token of one example; unchanged where not selected.

        Args:
            salt: Seed and name of this operation.
            example_id: Id of the example.
            labels: Clean labels of its supervised tokens, in order.
            vocabulary: What to draw from.
            skipped: Supervised tokens that truncation cut off before these; whoever draws for them too corrupts the
                same tokens wherever the example is cut.
        """

    def at_epoch(self, epoch: int) -> TokenNoise:
        """Return the operation as it is in an epoch, from 0; itself where nothing changes."""
        return self


def exact_count(rate: float, n: int) -> int:
    """Return ``floor(rate * n)`` for the rate as it is written: 0.29 of 100 is 29, although as a float it is less."""
    return math.floor(Fraction(str(float(rate))) * n)


@dataclass(frozen=True)
class Noise:
    """Synthetic label noise, applied to the training split unless told otherwise.

    Args:
        seed: Seed of the corruption.
        splits: Splits to corrupt: train, validation or both.
        trusted_fraction: Share of examples, chosen by hash, that stay clean.
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
        """Return whether this example is kept clean."""
        return uniform(self.seed, "trusted", example_id) < self.trusted_fraction


def known_noise() -> dict[str, type[NoiseOp]]:
    """Return every concrete operation imported so far by name."""
    return concrete(NoiseOp, NoiseOp, ResponseNoise, ExampleNoise, TokenNoise)
