"""A process that compares answers by computer algebra, seen from outside: it may be killed, and is started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any, NamedTuple

from deft_lightning.errors import UserError

SECONDS = 3.0  # of processor time for one question, behind the limit of calls, which takes about one
CALLS = 500_000  # of Python functions for one question; of 2,100 pairs of MATH500's answers the longest takes 400,000
MEBIBYTES = 1024  # of address space; math-verify and sympy take a fifth of it
DEATHS = 3  # of the process in a row for which the same question is asked again
LIMITS = {
    "calls": "too many steps", "size": "too large a number", "time": "too long a computation",
    "memory": "too much memory", "nesting": "brackets nested too deeply", "length": "too long a right answer",
}  # fmt: skip


class GaveUp(NamedTuple):
    """Stands for an answer that was not found, and names the limit, one of ``LIMITS``, that ended the question."""

    limit: str


class Algebra:
    """Asks a worker process; starts it when it is first needed, and again if somebody killed it.

    Safe in any thread and in forked processes; what is asked at once is answered one after the other.

    Args:
        seconds: Processor time for one question.
        mebibytes: Address space of the worker.
        calls: Calls of Python functions for one question.
    """

    def __init__(self, seconds: float = SECONDS, mebibytes: int = MEBIBYTES, calls: int = CALLS) -> None:
        self.seconds, self.mebibytes, self.calls = seconds, mebibytes, calls
        self._worker: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._closed = False
        os.register_at_fork(after_in_child=self._forget)

    def same(self, gold: str, answer: str, digits: int = 6) -> bool:
        """Return whether two answers in LaTeX are equal; False where a limit comes before the answer.

        Args:
            gold: The right answer.
            answer: The model's answer, at most a few hundred letters.
            digits: Decimals that numbers are rounded to.
        """
        return self.ask(("same", gold, answer, digits)) is True

    def form(self, latex: str) -> str | None:
        """Return a text that is the same for answers that parse to the same; None where it does not parse in time."""
        answer = self.ask(("form", latex))
        return answer if isinstance(answer, str) else None

    def ask(self, question: tuple[Any, ...]) -> Any:
        """Return the answer to a question of the worker's, what is asked and its arguments, or :class:`GaveUp`.

        Raises:
            UserError: The worker does not start, or is killed whenever it is asked.
        """
        line = json.dumps([self.calls, self.seconds, *question])
        with self._lock:
            for _ in range(DEATHS):
                try:
                    reply = self._reply(line)
                except BaseException:
                    self._stop()  # its answer, if it comes, must not be taken for that to the next question
                    raise
                if reply is not None:
                    break
                self._stop()
            else:
                raise UserError(
                    f"the grader of mathematics was killed {DEATHS} times at the same answer (too little memory?)"
                )
            what, value = reply
            if what == "failed":
                raise UserError(f"the grader of mathematics cannot start a process ({value})")
            return GaveUp(value) if what == "gave_up" else value

    def close(self) -> None:
        """End the worker, if there is one."""
        with self._lock:
            self._stop()

    def kill(self) -> None:
        """End the worker in the middle of a question, which raises an error in the thread that asked; for good."""
        self._closed = True
        if (worker := self._worker) is not None:
            _kill(worker)

    def _reply(self, line: str) -> list[Any] | None:
        worker = self._started()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(line + "\n")
            worker.stdin.flush()
        except OSError:
            return None
        reply = worker.stdout.readline()
        return json.loads(reply) if reply.endswith("\n") else None

    def _started(self) -> subprocess.Popen[str]:
        if self._worker is None or self._worker.poll() is not None:
            self._stop()
            if os.name != "posix":
                raise UserError("grading mathematics needs a POSIX system, whose kernel limits its time")
            command = [sys.executable, "-m", f"{__package__}.algebra_worker", str(self.mebibytes)]
            paths = os.pathsep.join(path for path in sys.path if path)
            try:
                self._worker = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                    encoding="utf-8", process_group=0,
                    # Sets of texts in the same order everywhere: the number of calls depends on it.
                    env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "0"},
                )  # fmt: skip
            except OSError as error:
                raise UserError(f"the grader of mathematics does not start ({error.strerror})") from None
            assert self._worker.stdout is not None
            if not self._worker.stdout.readline():
                raise UserError(f"the grader of mathematics does not start; the reason is in {' '.join(command)}")
        if self._closed:  # by another thread, perhaps while it started
            self._stop()
            raise UserError("the grader of mathematics was closed")
        return self._worker

    def _stop(self) -> None:
        if self._worker is not None:
            _kill(self._worker)
            self._worker.wait()
            for pipe in (self._worker.stdin, self._worker.stdout):
                with contextlib.suppress(OSError):  # a question that was not taken
                    assert pipe is not None
                    pipe.close()
            self._worker = None

    def _forget(self) -> None:
        self._worker, self._lock = None, threading.Lock()  # the parent's


def _kill(worker: subprocess.Popen[str]) -> None:
    """Kill a worker and the fork that answers for it."""
    if worker.returncode is None:  # it was not waited for, so nobody else has its number
        with contextlib.suppress(OSError):
            os.killpg(worker.pid, signal.SIGKILL)
