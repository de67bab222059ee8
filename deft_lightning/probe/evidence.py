"""How much better the model explains each answer than chance does, at every noise rate of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deft_lightning.functional import TokenStats
from deft_lightning.metrics import PackedHistogram, binned_auroc
from deft_lightning.objectives import Contaminated, NoiseRates
from deft_lightning.objectives.noise_rates import HIGHEST, LOWEST, logit
from deft_lightning.probe.bare import Bare
from deft_lightning.probe.tally import FINE, squashed

SURE = 0.5  # collision probability from which the model is called sure of what it says
POINTS = 33  # noise rates of tokens between which answers are interpolated
Numbers = NDArray[np.float64]


GRID = np.linspace(logit(LOWEST), logit(HIGHEST), POINTS)  # their log-odds


@dataclass(frozen=True, eq=False)
class Answers:
    """What the noise model needs to know of n answers; every array has shape ``(n,)`` unless it says otherwise.

    Attributes:
        position: Of the example in its split.
        tokens: How many are supervised, at least 1.
        gain: ``sum log p - sum log u`` in nats, u being the better of the two chances for the answer.
        asked: Whether that is the model without the prompt, rather than word frequencies.
        evidence: ``sum log a - sum log b`` at each rate of :data:`GRID`, shape ``(33, n)``, in nats: model and chance,
            each with that share of tokens from word frequencies.
        kept: Sum of the tokens' posteriors at each of these rates, shape ``(33, n)``.
        sure: Tokens with a collision probability of at least :data:`SURE`.
        sure_right: Those of them of which the label is the first choice.
        corrupted: Tokens that injected noise has hit.
    """

    position: NDArray[np.int64]
    tokens: Numbers
    gain: Numbers
    asked: NDArray[np.bool_]
    evidence: Numbers
    kept: Numbers
    sure: Numbers
    sure_right: Numbers
    corrupted: Numbers

    def __len__(self) -> int:
        """Return the number of answers."""
        return len(self.position)


class EvidenceTally:
    """Adds up the evidence of answers, batch by batch: a few numbers an answer are kept, none a token.

    Args:
        unigram: ``log u`` of every token, shape ``(V,)``, in nats.
        operations: How many noise operations there are.
    """

    def __init__(self, unigram: Tensor, operations: int) -> None:
        self.unigram = unigram.double().cpu()
        self._parts: list[Answers] = []
        self._ranks = PackedHistogram([(-1.0, 1.0)] * (1 + operations), FINE)

    def update(
        self,
        stats: TokenStats,
        labels: Tensor,
        keep: Tensor,
        positions: Sequence[int],
        codes: Tensor,
        bare: Bare | None,
    ) -> None:
        """Add a batch with one example a row.

        Args:
            stats: Statistics of its N supervised tokens on the host, row by row.
            labels: Shape ``(N,)``.
            keep: Shape ``(B, T - 1)``: whether the token after each position is supervised.
            positions: Position of each row's example in its split.
            codes: Shape ``(N,)``: noise code of each token.
            bare: What the model says of the answers without their prompts.
        """
        row = keep.nonzero(as_tuple=True)[0]
        if not len(row):
            return
        log_prob, chance = stats.log_prob.double(), self.unigram[labels]
        for code in set(codes.tolist()):
            self._ranks.update(code, squashed((chance - log_prob)[codes == code]))

        def summed(values: Tensor) -> Numbers:
            return torch.zeros(len(keep), dtype=torch.float64).index_add_(0, row, values.double()).numpy()

        # Answers without a prompt to leave out have word frequencies alone.
        alone = [None if bare is None else bare.of(at) for at in positions]
        counts = summed(torch.ones_like(log_prob))
        there = counts > 0
        rows = zip(alone, chance.split(counts.astype(int).tolist()), strict=True)
        asked = torch.cat([own if values is None else torch.from_numpy(values).double() for values, own in rows])
        lift = summed(asked - chance)
        # As for the objective: of two explanations by chance the better one counts, for all tokens of an answer.
        better = None if bare is None else torch.where(torch.from_numpy(lift > 0)[row], asked, chance)
        known = TokenStats(
            log_prob, stats.collision, stats.entropy, stats.correct, chance=chance, answer_chance=better, example=row
        )

        def judged(rate: float) -> tuple[Numbers, Numbers]:
            """Return the evidence of the answers, and how many of their tokens are right, at a noise rate of tokens."""
            posterior = Contaminated().with_(rates=NoiseRates(0.5, rate)).posterior(known)
            return summed(posterior.evidence / posterior.size), summed(posterior.token)

        evidence, kept = zip(*(judged(1 / (1 + math.exp(-odds))) for odds in GRID.tolist()), strict=True)
        gain, _ = judged(0.0)
        sure = stats.collision >= SURE
        self._parts.append(
            Answers(
                np.asarray(positions, np.int64)[there], counts[there], gain[there], (lift > 0)[there],
                np.stack(evidence)[:, there], np.stack(kept)[:, there], summed(sure)[there],
                summed(sure & stats.correct)[there], summed(codes > 0)[there],
            )
        )  # fmt: skip

    def answers(self) -> Answers:
        """Return all answers in the order of the split."""
        names = list(Answers.__dataclass_fields__)
        joined = {name: np.concatenate([getattr(part, name) for part in self._parts], axis=-1) for name in names}
        order = np.argsort(joined["position"], kind="stable")
        return Answers(**{name: values[..., order] for name, values in joined.items()})

    def token_auroc(self, code: int) -> float | None:
        """Return how well ``log u - log p`` tells an operation's tokens from clean ones; None without both."""
        clean, own = (self._ranks.rows()[place] for place in (0, code))
        return binned_auroc(own.counts, clean.counts) if own.total and clean.total else None
