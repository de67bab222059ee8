"""Processes that do a part of the work, and never outlive the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

from deft_lightning.errors import UserError

T = TypeVar("T")


def follow_parent() -> None:
    """End this process when the one that started it is gone, however that ended; Ctrl-C and SIGTERM are the parent's.

    A terminal sends SIGINT, and a scheduler SIGTERM, to all processes of a group.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(sentinel: Any) -> None:
    wait([sentinel])
    os._exit(1)


def _begin(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    follow_parent()
    start(*arguments)


def in_order(
    work: Callable[..., T],
    jobs: Iterable[tuple[Any, ...]],
    workers: int,
    method: str,
    start: Callable[..., None],
    arguments: tuple[Any, ...],
) -> Iterator[T]:
    """Yield the results of jobs in order; at most two a worker are under way, so that memory holds no more.

    Args:
        work: Function of a job, importable.
        jobs: Its arguments.
        workers: Processes.
        method: How they are started, ``fork`` or ``spawn``.
        start: What each does first.
        arguments: Arguments of that.

    Raises:
        UserError: A worker was killed.
    """
    jobs = iter(jobs)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), _begin, (start, arguments))
    try:
        waiting = [pool.submit(work, *job) for job in islice(jobs, 2 * workers)]
        while waiting:
            result = waiting.pop(0).result()
            waiting.extend(pool.submit(work, *job) for job in islice(jobs, 1))
            yield result
    except BrokenProcessPool:  # told by a result, or by the next job that is given to it
        raise UserError(
            "preparing the data: a worker process was killed, perhaps because memory ran out; start again with fewer"
            f" (--data.num_proc {max(1, workers // 2)})"
        ) from None
    finally:
        # Their results are here, or nobody waits for them. Asked to leave, they would wait for a lock of the queue
        # that one of them holds, for ever if it was killed with it.
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(cancel_futures=True)
