"""Scripts in processes that are forked from one that has imported the libraries already, and has done nothing else.

A rank takes longer to import torch, Lightning and transformers than many tests take to train. Nothing is shared but
these modules: a forked process has its own environment, folder, arguments, output and session.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_FORGES: dict[str, Forge] = {}


class Forge:
    """A process that forks others; it ends with this one.

    Args:
        environment: Of its imports.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> Any:
        """Send a request, return the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End it; what it forked goes on."""
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


def start_forged(
    script: Path, arguments: Sequence[str], common: Mapping[str, str], own: Mapping[str, str], folder: Path, log: Path
) -> Forged:
    """Run ``script ARGUMENTS`` in a new process.

    Args:
        script: As for ``python``.
        arguments: Of the script.
        common: Environment of the libraries' imports; the same for all processes of a forge.
        own: What the process has in its environment beside.
        folder: Where it runs.
        log: File for all output.
    """
    key = json.dumps(dict(common), sort_keys=True)
    if key not in _FORGES:
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
