"""What monitors share: when to look, and how to write histograms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from deft_lightning._lightning import is_accumulating, is_logging_step, log_now, logged_step
from deft_lightning.callbacks.sinks import Pixels, sinks
from deft_lightning.callbacks.watched import WatchedModule, is_watched, watched
from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.metrics import Histogram, PackedHistogram, Quantiles, SourceSums, TokenSources

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
        self.by_source: SourceSums | None = None  # None until tokens of several sources are seen

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

    def figures_by_source(
        self, module: WatchedModule, stats: TokenStats, noise_code: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return what is summed for every source, each of shape ``(N,)``; nothing by default.

        Args:
            module: Has the objective.
            stats: Statistics of the N tokens of one micro-batch of data with several sources.
            noise_code: As for :meth:`observe`.
        """
        return ()

    def report_by_source(self, sums: dict[str, list[float]]) -> dict[str, float]:
        """Return what is written of the sums of every source that :meth:`figures_by_source` gave, by tag."""
        return {}

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
        if (sources := outputs.get("sources")) is not None:
            self._add_by_source(sources, self.figures_by_source(module, outputs["stats"], noise[0]))
        if not is_accumulating(trainer):
            rows = self.packed.rows()
            self.packed.reset()
            self.reports += 1
            self.report(trainer, module, rows)
            self.quantiles.reset()
            if self.by_source is not None:
                sums = dict(zip(self.by_source.names, self.by_source.compute().tolist(), strict=True))
                self.by_source.reset()
                self.write_scalars(trainer, self.report_by_source(sums))

    def _add_by_source(self, sources: TokenSources, figures: tuple[Tensor, ...]) -> None:
        if not figures:
            return
        if self.by_source is None or self.by_source.names != sources.names:
            self.by_source = SourceSums(sources.names, len(figures)).to(sources.places.device)
        self.by_source.update(sources.places, *figures)

    def write_scalars(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Write values of this step alone, on rank zero; Lightning's ``log`` would repeat them on steps without any."""
        log_now(trainer, values)

    def write_quantiles(self, trainer: Trainer, *names: str) -> None:
        """Write `name/q10`, `name/q50`, `name/q90` of the quantities of `quantiles`; nothing without tokens."""
        rows = zip(names, self.quantiles.compute(), strict=True)
        values = {f"{name}/q{percent}": v for name, row in rows for percent, v in zip(PERCENT, row, strict=False)}
        self.write_scalars(trainer, values)

    def write_histogram(self, trainer: Trainer, tag: str, row: Histogram) -> None:
        """Write one histogram to every logger that takes some; on rank zero alone."""
        if not row.total:
            return
        for sink in sinks(trainer):
            sink.histogram(tag, row, logged_step(trainer))

    def write_figure(self, trainer: Trainer, tag: str, draw: Callable[[], Pixels]) -> None:
        """Draw a figure for loggers that take some on the first, second, fourth, eighth ... report; on rank zero alone.

        So spaced their cost vanishes as the run goes on, and all phases of training are still seen.
        """
        if not self.reports & (self.reports - 1):
            add_figure(trainer, tag, draw)


def add_figure(trainer: Trainer, tag: str, draw: Callable[[], Pixels], step: int | None = None) -> None:
    """Draw a figure as an image for the loggers that take some, beside a step; on rank zero alone."""
    if not (taking := [sink for sink in sinks(trainer) if "figures" in sink.kinds]):
        return
    pixels = draw()
    for sink in taking:
        sink.figure(tag, pixels, logged_step(trainer) if step is None else step)


def writers(trainer: Trainer) -> list[Any]:
    """Return the writers of the TensorBoard loggers; none on other ranks than zero."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
