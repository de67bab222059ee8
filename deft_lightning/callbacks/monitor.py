"""What monitors share: when to look, and how to write histograms."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from deft_lightning._lightning import is_accumulating, is_logging_step, logged_step
from deft_lightning.callbacks.watched import WatchedModule, is_watched, watched
from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.metrics import Histogram, PackedHistogram, Quantiles

PERCENT = (10, 50, 90)  # the quantiles that are told


class TokenMonitor(Callback):
    """Watches the tokens of logged optimizer steps, all micro-batches and ranks of them.

    Nothing is computed on other steps. A subclass names its quantities, adds values in :meth:`observe` and writes them
    in :meth:`report`; syncing is one all-reduce for all of them, and four small ones where there are quantiles.
    """

    def __init__(self, bins: int = 50) -> None:
        if bins < 1:
            raise UserError(f"{type(self).__name__}: bins must be at least 1, got {bins}")
        self.packed: PackedHistogram | None = None
        self.quantiles = Quantiles([percent / 100 for percent in PERCENT])
        self.reports = 0

    def open(self, trainer: Trainer, module: WatchedModule) -> PackedHistogram:
        """Return the empty packed histogram, once the model is known."""
        raise NotImplementedError

    def observe(
        self,
        packed: PackedHistogram,
        module: WatchedModule,
        stats: TokenStats,
        noise_code: Tensor | None,
        clean_labels: Tensor | None,
    ) -> None:
        """Add the N tokens of one micro-batch.

        Args:
            packed: Where to.
            module: Has the objective.
            stats: Their statistics.
            noise_code: Shape ``(N,)``, 0 where a label is clean; None where nothing is known of noise.
            clean_labels: Shape ``(N,)``, labels before they were corrupted, -100 where unknown; or None.
        """
        raise NotImplementedError

    def report(self, trainer: Trainer, module: WatchedModule, rows: list[Histogram]) -> None:
        """Write what was seen in the step, the same keys on every rank."""
        raise NotImplementedError

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: object, batch_idx: int
    ) -> None:
        """Collect on logged steps; report once the optimizer has stepped."""
        if not is_watched(pl_module) or not is_logging_step(trainer):
            return
        module = watched(pl_module)
        if self.packed is None:
            self.packed = self.open(trainer, module).to(module.device)
        noise = (outputs.get("noise_code"), outputs.get("clean_labels"))
        self.observe(self.packed, module, outputs["stats"], *noise)
        if not is_accumulating(trainer):
            rows = self.packed.rows()
            self.packed.reset()
            self.reports += 1
            self.report(trainer, module, rows)
            self.quantiles.reset()

    def write_scalars(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Write values of this step alone, on rank zero; Lightning's ``log`` would repeat them on steps without any."""
        if not values:
            return
        for logger in trainer.loggers:
            logger.log_metrics(values, step=logged_step(trainer))

    def write_quantiles(self, trainer: Trainer, *names: str) -> None:
        """Write `name/q10`, `name/q50`, `name/q90` of the quantities of `quantiles`; nothing without tokens."""
        rows = zip(names, self.quantiles.compute(), strict=True)
        values = {f"{name}/q{percent}": v for name, row in rows for percent, v in zip(PERCENT, row, strict=False)}
        self.write_scalars(trainer, values)

    def write_histogram(self, trainer: Trainer, tag: str, row: Histogram) -> None:
        """Write one histogram to every TensorBoard logger; on rank zero alone."""
        if not row.total:
            return
        for writer in writers(trainer):
            writer.add_histogram_raw(tag, global_step=logged_step(trainer), **row.raw())

    def write_figure(self, trainer: Trainer, tag: str, draw: Callable[[], Any]) -> None:
        """Draw a figure for TensorBoard on the first, second, fourth, eighth ... report; on rank zero alone.

        A figure takes longer than a small step: so spaced their cost vanishes as the run goes on, and all phases of
        training are still seen.
        """
        if self.reports & (self.reports - 1) or not has_matplotlib():
            return
        for writer in writers(trainer):
            add_figure(writer, tag, draw(), logged_step(trainer))


def add_figure(writer: Any, tag: str, figure: Any, step: int) -> None:
    """Write a figure as an image, without pyplot, which ``SummaryWriter.add_figure`` imports."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    writer.add_image(tag, np.asarray(canvas.buffer_rgba())[..., :3], step, dataformats="HWC")
    # Figure and canvas are a cycle: until it is collected, the pixels would add to the peak of the steps that follow.
    del canvas.renderer


def writers(trainer: Trainer) -> list[Any]:
    """Return the writers of the TensorBoard loggers; none on other ranks than zero."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def has_matplotlib() -> bool:
    """Whether figures can be drawn: matplotlib is an extra (`figures`), and training does without."""
    return importlib.util.find_spec("matplotlib") is not None
