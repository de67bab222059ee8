"""How sure the model is: Shannon entropy, Renyi-2 entropy and collision probability of its predictions."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from torch import Tensor

from deft_lightning.callbacks.monitor import TokenMonitor
from deft_lightning.callbacks.watched import WatchedModule
from deft_lightning.functional import TokenStats
from deft_lightning.metrics import Histogram, PackedHistogram


class EntropyMonitor(TokenMonitor):
    """Logs `entropy/shannon` (H), `entropy/renyi2` (H2 = -ln C), both in nats, and `collision/mean` (C = sum pi^2).

    `entropy/q10`, `entropy/q50` and `entropy/q90` are exact quantiles of H, `renyi2/` likewise of H2, `collision/` of
    C. Histograms: `entropy/hist` (H) and `entropy/renyi2_hist` (H2) over `[0, ln V]`, `collision/hist` (C) over
    `[0, 1]`.

    Args:
        histograms: Write the histograms too.
        bins: Bins of a histogram.
    """

    def __init__(self, histograms: bool = True, bins: int = 50) -> None:
        super().__init__(bins)
        self.histograms, self.bins = histograms, bins

    def open(self, trainer: Trainer, module: WatchedModule) -> PackedHistogram:
        """Return rows for both entropies and the collision probability."""
        highest = math.log(module.model.config.get_text_config().vocab_size)
        return PackedHistogram([(0.0, highest), (0.0, highest), (0.0, 1.0)], self.bins)

    def observe(
        self,
        packed: PackedHistogram,
        module: WatchedModule,
        stats: TokenStats,
        noise_code: Tensor | None,
        clean_labels: Tensor | None,
    ) -> None:
        """Add both entropies and the collision probability of each token."""
        packed.update(0, stats.entropy)
        packed.update(1, -stats.collision.log())
        packed.update(2, stats.collision)
        self.quantiles.update(stats.entropy, -stats.collision.log(), stats.collision)

    def report(self, trainer: Trainer, module: WatchedModule, rows: list[Histogram]) -> None:
        """Write means, quantiles and histograms."""
        shannon, renyi2, collision = rows
        module.log("entropy/shannon", shannon.mean)
        module.log("entropy/renyi2", renyi2.mean)
        module.log("collision/mean", collision.mean)
        self.write_quantiles(trainer, "entropy", "renyi2", "collision")
        if self.histograms:
            self.write_histogram(trainer, "entropy/hist", shannon)
            self.write_histogram(trainer, "entropy/renyi2_hist", renyi2)
            self.write_histogram(trainer, "collision/hist", collision)
