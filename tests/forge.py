"""Scripts in processes that are forked from one that has imported the libraries already, and has done nothing else.

A rank takes longer to import torch, Lightning and transformers than many tests take to train. Nothing is shared but
these modules: a forked process has its own environment, folder, arguments, output and session.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS = 300.0  # many times what imports take on a busy machine
_FORGES: dict[tuple[str, int], Forge] = {}


class Forge:
    """A process that forks others; it ends with this one.

    Args:
        environment: Of its imports.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        # In a session of its own: a Ctrl-C is for the tests, which end what they have started.
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def ask(self, **request: Any) -> Any:
        """Send a request, return the answer.

        Raises:
            RuntimeError: There is none.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            if select.select([self._process.stdout], [], [], SECONDS)[0] and (line := self._process.stdout.readline()):
                return json.loads(line)
        self._process.kill()
        raise RuntimeError(f"the process that forks others gives no answer to {request}")

    @property
    def alive(self) -> bool:
        """Return whether it can be asked."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it; what it forked goes on."""
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.communicate("")


class Forged:
    """A process that a forge has forked; it leads a session.

    Args:
        forge: Whose it is.
        pid: Its number.
    """

    def __init__(self, forge: Forge, pid: int) -> None:
        self._forge, self.pid, self._code = forge, pid, None

    def poll(self) -> int | None:
        """Return its exit status, minus the signal that ended it, or None while it runs."""
        if self._code is None:
            self._code = self._forge.ask(poll=self.pid)
        return self._code

    def kill(self) -> None:
        """End it with its session, whether its forge answers or not, and wait until it has ended."""
        if self._code is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # it leads no session yet
        end = time.monotonic() + 10
        with contextlib.suppress(RuntimeError):
            while self.poll() is None and time.monotonic() < end:
                time.sleep(0.01)


def start_forged(
    script: Path, arguments: Sequence[str], common: Mapping[str, str], own: Mapping[str, str], folder: Path, log: Path,
    number: int = 0,
) -> Forged:  # fmt: skip
    """Run ``script ARGUMENTS`` in a new process.

    Args:
        script: As for ``python``.
        arguments: Of the script.
        common: Environment of the libraries' imports; the same for all processes of a forge.
        own: What the process has in its environment beside.
        folder: Where it runs.
        log: File for all output.
        number: Of the forge. Processes of one share the seed of their hashes, which those of different machines do not.
    """
    key = json.dumps(dict(common), sort_keys=True), number
    if key not in _FORGES or not _FORGES[key].alive:
        for old in [old for old in _FORGES if old[0] != key[0]]:  # half a gigabyte each
            _FORGES.pop(old).close()
        _FORGES[key] = Forge(common)
        atexit.register(_FORGES[key].close)
    forge = _FORGES[key]
    request = {"script": str(script), "arguments": list(arguments), "own": dict(own)}
    return Forged(forge, forge.ask(**request, folder=str(folder), log=str(log)))


def _become(request: dict[str, Any]) -> None:
    """Make this forked process that of a request, and run its script."""
    os.setsid()
    null, log = os.open(os.devnull, os.O_RDONLY), os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for at, given in enumerate((null, log, log)):
        os.dup2(given, at)
    os.environ.update(request["own"])
    os.chdir(request["folder"])
    sys.argv = [request["script"], *request["arguments"]]
    sys.path[0] = str(Path(request["script"]).parent)
    from lightning_utilities.core.rank_zero import rank_zero_only

    rank_zero_only.rank = int(os.environ.get("RANK", 0))  # Lightning reads it at its import
    import runpy

    import numpy as np
    import torch

    # As a process that has imported them itself: numbers that no other rank draws.
    torch.seed()
    np.random.seed()

    runpy.run_path(request["script"], run_name="__main__")


def _serve() -> dict[str, Any] | None:
    """Answer requests until there are no more; in a forked process return its own."""
    # What libraries print while they are imported is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import lightning.pytorch  # noqa: F401
    import torch._dynamo  # noqa: F401 - the first step of an optimizer imports it
    import transformers  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                answers.close()
                return request
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return None


if __name__ == "__main__":
    found = _serve()
    if found is not None:
        _become(found)
