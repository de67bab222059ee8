"""Trackio as a logger: curves and settings in a database of this machine, or on a Space; Lightning has none for it."""

from __future__ import annotations

import importlib.util
import shlex
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_only

from deft_lightning.callbacks.sinks import KINDS, Pixels, Sink
from deft_lightning.errors import UserError
from deft_lightning.metrics import Histogram
from deft_lightning.training.resume.settings import plain


class TrackioSink(Sink):
    """Trackio: everything."""

    kinds = KINDS

    def histogram(self, tag: str, row: Histogram, step: int) -> None:
        """Write the bins as they are."""
        import trackio

        self.logger.log_metrics({tag: trackio.Histogram(np_histogram=(row.counts, row.edges))}, step)

    def figure(self, tag: str, pixels: Pixels, step: int) -> None:
        """Write an image."""
        import trackio

        self.logger.log_metrics({tag: trackio.Image(pixels)}, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Write a report in Markdown."""
        import trackio

        self.logger.log_metrics({tag: trackio.Markdown(text)}, step)

    @property
    def look(self) -> str:
        """Return the command of its page, or the Space."""
        return self.logger.space_id or f"trackio show --project {shlex.quote(self.logger.project)}"


class TrackioLogger(Logger):
    """Logs a run to Trackio.

    Runs are kept below the folder that the environment names as ``TRACKIO_DIR``, by default in the hub's cache.

    Args:
        project: What the runs are gathered under.
        run_name: Of the run; Trackio finds one by default.
        group: Of runs that belong together.
        space_id: Space of the hub to log to, in place of this machine.

    Raises:
        UserError: Trackio is not installed.
    """

    def __init__(
        self, project: str = "deft_lightning", run_name: str | None = None, group: str | None = None,
        space_id: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if importlib.util.find_spec("trackio") is None:
            raise UserError("--trainer.logger TrackioLogger: pip install trackio")
        self.project, self.run_name, self.group, self.space_id = project, run_name, group, space_id
        self._run: Any = None
        self._params: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """Return the project."""
        return self.project

    @property
    def version(self) -> str | None:
        """Return the name of the run; None before it is begun."""
        return self.run_name

    @property
    def sink(self) -> Sink:
        """Return what takes histograms, figures and texts."""
        return TrackioSink(self)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the run of Trackio; begun when it is asked for."""
        if self._run is None:
            import trackio

            self._run = trackio.init(
                self.project,
                name=self.run_name,
                group=self.group,
                space_id=self.space_id,
                config=self._params,
                resume="never" if self.run_name is None else "allow",
                embed=False,
                auto_log_cpu=False,
            )
            self.run_name = str(self._run.name)
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Add settings to the run; Trackio takes those that are there when the first numbers come."""
        self._params |= plain(vars(params) if isinstance(params, Namespace) else dict(params))
        self.experiment.config.update(self._params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write numbers, and what is made of Trackio's own kinds."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the rest. A test after the fit goes on with the run, as it does under other loggers."""
        if self._run is not None:
            import trackio

            name, self._run = self.run_name, None
            trackio.finish()
            self.run_name = name
