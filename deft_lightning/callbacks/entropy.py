"""How sure the model is: Shannon and Renyi-2 entropy of its predictions."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer

from deft_lightning.callbacks.base import TokenMonitor
from deft_lightning.functional import TokenStats
from deft_lightning.metrics import Histogram, PackedHistogram


class EntropyMonitor(TokenMonitor):
    """Logs `entropy/shannon` (H), `entropy/renyi2` (-ln sum p^2) and the histogram `entropy/hist` of H, all in nats.

    Args:
        histograms: Write the histogram too.
        bins: Bins over [0, ln V].
    """

    def __init__(self, histograms: bool = True, bins: int = 50) -> None:
        super().__init__(bins)
        self.histograms, self.bins = histograms, bins

    def open(self, trainer: Trainer, module: Any) -> PackedHistogram:
        """Return rows for both entropies."""
        highest = math.log(module.model.config.get_text_config().vocab_size)
        return PackedHistogram([(0.0, highest)] * 2, self.bins)

    def observe(self, packed: PackedHistogram, module: Any, stats: TokenStats, noise_code: Any) -> None:
        """Add both entropies of each token."""
        packed.update(0, stats.entropy)
        packed.update(1, -stats.collision.log())

    def report(self, trainer: Trainer, module: Any, rows: list[Histogram]) -> None:
        """Write means and the histogram."""
        module.log("entropy/shannon", rows[0].mean)
        module.log("entropy/renyi2", rows[1].mean)
        if self.histograms:
            self.write_histogram(trainer, "entropy/hist", rows[0])
