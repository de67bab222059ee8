"""Settings of jobs, and what a cluster refuses: one line each, before anything is written."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_study import CONFIG

from deft_lightning.errors import UserError
from deft_lightning.study.cluster import Job, Jobs
from deft_lightning.study.command import main

pytest.importorskip("submitit", reason="jobs are started by submitit (pip install -e '.[test]')")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ("timeout_min: 2h", "timeout_min must be a whole number of minutes, at least 1, not '2h'"),
        ("timeout_min: 90.5", "timeout_min must be a whole number of minutes, at least 1, not 90.5"),
        ("mem_gb: 64GB", "mem_gb must be a number of gigabytes, such as 64, not '64GB'"),
        ("gpus_per_node: one", "gpus_per_node must be a whole number, at least 0, not 'one'"),
        ("local_gpus_per_node: one", "local_gpus_per_node must be a whole number, at least 0, not 'one'"),
        ("name: 3", 'Parameter "name" expected type'),
        ("tasks_per_node: 2", "tasks_per_node must be 1, not 2: each job is one cell, which one task runs"),
        ("nodes: 2", "nodes must be 1, not 2: each job is one cell"),
        ("slurm_ntasks_per_node: 2", "slurm_ntasks_per_node must be 1, not 2"),
        ("slurm_additional_parameters: {ntasks: 4}", "ntasks must be 1, not 4"),
    ],
)
def test_a_wrong_setting_is_one_line_and_nothing_is_written(
    settings: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "study.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    arguments = ["study", "--config", str(config), "--output", str(tmp_path / "out"), "--launcher", "submitit"]
    with pytest.raises(SystemExit) as caught:
        main([*arguments[1:], "--submitit", f"{{cluster: local, {settings}}}"])
    (told,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and told.startswith(f"error: --submitit: {line}")
    assert not (tmp_path / "out").exists()


def test_right_settings_are_taken(tmp_path: Path) -> None:
    given = {"timeout_min": 30, "mem_gb": 0.5, "gpus_per_node": 0, "nodes": 1, "tasks_per_node": 1, "name": None}
    Jobs(1, tmp_path, {"cluster": "local", **given}).close()


def test_what_sbatch_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a SLURM that refuses everything."""
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text(
            "#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpuu' >&2\n"
            "echo 'sbatch: error: Batch job submission failed' >&2\nexit 1\n",
            encoding="utf-8",
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    jobs = Jobs(1, tmp_path / "study", {"slurm_partition": "gpuu"})
    cell: Any = None
    with pytest.raises(UserError) as caught:
        jobs.submit(dict, cell)
    jobs.close()
    assert str(caught.value) == "--submitit: sbatch: error: invalid partition specified: gpuu"
    assert "sbatch" not in capsys.readouterr().err


def test_a_job_that_cannot_be_cancelled_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """As scancel ends where the job is over, and where there is no scancel any more."""

    def cancel(check: bool = True) -> None:
        if check:
            raise subprocess.CalledProcessError(1, "scancel")
        raise FileNotFoundError("scancel")

    job: Any = SimpleNamespace(job_id="7", cancel=cancel)
    Job(job).cancel()
    assert capsys.readouterr().err == "study: job 7 runs on: scancel\n"
