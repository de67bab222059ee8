"""Questions to computer algebra, many at once: asked in parallel, and each only once."""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from deft_lightning.evaluation.graders.algebra import Algebra, GaveUp

Question = tuple[Any, ...]
MOST = 8  # worker processes of one process
NESTED = 40  # brackets within each other; in MATH500 there are five
LONGEST = 2_000  # letters of a right answer; in MATH500 there are 53


class Judge:
    """Asks several workers, and remembers every answer, also that there was none.

    An answer depends on its question alone: neither on the other questions, nor on the number of workers, nor on which
    of them is faster, nor on the load of the machine.

    Args:
        workers: Processes at most; they start when there is something to ask them.
    """

    def __init__(self, workers: int = 1) -> None:
        self.workers = max(1, min(workers, MOST))
        self.memory: dict[Question, Any] = {}
        self._algebras: list[Algebra]
        self._free: queue.LifoQueue[Algebra]
        self._reset()
        os.register_at_fork(after_in_child=self._reset)  # the workers are the parent's

    def ask(self, question: Question) -> Any:
        """Return an answer, or :class:`~deft_lightning.evaluation.graders.algebra.GaveUp`."""
        if question not in self.memory:
            self.settle([question])
        return self.memory[question]

    def settle(self, questions: Iterable[Question], seen: Callable[[int], Any] = lambda n: None) -> None:
        """Find the answers to many questions.

        Args:
            questions: Those that were answered before cost nothing.
            seen: Is called with the number of questions, new ones, that have been answered since the last call.

        Raises:
            UserError: A worker does not start, or is killed again and again.
        """
        new = list(dict.fromkeys(question for question in questions if question not in self.memory))
        if len(new) == 1 or self.workers == 1:
            for question in new:
                self.memory[question] = self._asked(question)
                seen(1)
            return
        with ThreadPoolExecutor(self.workers, "grader") as pool:
            try:
                for question, answer in zip(new, pool.map(self._asked, new), strict=True):
                    self.memory[question] = answer
                    seen(1)
            except BaseException:  # Ctrl-C, or no process to be had: nobody waits for what is being asked
                pool.shutdown(wait=False, cancel_futures=True)
                for algebra in self._algebras:
                    algebra.kill()
                self._reset()
                raise

    def share(self, processes: int) -> None:
        """Take no more workers than this process's part of the cores, of which so many processes have equal parts."""
        self.workers = cores(processes)

    def close(self) -> None:
        """End the workers."""
        for algebra in self._algebras:
            algebra.close()

    def _asked(self, question: Question) -> Any:
        if (limit := limit_of(question)) is not None:
            return GaveUp(limit)
        free = self._free
        algebra = self._taken(free)
        try:
            return algebra.ask(question)
        finally:
            free.put(algebra)

    def _taken(self, free: queue.LifoQueue[Algebra]) -> Algebra:
        """Return a worker that is free, a new one, or wait for one."""
        with self._lock:
            if free.empty() and len(self._algebras) < self.workers:
                self._algebras.append(Algebra())
                return self._algebras[-1]
        return free.get()

    def _reset(self) -> None:
        self._algebras, self._free, self._lock = [], queue.LifoQueue(), threading.Lock()


def limit_of(question: Question) -> str | None:
    """Return the limit that a question exceeds as it stands: length of the right answer, nesting of brackets."""
    texts = [text for text in question[1:3] if isinstance(text, str)]
    if any(len(text) > LONGEST for text in texts):
        return "length"
    for text in texts:
        depth = 0
        for letter in text:
            depth += (letter in "([{") - (letter in ")]}")
            if depth > NESTED:
                return "nesting"
    return None


def cores(share_among: int = 1) -> int:
    """Return how many workers a process may have that shares this machine with others like it."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(mine // max(1, share_among), MOST))


@lru_cache(maxsize=1)
def judge() -> Judge:
    """Return the one of this process; ranks of one machine share its cores."""
    made = Judge(cores(int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))
    atexit.register(made.close)
    return made
