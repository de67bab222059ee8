"""Cells in parallel: one process per core, each cell on one thread, and none that outlives its study."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from deft_lightning.data.prepared.workers import follow_parent
from deft_lightning.errors import UserError, reason_of
from deft_lightning.study.plan import Cell
from deft_lightning.study.regime import DEFAULTS

Work = Callable[[Cell, Path], dict[str, Any]]


class Workers(ABC):
    """What runs cells, a few at a time, and a bar over the optimizer steps of all of them.

    Args:
        count: Cells at a time.
        root: Folder of the study.
    """

    def __init__(self, count: int, root: Path) -> None:
        self.count, self.root = count, root
        self._bar = tqdm(
            desc="study", unit="step", total=0, file=sys.stderr, mininterval=0 if sys.stderr.isatty() else 30,
            smoothing=0.05,
        )  # fmt: skip

    @abstractmethod
    def submit(self, work: Work, cell: Cell) -> Any:
        """Start a cell; return what has ``result()``, which raises its error, and ``cancel()``."""

    @abstractmethod
    def wait(self, running: Iterable[Any]) -> Iterable[Any]:
        """Wait for at least one of what :meth:`submit` has returned; return those that are done."""

    @abstractmethod
    def lost(self, future: Any, error: Exception) -> str | None:
        """Return how a cell was lost that did not end by itself, None for an error of its own."""

    def run(self, stage: str, work: Work, cells: Iterable[Cell], steps: Callable[[Cell], int]) -> None:
        """Run cells; the first error stops the study once the cells in hand are done, and is raised then.

        Each error is told as it comes, if others are in hand: these may take hours, and may end in errors too.

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
        waiting, running = list(reversed(todo)), dict[Any, Cell]()
        errors: list[Exception] = []
        try:
            while running or (waiting and not errors):
                while waiting and len(running) < self.count and not errors:
                    cell = waiting.pop()
                    try:
                        running[self.submit(work, cell)] = cell
                    except Exception as error:
                        self._note(errors, error, len(running))
                for future in self.wait(running) if running else ():
                    cell = running.pop(future)
                    try:
                        self._finish(future, cell)
                    except Exception as error:
                        self._note(errors, error, len(running))
                    else:
                        self._bar.update(steps(cell))
                    self._bar.set_postfix_str(f"{len(waiting) + len(running)} runs left", refresh=False)
        except BaseException:  # Ctrl-C, or a cluster that cannot be asked
            for future in running:
                future.cancel()
            raise
        if errors:
            raise errors[0]

    def _note(self, errors: list[Exception], error: Exception, in_hand: int) -> None:
        """Keep an error; tell it, unless it is the only one and ends the study now."""
        if errors or in_hand:
            rest = f" (waiting for runs in hand: {in_hand}; Ctrl-C ends them)" if in_hand else ""
            self._bar.write(f"study: {reason_of(error)}{rest}", file=sys.stderr)
        errors.append(error)

    def _finish(self, future: Any, cell: Cell) -> None:
        try:
            future.result()
        except UserError as error:
            reason = re.sub(rf"--(?:data|model)\.({'|'.join(DEFAULTS)})\b", r"\1 of the regime:", str(error))
            raise UserError(f"{cell.label}: {reason}") from None
        except Exception as error:
            if (how := self.lost(future, error)) is None:
                raise
            raise UserError(f"{cell.label}: {how}") from None

    def close(self) -> None:
        """End the bar."""
        self._bar.close()

    def __enter__(self) -> Self:
        """Return the workers; the first starts with the first cell."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, where: object) -> None:
        """End what runs; what it has in hand after an error is left: results are written whole or not at all."""
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None  # an impatient Ctrl-C would leave it
        try:
            self.close()
        finally:
            if main:
                signal.signal(signal.SIGINT, before)


class Pool(Workers):
    """Processes of this machine, each on one thread.

    Args:
        count: Processes.
        root: Folder of the study.
    """

    def __init__(self, count: int, root: Path) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come: two busy threads on a core are slower than one
        super().__init__(count, root)
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin)

    def submit(self, work: Work, cell: Cell) -> Any:
        """Give a cell to a process."""
        return self._pool.submit(work, cell, self.root)

    def wait(self, running: Iterable[Any]) -> Iterable[Any]:
        """Wait for a process to be done with a cell."""
        return wait(running, return_when=FIRST_COMPLETED).done

    def lost(self, future: Any, error: Exception) -> str | None:
        """Return what a process that was killed says."""
        if not isinstance(error, BrokenProcessPool):
            return None
        return (
            "a worker was killed, perhaps because memory ran out; the finished runs are kept, start"
            " again with fewer --workers"
        )

    def close(self) -> None:
        """End the processes."""
        # Asked to leave, they would wait for each other; Lightning would catch a SIGTERM.
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(cancel_futures=True)
        super().close()


def _begin() -> None:
    """Make a process one thread, and end it when the study is gone, however that ended."""
    follow_parent()
    import torch

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a process that is ended would leave behind
