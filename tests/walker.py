"""Walks through what pages tell to do: real processes, their outputs, and the time that each of them took."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from page_commands import ROOT

MODELS = ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-0.5B")  # of the pages; another one takes their place
ROWS = "my.jsonl"


def require(fact: bool, otherwise: str) -> None:
    """Stop the walk where a page does not lead to what it says.

    Raises:
        RuntimeError: With ``otherwise``.
    """
    if not fact:
        raise RuntimeError(otherwise)


def table(steps: Sequence[Mapping[str, Any]]) -> str:
    """Return steps as a table in Markdown."""
    rows = []
    for row in steps:
        minutes = f"{row['seconds'] / 60:.1f} | {row['processor_s'] / 60:.1f}"
        rows.append(f"| {row['step']} | {_shown(row['typed'])} | {minutes} | {row['sees']} |")
    return "\n".join(["| step | command | minutes | of a processor | what one sees |", "|---|---|---|---|---|", *rows])


def _shown(typed: str) -> str:
    begin = "python -m deft_lightning "
    return f"`{typed.removeprefix(begin)}`" if typed.startswith(begin) else typed


class Walker:
    """Runs commands of pages in a folder and notes what they took.

    Args:
        folder: Where the commands run, made if it is not there.
        model: Takes the place of the model of the pages.
        rows: Take the place of their file.

    Attributes:
        steps: What was done, with page, command, seconds of the clock and of processors, and what one saw.
    """

    def __init__(self, folder: Path, model: str, rows: Sequence[Mapping[str, str]]) -> None:
        self.folder, self.model = folder, str(Path(model).resolve())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "my.json").write_text(json.dumps(list(rows)), encoding="utf-8")
        self.steps = list[dict[str, Any]]()
        self._environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "DEFT_LIGHTNING_CACHE": str(folder / "prepared"),
            "HF_DATASETS_CACHE": str(folder / "datasets"),
        }  # fmt: skip

    def run(self, number: int, folder: str = ".") -> Path:
        """Return the folder of a run."""
        return self.folder / folder / "logs" / f"version_{number}"

    def see(self, what: str, **more: Any) -> None:
        """Note what the last step has shown."""
        self.steps[-1].update(sees=what, **more)
        print(f"{self.steps[-1]['step']}: {self.steps[-1]['seconds']:.0f} s, {what}", flush=True)

    @contextmanager
    def step(self, name: str, page: str, typed: str) -> Iterator[None]:
        """Time a step; of processors that of the processes that have ended in it."""
        begun, spent = time.perf_counter(), _processors()
        yield
        seconds, used = time.perf_counter() - begun, _processors() - spent
        self.steps.append(
            {"step": name, "page": page, "typed": typed, "seconds": round(seconds, 1), "processor_s": round(used, 1)}
        )

    def deft(
        self, name: str, page: str, words: Sequence[str], *more: str, interrupt: str = "", folder: str = ".",
        inputs: Sequence[str] = (),
    ) -> str:  # fmt: skip
        """Run a command of a page and return what it said.

        Args:
            name: Of the step.
            page: That has the command.
            words: Those behind ``python -m deft_lightning``.
            more: Added to them.
            interrupt: A line like this is answered by Ctrl-C.
            folder: Where it runs, in the folder of the walk.
            inputs: Files of the walk that it reads in another folder.
        """
        place = self.folder / folder
        place.mkdir(exist_ok=True)
        for file in inputs:
            shutil.copy(self.folder / file, place / file)
        typed = shlex.join(["python", "-m", "deft_lightning", *words, *more])
        known = {**dict.fromkeys(MODELS, self.model), ROWS: str(self.folder / "my.json")}
        told = [str(ROOT / word) if word.startswith("configs/") else known.get(word, word) for word in words]
        with self.step(name, page, typed):
            return self._say(place, ["-m", "deft_lightning", *told, *more], interrupt)

    def script(self, name: str, page: str, code: str) -> str:
        """Run code that begins as the code of a page, and return what it said."""
        for model in MODELS:
            code = code.replace(model, self.model)
        file = self.folder / f"{name.replace(' ', '_')}.py"
        file.write_text(code, encoding="utf-8")
        with self.step(name, page, "the code of the page"):
            return self._say(self.folder, [file.name])

    def _say(self, place: Path, arguments: Sequence[str], interrupt: str = "") -> str:
        said = []
        with subprocess.Popen(
            [sys.executable, *arguments], cwd=place, env=self._environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line)
                if interrupt and re.search(interrupt, line):
                    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
                    interrupt = ""
        output = "".join(said)
        require(process.returncode == 0, f"{shlex.join(arguments)} ended with {process.returncode}: {output[-3000:]}")
        require(not interrupt, f"no line like {interrupt}: {output[-3000:]}")
        return output


def _processors() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
