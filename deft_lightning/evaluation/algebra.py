"""Equality of answers by computer algebra, in a process of its own that may be killed."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import warnings
from functools import lru_cache
from typing import Any

from deft_lightning.errors import UserError

SECONDS = 3  # of processor time for one comparison; those of MATH500 take 0.01
MEBIBYTES = 2048


class Algebra:
    """Asks a worker process; starts it when it is first needed, and again after a question that killed it.

    Safe in any thread and in forked processes; what is asked at once is answered one after the other.

    Args:
        seconds: Processor time for one question.
        mebibytes: Address space of the worker.
    """

    def __init__(self, seconds: int = SECONDS, mebibytes: int = MEBIBYTES) -> None:
        self.seconds, self.mebibytes = seconds, mebibytes
        self.given_up = 0
        self._worker: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._forget)

    def same(self, gold: str, said: str, digits: int = 6) -> bool:
        """Whether two answers in LaTeX are equal; False where that is not found out in time.

        Args:
            gold: The right answer.
            said: The model's answer, at most a few hundred letters.
            digits: Decimals that numbers are rounded to.
        """
        return self._ask("same", gold, said, digits) is True

    def form(self, said: str) -> str | None:
        """Return a text that is the same for answers that parse to the same; None where it does not parse in time."""
        answer = self._ask("form", said)
        return answer if isinstance(answer, str) else None

    def close(self) -> None:
        """End the worker, if there is one."""
        with self._lock:
            self._stop()

    def _ask(self, *question: Any) -> Any:
        with self._lock:
            try:
                for _ in range(2):  # a worker that ended between questions is no answer
                    worker = self._started()
                    assert worker.stdin is not None and worker.stdout is not None
                    try:
                        worker.stdin.write(json.dumps(question) + "\n")
                        worker.stdin.flush()
                    except OSError:
                        self._stop()
                        continue
                    if line := worker.stdout.readline():
                        return json.loads(line)
                    break
            except BaseException:
                self._stop()  # its answer, if it comes, must not be taken for that to the next question
                raise
            self._stop()
            self.given_up += 1
        warnings.warn(
            f"the grader gave up on {str(question[-2 if question[0] == 'same' else -1])[:60]!r} after {self.seconds} s"
            f" or {self.mebibytes} MiB; it counts as no answer",
            stacklevel=3,
        )
        return None

    def _started(self) -> subprocess.Popen[str]:
        if self._worker is None or self._worker.poll() is not None:
            if os.name != "posix":
                raise UserError("grading of mathematics needs a POSIX system: its limits of time are the kernel's")
            command = [sys.executable, "-m", f"{__package__}.algebra_worker", str(self.seconds), str(self.mebibytes)]
            paths = os.pathsep.join(path for path in sys.path if path)
            self._worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
                env={**os.environ, "PYTHONPATH": paths},
            )  # fmt: skip
            assert self._worker.stdout is not None
            if not self._worker.stdout.readline():
                raise UserError(f"the grader of mathematics does not start; why, says: {' '.join(command)}")
        return self._worker

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            for pipe in (self._worker.stdin, self._worker.stdout):
                with contextlib.suppress(OSError):  # a question that was not taken
                    assert pipe is not None
                    pipe.close()
            self._worker = None

    def _forget(self) -> None:
        self._worker, self._lock = None, threading.Lock()  # the parent's


@lru_cache(maxsize=1)
def algebra() -> Algebra:
    """Return the one of this process."""
    made = Algebra()
    atexit.register(made.close)
    return made
