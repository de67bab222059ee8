"""Processes that prepare: one that is killed at the worst moment holds up nobody."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest

from deft_lightning.data.prepared.workers import in_order

pytestmark = pytest.mark.slow


def square(number: int) -> int:
    return number * number


def nothing() -> None:
    """What each process does first."""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, stopped and killed as on Linux")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_killed_while_the_others_are_sent_home_holds_up_nobody(victim: int) -> None:
    """An idle worker holds the lock of the queue of jobs: killed with it, it would keep the others from being told."""
    results = in_order(square, [(n,) for n in range(6)], 2, "fork", nothing, ())
    assert [next(results) for _ in range(6)] == [n * n for n in range(6)]
    workers = sorted(process.pid or 0 for process in multiprocessing.active_children())
    assert len(workers) == 2
    time.sleep(0.3)  # until both wait for a job
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    ending = threading.Thread(target=lambda: list(results), daemon=True)
    ending.start()
    time.sleep(0.3)  # the ending waits for them
    for pid, number in ((workers[victim], signal.SIGKILL), (workers[1 - victim], signal.SIGCONT)):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # sent home already
    ending.join(15)
    held_up = ending.is_alive()
    for process in multiprocessing.active_children():
        process.kill()
    assert not held_up
