"""Progress bar: loss, plain NLL, noise rate and throughput."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.types import STEP_OUTPUT


class SFTProgressBar(TQDMProgressBar):
    """Shows loss, nll, validation nll, the estimated share of wrong answers, and the tokens per second of this rank.

    Tokens are counted since the last refresh, padding left out.

    Args:
        refresh_rate: Batches between updates; None is 1 in a terminal and 10 in a file.
    """

    def __init__(self, refresh_rate: int | None = None) -> None:
        super().__init__(refresh_rate=(1 if sys.stderr.isatty() else 10) if refresh_rate is None else refresh_rate)
        self._tokens, self._since, self._rate = 0, 0.0, 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Start the clock."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._since = self._since or time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Count tokens; the count is a plain number in the batch, so nothing waits for the device."""
        self._tokens += batch.get("num_tokens", 0) if isinstance(batch, dict) else 0
        now = time.perf_counter()
        if now - self._since > 1.0:
            self._rate, self._tokens, self._since = self._tokens / (now - self._since), 0, now
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave validation out of the throughput."""
        super().on_validation_start(trainer, pl_module)
        self._tokens, self._since = 0, 0.0

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands behind the bar."""
        logged = trainer.progress_bar_metrics
        names = {"train/loss": "loss", "train/nll": "nll", "val/nll": "val_nll", "noise/estimated": "noise"}
        shown: dict[str, Any] = {short: logged[name] for name, short in names.items() if name in logged}
        if self._rate:
            shown["tok/s"] = f"{self._rate:.0f}"
        return shown
