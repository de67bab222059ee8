"""Predictions as JSON lines, one file however many ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning_utilities.core.rank_zero import rank_zero_info


class PredictionWriter(BasePredictionWriter):
    """Writes one line a prompt: `id`, `prompt`, `completions`, `gold`.

    Args:
        output: File; default: `predictions.jsonl` in the run's log folder.
    """

    def __init__(self, output: str | None = None) -> None:
        interval: Literal["batch"] = "batch"
        super().__init__(write_interval=interval)
        self.output = output

    def _target(self, trainer: Trainer) -> Path:
        return Path(self.output or Path(trainer.log_dir or trainer.default_root_dir) / "predictions.jsonl")

    def _part(self, trainer: Trainer, rank: int) -> Path:
        target = self._target(trainer)
        return target.with_name(f".{target.name}.{rank}")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start this rank's part afresh."""
        part = self._part(trainer, trainer.global_rank)
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append a batch to this rank's part."""
        with self._part(trainer, trainer.global_rank).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the parts by rank, in a file that appears once it is complete."""
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        target = self._target(trainer)
        parts = [self._part(trainer, rank) for rank in range(trainer.world_size)]
        lines = [part.read_text(encoding="utf-8").split("\n")[:-1] for part in parts]
        merged = target.with_name(f".{target.name}.all")
        # Rank r holds every world-th example from r: taking one from each in turn restores the order.
        longest = max(map(len, lines))
        merged.write_text(
            "".join(rows[i] + "\n" for i in range(longest) for rows in lines if i < len(rows)), encoding="utf-8"
        )
        merged.replace(target)
        for part in parts:
            part.unlink()
        rank_zero_info(f"predictions: {target}")
