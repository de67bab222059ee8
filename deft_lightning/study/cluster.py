"""Cells as jobs of a cluster, through submitit."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deft_lightning.errors import UserError
from deft_lightning.study.plan import Cell
from deft_lightning.study.pool import Work, Workers

SECONDS = 1.0  # between two looks at jobs that run for minutes
MINUTES = 24 * 60  # of a job that nobody has given a limit


class Jobs(Workers):
    """Jobs of a cluster, each a cell; a folder that all machines share holds what they read and write.

    Jobs that run on when the study is stopped write their results as well: the same command finds them.

    Args:
        count: Jobs at a time.
        root: Folder of the study; `jobs` below it gets the logs.
        options: As for ``submitit.AutoExecutor.update_parameters``; and `cluster`: `slurm`, the default, or `local`,
            processes of this machine.

    Raises:
        UserError: submitit is not installed, does not know an option, or finds no SLURM where `cluster` is not given.
    """

    def __init__(self, count: int, root: Path, options: Mapping[str, Any]) -> None:
        try:
            import submitit
        except ImportError:
            raise UserError("--launcher submitit needs its package: pip install 'deft-lightning[cluster]'") from None
        given = {"timeout_min": MINUTES, **options}
        if given.get("cluster") is None and submitit.AutoExecutor.which() != "slurm":
            raise UserError(
                "--launcher submitit: there is no SLURM here; --submitit '{cluster: local}' runs jobs on this machine"
            )
        try:
            self._jobs = submitit.AutoExecutor(root.absolute() / "jobs", cluster=given.pop("cluster", None))
            self._jobs.update_parameters(**given)
        except (ValueError, NameError, RuntimeError) as error:
            raise UserError(f"--submitit: {' '.join(str(error).split())}") from None
        super().__init__(count, root.absolute())

    def submit(self, work: Work, cell: Cell) -> Any:
        """Hand a cell to the cluster."""
        return Job(self._jobs.submit(attempt, work, cell, self.root))

    def wait(self, running: Iterable[Any]) -> Iterable[Any]:
        """Ask until a job is done."""
        jobs = list(running)
        while not (done := [job for job in jobs if job.job.done()]):
            time.sleep(SECONDS)
        return done

    def lost(self, future: Any, error: Exception) -> str | None:
        """Return where the log of a job is that has failed."""
        job = future.job
        return f"job {job.job_id} has failed ({job.state}); the finished runs are kept; its log is {job.paths.stderr}"


class Job:
    """A job whose mistakes are what they were: submitit gives a traceback as text.

    Args:
        job: That of submitit.
    """

    def __init__(self, job: Any) -> None:
        self.job = job

    def result(self) -> None:
        """Raise the error of the cell, if it had one."""
        if (mistake := self.job.result()) is not None:
            raise UserError(mistake)

    def cancel(self) -> None:
        """End the job."""
        self.job.cancel()


def attempt(work: Work, cell: Cell, root: Path) -> str | None:
    """Run a cell in a job; return the line of a mistake, which would come back as text of a traceback."""
    if cell.setting.accelerator == "cpu":
        import torch

        torch.set_num_threads(1)  # as on one machine: the number of threads changes sums by rounding
    try:
        work(cell, root)
    except UserError as error:
        return str(error)
    return None
