"""Predictions as JSON lines, one file however many ranks."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.atomic import check_output_file, partial_name, remove, sweep
from deft_lightning.errors import UserError


class PredictionWriter(BasePredictionWriter):
    """Writes one line a prompt: `id`, `prompt`, `completions`, `gold`, `truncated`; of benchmarks what grading needs.

    Args:
        output: File; default: `predictions.jsonl` in the run's log folder.
    """

    def __init__(self, output: str | None = None) -> None:
        interval: Literal["batch"] = "batch"
        super().__init__(write_interval=interval)
        self.output = output
        self._file: Path | None = None
        self._folder: Path | None = None

    def _target(self, trainer: Trainer) -> Path:
        return Path(self.output or Path(trainer.log_dir or trainer.default_root_dir) / "predictions.jsonl")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a file that could not be written, before anything is generated."""
        if stage != "predict":
            return
        self._file = self._target(trainer)  # asks all ranks
        if trainer.is_global_zero:
            check_output_file(self._file, "--predictions.output")

    def _part(self, trainer: Trainer, loader: int, rank: int) -> Path:
        """Return what a rank writes for a loader, in a folder of this run alone."""
        assert self._folder is not None
        return self._folder / f"{loader}.{rank}"

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a folder that no other run shares; what killed runs have left beside it is removed."""
        assert self._file is not None
        self._folder = Path(trainer.strategy.broadcast(str(partial_name(self._file))))
        with self._told():
            if trainer.is_global_zero:
                sweep(self._file.parent)
            self._folder.mkdir(parents=True, exist_ok=True)
            for loader in range(len(trainer.num_predict_batches)):
                self._part(trainer, loader, trainer.global_rank).write_text("")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: object,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append a batch to this rank's part."""
        part = self._part(trainer, dataloader_idx, trainer.global_rank)
        with self._told(), part.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the parts by rank, in a file that appears once it is complete."""
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero or self._folder is None or self._file is None:
            return
        merged = self._folder / "all"
        with self._told():
            with merged.open("w", encoding="utf-8") as file:
                for loader in range(len(trainer.num_predict_batches)):
                    parts = [self._part(trainer, loader, rank) for rank in range(trainer.world_size)]
                    lines = [part.read_text(encoding="utf-8").split("\n")[:-1] for part in parts]
                    # Rank r holds every world-th example from r: one from each in turn restores the order.
                    for i in range(max(map(len, lines))):
                        file.writelines(rows[i] + "\n" for rows in lines if i < len(rows))
            merged.replace(self._file)
        remove(self._folder)
        rank_zero_info(f"predictions: {self._file}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove what has been written so far."""
        if self._folder is not None and trainer.is_global_zero:
            remove(self._folder)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Name the file in what a disk says."""
        try:
            yield
        except OSError as error:
            reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or error
            raise UserError(
                f"{self._file}: the predictions cannot be written: {reason} (--predictions.output)"
            ) from None
