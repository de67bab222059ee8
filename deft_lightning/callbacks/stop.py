"""Ctrl-C ends a run after the step in hand, with its state saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info


class GracefulStop(Callback):
    """The first SIGINT stops training once the optimizer has stepped; a second one interrupts at once.

    An interrupt can fall in the middle of an optimizer step and leave half of the weights updated, so nothing could be
    saved there. With several processes, which would stop at different steps, Lightning's own handling stays.

    Attributes:
        stopped: Whether training was ended this way.
    """

    def __init__(self) -> None:
        self.asked = self.stopped = False
        self._previous: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self.asked = self.stopped = False
        # Only the main thread may set handlers.
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        rank_zero_info("\nstopping after this step; Ctrl-C again to stop at once")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop between optimizer steps."""
        if self.asked and not trainer.fit_loop._should_accumulate():
            trainer.should_stop = self.stopped = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
