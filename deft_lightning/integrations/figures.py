"""The figures of a logged step: sums over its tokens, and what is logged of the sums of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.objectives import Contaminated, NoiseRates, Objective
from deft_lightning.objectives.locked import locked
from deft_lightning.objectives.noise_rates import LATEST, LOWEST, TrackedRates, bounded

SIZE = 7  # of what is added up of gates


def gate_sums(objective: Objective, stats: TokenStats) -> Tensor:
    """Return what is added up of the N tokens of a micro-batch, shape ``(7,)``, float64.

    Their number, and the sums of gate, squared gate, locked tokens, p, focus, and 1 for each token with a focus.

    Args:
        objective: In force.
        stats: Of the tokens, detached.
    """
    gate = objective.gate(stats).double()
    ones = torch.ones_like(gate)
    focus, has_focus = torch.zeros_like(gate), torch.zeros_like(gate)
    if objective.deformed is not None:
        with torch.no_grad():
            focus, has_focus = objective.deformed.focus(stats).double(), ones
    prob = stats.log_prob.double().exp()
    rows = (ones, gate, gate.square(), locked(stats, gate).double(), prob, focus, has_focus)
    return torch.stack([row.sum() for row in rows])


def gate_figures(sums: Sequence[float]) -> dict[str, float]:
    """Return what is logged of the sums of :func:`gate_sums`, by tag; nothing without tokens."""
    count, gate, square, shut, prob, focus, has_focus = sums
    if not count:
        return {}
    figures = {
        "gate/mean": gate / count,
        "gate/ess": gate**2 / (count * square) if square > 0 else 0.0,
        "gate/locked": shut / count,
        "prob/mean": prob / count,
    }
    return figures | ({"focus/mean": focus / has_focus} if has_focus else {})


class WatchedNoise:
    """The noise rates as `Contaminated` sees them, under whatever objective trains; chance is word frequency.

    One step of EM for each logged step, a running mean over them.

    Attributes:
        rates: So far.
        counted: Logged steps so far.
    """

    def __init__(self) -> None:
        self.rates, self.counted = NoiseRates(LOWEST, LOWEST), 0

    def sums(self, stats: TokenStats) -> Tensor:
        """Return posterior sums of the tokens of a micro-batch, shape ``(4,)``, float64."""
        alike = stats._replace(weight=None, answer_chance=None)
        return Contaminated().with_(rates=self.rates).noise_sums(alike)

    def fold(self, sums: Sequence[float]) -> dict[str, float]:
        """Move the rates by the sums of a logged step over all ranks; return them by tag."""
        if not sums[1]:
            return {}
        self.counted += 1
        latest = max(1 / self.counted, LATEST)
        tracked = TrackedRates(Contaminated(), 1 - latest, self.rates)
        self.rates = NoiseRates(*tracked.fold(self.rates, sums))
        return {"noise/estimated": self.rates.answers, "noise/estimated_tokens": self.rates.tokens}

    def state(self) -> list[float]:
        """Return what a checkpoint keeps."""
        return [*self.rates, self.counted]

    def load(self, state: Any) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: It says something that cannot be used.
        """
        try:
            answers, tokens, counted = state
            self.rates = NoiseRates(bounded(float(answers)), bounded(float(tokens)))
            self.counted = int(counted)
        except (TypeError, ValueError) as error:
            raise UserError(f"GateCallback: its state in trainer_state.json cannot be used ({error})") from None
