"""Where monitors write what is no number: histograms, figures and texts, in the form of each logger that takes them."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from numpy.typing import NDArray

from deft_lightning.metrics import Histogram

KINDS = ("histograms", "figures", "texts")
Pixels = NDArray[np.uint8]  # of shape (height, width, 3)


class Sink:
    """What a logger takes beside numbers; this one takes nothing.

    Args:
        logger: Where to write.

    Attributes:
        kinds: What it takes, of `KINDS`.
    """

    kinds: tuple[str, ...] = ()

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def histogram(self, tag: str, row: Histogram, step: int) -> None:
        """Write a histogram."""

    def figure(self, tag: str, pixels: Pixels, step: int) -> None:
        """Write a figure."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Write a text in Markdown."""

    @property
    def look(self) -> str:
        """Return how to look at what was logged: a command, or a place; empty where it is not known."""
        folder = getattr(self.logger, "log_dir", None) or self.logger.save_dir
        return "" if folder is None else str(folder)

    def attempt(self, call: Any, *args: Any, **kwargs: Any) -> None:
        """Write by another method than a logger's own; where loggers last, this one does so too."""
        getattr(self.logger, "attempt", lambda call, *args, **kwargs: call(*args, **kwargs))(call, *args, **kwargs)


class TensorBoardSink(Sink):
    """TensorBoard: everything."""

    kinds = KINDS

    def histogram(self, tag: str, row: Histogram, step: int) -> None:
        """Write the bins as they are."""
        self.logger.experiment.add_histogram_raw(tag, global_step=step, **row.raw())

    def figure(self, tag: str, pixels: Pixels, step: int) -> None:
        """Write an image."""
        self.logger.experiment.add_image(tag, pixels, step, dataformats="HWC")

    def text(self, tag: str, text: str, step: int) -> None:
        """Write to the Text page."""
        self.logger.experiment.add_text(tag, text, global_step=step)

    @property
    def look(self) -> str:
        """Return the command of its server."""
        return f"tensorboard --logdir {shlex.quote(str(self.logger.log_dir))}"


class CSVSink(Sink):
    """A table of numbers."""

    @property
    def look(self) -> str:
        """Return the table."""
        return str(Path(self.logger.log_dir) / "metrics.csv")


class WandbSink(Sink):
    """Weights & Biases: everything; texts as a page of their own."""

    kinds = KINDS

    def histogram(self, tag: str, row: Histogram, step: int) -> None:
        """Write the bins as they are."""
        import wandb

        bins = np.asarray(row.counts), np.asarray(row.edges)
        self.logger.log_metrics({tag: wandb.Histogram(np_histogram=bins)}, step)

    def figure(self, tag: str, pixels: Pixels, step: int) -> None:
        """Write an image."""
        self.logger.log_image(tag, [pixels], step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Write the text as it stands."""
        import wandb

        self.logger.log_metrics({tag: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)}, step)

    @property
    def look(self) -> str:
        """Return the address of the run, or the command that sends it there."""
        run = self.logger.experiment
        if getattr(run, "offline", False):
            return f"wandb sync {shlex.quote(str(Path(run.dir).parent))}"
        return str(getattr(run, "url", None) or "")


class MLFlowSink(Sink):
    """MLflow: figures by step, texts as files; it has no histograms."""

    kinds = ("figures", "texts")

    def figure(self, tag: str, pixels: Pixels, step: int) -> None:
        """Write an image."""
        client, run = self.logger.experiment, self.logger.run_id
        self.attempt(client.log_image, run, pixels, key=_allowed(tag), step=step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Write a file."""
        self.attempt(self.logger.experiment.log_text, self.logger.run_id, text, f"{_allowed(tag)}/{step:08}.md")

    @property
    def look(self) -> str:
        """Return the command of its server, or its address."""
        place = str(self.logger.experiment.tracking_uri)
        return place if place.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(place)}"


SINKS: list[tuple[type[Logger], type[Sink]]] = [
    (TensorBoardLogger, TensorBoardSink),
    (CSVLogger, CSVSink),
    (WandbLogger, WandbSink),
    (MLFlowLogger, MLFlowSink),
]


def sink_of(logger: Logger) -> Sink:
    """Return what takes the histograms, figures and texts of a logger; a logger may bring its own, ``logger.sink``."""
    own = getattr(logger, "sink", None)
    if isinstance(own, Sink):
        return own
    return next((sink(logger) for kind, sink in SINKS if isinstance(logger, kind)), Sink(logger))


def sinks(trainer: Trainer) -> list[Sink]:
    """Return the sinks of the loggers of a trainer; none on other ranks than zero."""
    return [sink_of(logger) for logger in trainer.loggers] if trainer.is_global_zero else []


def _allowed(tag: str) -> str:
    """Return a tag in characters that MLflow takes."""
    return re.sub(r"[^\w\-./ ]", "_", tag, flags=re.ASCII)
