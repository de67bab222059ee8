"""A study whose cells are jobs: submitit's own, on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_study import CONFIG, values
from worlds import ROOT

from deft_lightning.errors import UserError
from deft_lightning.study.cluster import Job, Jobs

pytestmark = pytest.mark.slow

UncompletedJobError = pytest.importorskip(
    "submitit.core.utils", reason="jobs are started by submitit (pip install -e '.[test]')"
).UncompletedJobError


def study(folder: Path, config: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a study of one regime in a folder."""
    file = folder / "study.yaml"
    file.write_text(config, encoding="utf-8")
    command = [sys.executable, "-m", "deft_lightning", "study", "--config", str(file), "--workers", "2", *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=500)


# Without the weak regime, and one learning rate: what is shown is where cells run.
SMALL = CONFIG.replace("    rates: [3.0e-3]\n", "").replace("[0.0, 0.5]", "[0.5]")
SMALL = "\n".join(line for line in SMALL.splitlines() if "weak:" not in line)
LOCAL = ["--launcher", "submitit", "--submitit", "{cluster: local, timeout_min: 30}"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same study in processes of its own and as jobs."""
    root = tmp_path_factory.mktemp("launched")
    for name, more in (("here", []), ("jobs", LOCAL)):
        done = study(root, SMALL, "--output", str(root / name), *more)
        assert done.returncode == 0, done.stderr[-2000:]
    return root


def test_jobs_give_the_numbers_of_processes_of_this_machine(both: Path) -> None:
    assert values(both / "jobs" / "report.json") == values(both / "here" / "report.json")
    assert len(list((both / "jobs" / "cells").iterdir())) == len(list((both / "here" / "cells").iterdir())) > 1


def test_each_job_has_a_log(both: Path) -> None:
    assert len(list((both / "jobs" / "jobs").glob("*.err"))) >= len(list((both / "jobs" / "cells").iterdir()))


def test_a_study_of_jobs_that_is_complete_starts_none(both: Path) -> None:
    before = sorted((both / "jobs" / "jobs").iterdir())
    done = study(both, SMALL, "--output", str(both / "jobs"), *LOCAL)
    assert done.returncode == 0 and sorted((both / "jobs" / "jobs").iterdir()) == before


def test_a_mistake_of_a_cell_is_one_line_that_names_the_cell(tmp_path: Path) -> None:
    wrong = SMALL.replace("rate: 1.0e-3", "rate: 1.0e-3\n    max_length: 2")
    done = study(tmp_path, wrong, "--output", str(tmp_path / "jobs"), *LOCAL)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "strong-" in line and "max_length" in line and "Traceback" not in done.stderr


def test_settings_of_jobs_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--submitit: .*slurm_partitoin"):
        Jobs(1, tmp_path, {"cluster": "local", "slurm_partitoin": "gpu"})
    with pytest.raises(UserError, match=r"--submitit: .*nowhere"):
        Jobs(1, tmp_path, {"cluster": "nowhere"})
    if shutil.which("srun") is None:
        with pytest.raises(UserError, match=r"no SLURM here; --submitit '\{cluster: local\}'"):
            Jobs(1, tmp_path, {})
    done = study(tmp_path, SMALL, "--submitit", "{timeout_min: 3}")
    assert done.returncode == 2
    assert done.stderr == "error: --submitit has settings of jobs, which --launcher submitit starts\n"


def test_a_job_that_ends_without_a_result_names_its_log(tmp_path: Path) -> None:
    jobs = Jobs(1, tmp_path, {"cluster": "local", "timeout_min": 5})
    job = Job(jobs._jobs.submit(os._exit, 3))  # as a machine ends a job that takes too much memory
    with pytest.raises(UncompletedJobError) as caught:
        job.result()
    line = jobs.lost(job, caught.value)
    jobs.close()
    assert line is not None and str(job.job.paths.stderr) in line and "the finished runs are kept" in line
