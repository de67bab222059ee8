"""What the objective lets through: distributions of gate, focus index and target probability."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer

from deft_lightning.callbacks.base import TokenMonitor
from deft_lightning.functional import TokenStats
from deft_lightning.metrics import Histogram, PackedHistogram


class GateMonitor(TokenMonitor):
    """Logs `gate/mean`, `gate/ess`, `focus/mean`, `prob/mean`, and histograms `gate/hist`, `focus/hist`, `prob/hist`.

    The gate is the factor on a token's error; `gate/ess` is the effective sample size `(sum g)^2 / (n sum g^2)`, in
    (0, 1]. Focus (alpha) is written for the deformed-log family, which has one. Values above 1, which only some
    objectives reach, count in the last bin; means are exact.

    Args:
        histograms: Write the histograms too.
        bins: Bins of a histogram over [0, 1].
    """

    def __init__(self, histograms: bool = True, bins: int = 50) -> None:
        super().__init__(bins)
        self.histograms, self.bins = histograms, bins
        self.has_focus = False

    def open(self, trainer: Trainer, module: Any) -> PackedHistogram:
        """Return rows for gate, probability and, where there is one, focus."""
        self.has_focus = hasattr(module.objective, "focus")
        return PackedHistogram([(0.0, 1.0)] * (3 if self.has_focus else 2), self.bins)

    def observe(self, packed: PackedHistogram, module: Any, stats: TokenStats, noise_code: Any) -> None:
        """Add the gate, probability and focus of each token."""
        packed.update(0, module.objective.gate(stats))
        packed.update(1, stats.log_prob.exp())
        if self.has_focus:
            with torch.no_grad():
                packed.update(2, module.objective.focus(stats))

    def report(self, trainer: Trainer, module: Any, rows: list[Histogram]) -> None:
        """Write means and histograms."""
        gate, prob = rows[:2]
        module.log("gate/mean", gate.mean)
        module.log("gate/ess", gate.effective_sample_size)
        module.log("prob/mean", prob.mean)
        named = {"gate": gate, "prob": prob}
        if self.has_focus:
            module.log("focus/mean", rows[2].mean)
            named["focus"] = rows[2]
        if self.histograms:
            for name, row in named.items():
                self.write_histogram(trainer, f"{name}/hist", row)
