"""Cells in parallel: one process a core, each cell on one thread, and none that outlives its study."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from deft_lightning.data.prepared.workers import follow_parent
from deft_lightning.errors import UserError
from deft_lightning.study.plan import Cell
from deft_lightning.study.regime import DEFAULTS

Work = Callable[[Cell, Path], dict[str, Any]]


class Pool:
    """Processes that run cells, and a bar over the optimizer steps of all of them.

    Args:
        workers: Processes.
        root: Folder of the study.
    """

    def __init__(self, workers: int, root: Path) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come: two busy threads on a core are slower than one
        self.root = root
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
        self._bar = tqdm(
            desc="study", unit="step", total=0, file=sys.stderr, mininterval=0 if sys.stderr.isatty() else 30,
            smoothing=0.05,
        )  # fmt: skip

    def run(self, stage: str, work: Work, cells: Iterable[Cell], steps: Callable[[Cell], int]) -> None:
        """Run cells; the first error stops the study once the cells in hand are done.

        Args:
            stage: What the bar says.
            work: Function of a cell and the folder, importable.
            cells: The cells.
            steps: Optimizer steps of a cell.
        """
        todo = list(cells)
        self._bar.total = (self._bar.total or 0) + sum(map(steps, todo))
        self._bar.set_postfix_str(f"{len(todo)} runs left", refresh=False)
        self._bar.set_description(f"study: {stage}")
        running = {self._pool.submit(work, cell, self.root): cell for cell in todo}
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    cell = running.pop(future)
                    self._finish(future, cell)
                    self._bar.set_postfix_str(f"{len(running)} runs left", refresh=False)
                    self._bar.update(steps(cell))
        except BaseException:
            for future in running:
                future.cancel()
            raise

    def _finish(self, future: Any, cell: Cell) -> None:
        try:
            future.result()
        except UserError as error:
            reason = re.sub(rf"--(?:data|model)\.({'|'.join(DEFAULTS)})\b", r"\1 of the regime:", str(error))
            raise UserError(f"{cell.label}: {reason}") from None
        except BrokenProcessPool:
            raise UserError(
                f"{cell.label}: a worker was killed, perhaps because memory ran out; the finished runs are kept, start"
                " again with fewer --workers"
            ) from None

    def __enter__(self) -> Self:
        """Return the pool; its processes start with the first cell."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, where: object) -> None:
        """End the processes; what they have in hand after an error is left: results are written whole or not at all."""
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None  # an impatient Ctrl-C would leave them
        try:
            # Asked to leave, they would wait for each other; Lightning would catch a SIGTERM.
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            self._pool.shutdown(cancel_futures=True)
            self._bar.close()
        finally:
            if main:
                signal.signal(signal.SIGINT, before)


def _begin() -> None:
    """Make a process one thread, and end it when the study is gone, however that ended."""
    follow_parent()
    import torch

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a process that is ended would leave behind
