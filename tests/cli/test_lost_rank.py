"""A rank that is killed: the other ends, one line says so, no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from worlds import ROOT, fit_command

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_rank_is_one_line_that_says_how_to_go_on(victim: int, tmp_path: Path) -> None:
    arguments = fit_command(tmp_path, "--after_fit.export", "false", "--trainer.strategy", "ddp")
    arguments[arguments.index("--trainer.devices") + 1] = "2"
    arguments[arguments.index("--trainer.max_steps") + 1] = "100000"
    arguments[arguments.index("--checkpoint.every_n_train_steps") + 1] = "20"
    with subprocess.Popen(
        [sys.executable, "-m", "deft_lightning", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, cwd=ROOT, start_new_session=True, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    ) as run:  # fmt: skip
        try:
            deadline = time.monotonic() + 180
            while not list(tmp_path.rglob("*.ckpt")) and run.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            ranks = [run.pid, *_children(run.pid)]
            os.kill(ranks[victim], signal.SIGKILL)
            said, _ = run.communicate(timeout=60)  # ends with the last process that holds the pipe
        finally:
            for process in (run.pid, *_children(run.pid)):
                if run.poll() is None:
                    os.kill(process, signal.SIGKILL)
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert f"rank {victim} was lost" in line and "--ckpt_path last" in line and "Traceback" not in said


def _children(parent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(parent)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "deft_lightning" in line]
