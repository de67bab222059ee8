"""Ctrl-C and SIGTERM end a run after the step in hand, with its state saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning._lightning import is_accumulating
from deft_lightning.callbacks.watched import WatchedModule, is_watched, watched


class GracefulStop(Callback):
    """The first SIGINT or SIGTERM stops training once the optimizer has stepped; a second SIGINT interrupts at once.

    An interrupt can fall in the middle of an optimizer step and leave half of the weights updated, so nothing could be
    saved there. Of several ranks one that is told is enough: they agree on the step (the module's ``stop_agreed``).

    Attributes:
        stopped: Whether training was ended this way.
    """

    def __init__(self) -> None:
        self.asked = self.stopped = False
        self._previous: dict[int, Any] = {}
        self._module: WatchedModule | None = None
        self._validates = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen; from here on, since Lightning has set handlers of its own just before."""
        self.asked = self.stopped = False
        self._validates = trainer.enable_validation
        self._module = watched(pl_module)
        self._module.stop_asked = self._module.stop_agreed = False
        # Only the main thread may set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if self._module is not None:
            self._module.stop_asked = True
        last = " and a last validation" if self._validates else ""
        rank_zero_info(f"\nstopping after this step{last}; Ctrl-C again to stop at once")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Stop between optimizer steps."""
        # A module that has no such agreement is stopped rank by rank.
        agreed = watched(pl_module).stop_agreed if is_watched(pl_module) else self.asked
        if agreed and not is_accumulating(trainer):
            trainer.should_stop = self.stopped = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._handle:  # Lightning may have put back what was there before the fit
                signal.signal(number, handler)
        self._previous = {}
