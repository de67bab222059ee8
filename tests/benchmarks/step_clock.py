"""A callback that writes when each training step ended, for the benchmarks."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from lightning.pytorch import Callback


class StepClock(Callback):
    """Write ``[[seconds since the epoch, tokens that are not padding], ...]`` to the file named by STEP_CLOCK."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the time."""
        self.ends.append((time.time(), batch["num_tokens"]))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the times."""
        with open(os.environ["STEP_CLOCK"], "w", encoding="utf-8") as file:
            json.dump(self.ends, file)
