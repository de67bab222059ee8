"""Every rank watches the others of its machine while a run goes on."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from deft_lightning.ranks import RANKS


class RankWatch(Callback):
    """Ends a run whose ranks are not complete, within seconds, and with a line instead of a traceback for each rank.

    Ranks that wait for one that was killed would wait for many minutes (NCCL), or fail with gloo's traceback.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch, now that the ranks are started."""
        launcher: Any = trainer.strategy.launcher
        RANKS.watch(launcher, trainer.world_size)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let each rank end as it likes."""
        RANKS.rest()
