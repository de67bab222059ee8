"""Predictions as JSON lines, one file however many ranks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning_utilities.core.rank_zero import rank_zero_info


class PredictionWriter(BasePredictionWriter):
    """Writes one line a prompt: `id`, `prompt`, `completions`, `gold`, `truncated`; of benchmarks what grading needs.

    Args:
        output: File; default: `predictions.jsonl` in the run's log folder.
    """

    def __init__(self, output: str | None = None) -> None:
        interval: Literal["batch"] = "batch"
        super().__init__(write_interval=interval)
        self.output = output

    def _target(self, trainer: Trainer) -> Path:
        return Path(self.output or Path(trainer.log_dir or trainer.default_root_dir) / "predictions.jsonl")

    def _parts(self, trainer: Trainer, rank: int) -> list[Path]:
        """What a rank writes, one part for each loader."""
        target = self._target(trainer)
        return [target.with_name(f".{target.name}.{i}.{rank}") for i in range(len(trainer.num_predict_batches))]

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start this rank's parts afresh."""
        for part in self._parts(trainer, trainer.global_rank):
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
        with self._parts(trainer, trainer.global_rank)[dataloader_idx].open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the parts by rank, in a file that appears once it is complete."""
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        target = self._target(trainer)
        parts = [self._parts(trainer, rank) for rank in range(trainer.world_size)]
        merged = target.with_name(f".{target.name}.all")
        with merged.open("w", encoding="utf-8") as file:
            for of_loader in zip(*parts, strict=True):
                lines = [part.read_text(encoding="utf-8").split("\n")[:-1] for part in of_loader]
                # Rank r holds every world-th example from r: one from each in turn restores the order.
                for i in range(max(map(len, lines))):
                    file.writelines(rows[i] + "\n" for rows in lines if i < len(rows))
        merged.replace(target)
        for part in itertools.chain.from_iterable(parts):
            part.unlink()
        rank_zero_info(f"predictions: {target}")
