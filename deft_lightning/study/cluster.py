"""Cells as jobs of a cluster, through submitit."""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from deft_lightning.errors import UserError, reason_of
from deft_lightning.study.plan import Cell
from deft_lightning.study.pool import Work, Workers

ONE = ("nodes", "tasks_per_node", "ntasks_per_node", "ntasks")  # each task of a job would run its cell again
WHOLE = (*ONE, "timeout_min", "time", "cpus_per_task", "gpus_per_node")
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
        UserError: As for :func:`check_settings`.
    """

    def __init__(self, count: int, root: Path, options: Mapping[str, Any]) -> None:
        self._jobs = _executor(root.absolute() / "jobs", options)
        super().__init__(count, root.absolute())

    def submit(self, work: Work, cell: Cell) -> Any:
        """Hand a cell to the cluster.

        Raises:
            UserError: The cluster refuses the job.
        """
        said = io.StringIO()
        try:
            with redirect_stderr(said):  # submitit prints what sbatch says of a refusal, and raises it as well
                job = self._jobs.submit(attempt, work, cell, self.root)
        except (RuntimeError, OSError) as error:
            raise UserError(f"--submitit: {reason_of(error)}") from None
        sys.stderr.write(said.getvalue())
        return Job(job)

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
        """End the job, or say that it runs on; others are to be ended as well."""
        try:
            self.job.cancel(check=False)
        except OSError as error:
            sys.stderr.write(f"study: job {self.job.job_id} runs on: {reason_of(error)}\n")


def check_settings(options: Mapping[str, Any]) -> None:
    """Refuse settings of jobs before a study writes anything.

    Args:
        options: As for :class:`Jobs`.

    Raises:
        UserError: submitit is not installed, does not know an option or its value, or finds no SLURM where `cluster` is
            not given; or a job would be more than one task.
    """
    with tempfile.TemporaryDirectory() as folder:
        _executor(Path(folder), options)


def _executor(folder: Path, options: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ImportError:
        raise UserError("--launcher submitit needs its package: pip install 'deft-lightning[cluster]'") from None
    given = {"timeout_min": MINUTES, **{name: value for name, value in options.items() if value is not None}}
    cluster = given.pop("cluster", None)
    if cluster is None and submitit.AutoExecutor.which() != "slurm":
        raise UserError(
            "--launcher submitit: there is no SLURM here; --submitit '{cluster: local}' runs jobs on this machine"
        )
    more = given.get("slurm_additional_parameters")
    for name, value in [*given.items(), *(more.items() if isinstance(more, Mapping) else ())]:
        _check_value(name, value)
    try:
        jobs = submitit.AutoExecutor(folder, cluster=cluster)
        jobs.update_parameters(**given)
    except (ValueError, NameError, RuntimeError, TypeError, AssertionError) as error:
        raise UserError(f"--submitit: {' '.join(str(error).split()) or type(error).__name__}") from None
    return jobs


def _check_value(name: str, value: object) -> None:
    """Refuse a value whose mistake submitit would tell by the names of Python's types, or in the job alone."""
    setting = name.removeprefix("slurm_").removeprefix("local_").replace("-", "_")
    if setting in ONE and value != 1:
        raise UserError(f"--submitit: {name} must be 1, not {value!r}: each job is one cell, which one task runs")
    least = 0 if setting == "gpus_per_node" else 1
    if setting in WHOLE and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        unit = " of minutes" if setting in ("timeout_min", "time") else ""
        raise UserError(f"--submitit: {name} must be a whole number{unit}, at least {least}, not {value!r}")
    if setting == "mem_gb" and (not isinstance(value, int | float) or isinstance(value, bool) or not value > 0):
        raise UserError(f"--submitit: {name} must be a number of gigabytes, such as 64, not {value!r}")


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
