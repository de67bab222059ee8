"""Kill the preparation of data at random moments: the next run ends right, and nothing is left of the one before.

    python tests/kill_preparation.py [--kills 20] [--seed 0]

Every run is ``python -m deft_lightning preview`` with two worker processes, ended in the middle of its preparation: by
SIGKILL of the process that prepares, of a worker, of the whole group, or by SIGTERM. The run after it prepares the same
rows under the same key or another one, with a cache or without. What it prepares must be, byte for byte, what a run
that was left alone prepares; no process, no half-written folder, no lock and no temporary folder may be left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from kill_runs import left as processes_of

ROOT = Path(__file__).resolve().parents[1]


class Running(Protocol):
    """A process that leads a group of its own."""

    pid: int

    def ended(self, seconds: float) -> int | None:
        """Wait for the process; return its status, None if it still runs."""


Start = Callable[[Path, int, bool], Running]  # folder, which key, with a cache


class Command:
    """A run of the command line."""

    def __init__(self, root: Path, which: int, cache: bool) -> None:
        command = [
            sys.executable, "-m", "deft_lightning", "preview", "--data.source", str(root / "rows.jsonl"),
            "--data.num_proc", "2", "--data.tokenizer_size", "1000", "--data.max_length", str(500 + which),
            "--data.cache", str(cache).lower(), "--trainer.accelerator", "cpu", "--trainer.logger", "false",
            "--output", str(root / "page.html"),
        ]  # fmt: skip
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT),
            "DEFT_LIGHTNING_CACHE": str(root / "cache"), "TMPDIR": str(root / "tmp"),
        }  # fmt: skip
        with (root / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.pid = self._process.pid

    def ended(self, seconds: float) -> int | None:
        """Wait for the process; return its status, None if it still runs."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


def no_process(leader: int) -> bool:
    """Whether a group is gone."""
    return not processes_of(leader)


def until(condition: Callable[[], Any], seconds: float, otherwise: str) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(0.005)


def half(root: Path) -> list[Path]:
    """Folders that are being prepared, and temporary ones."""
    return [path for place in (root / "cache" / "data", root / "tmp") for path in place.glob(".*")]


def prepared_tables(root: Path) -> set[str]:
    """Digests of the training tables in the cache."""
    tables = (path for path in (root / "cache" / "data").rglob("train.arrow"))
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in tables}


def write_rows(root: Path, count: int) -> None:
    """Write the rows, and make the folders."""
    rows = ({"question": f"{i} + {i * 7}", "answer": f"It is {8 * i}." * (1 + i % 9)} for i in range(count))
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "tmp").mkdir()


def kill_and_go_on(root: Path, start: Start, kills: int, seed: int) -> dict[str, Any]:
    """Return what became of the preparations.

    Args:
        root: Folder for everything, with the rows.
        start: Begins a run, in a process group of its own.
        kills: How many runs are killed.
        seed: Of the moments and the ways.
    """
    draw, ways = random.Random(seed), []
    process = start(root, 0, True)
    until(lambda: half(root), 120, "it does not begin")
    began = time.monotonic()
    assert process.ended(600) == 0, (root / "log").read_text()[-2000:] if (root / "log").exists() else ""
    takes, expected = time.monotonic() - began, prepared_tables(root)
    assert len(expected) == 1
    for number in range(1, kills + 1):
        cache = draw.random() < 0.7
        process = start(root, 2 * number, cache)
        until(lambda: half(root), 120, "it does not begin")
        status = process.ended(draw.uniform(0.0, 0.9 * takes))
        if status is None:
            way = draw.choice(("SIGKILL", "SIGKILL", "SIGKILL of the group", "SIGKILL of a worker", "SIGTERM"))
            others = [pid for pid in processes_of(process.pid) if pid != process.pid]
            try:
                if way == "SIGKILL of the group":
                    os.killpg(process.pid, signal.SIGKILL)
                elif way == "SIGKILL of a worker" and others:
                    os.kill(draw.choice(others), signal.SIGKILL)
                else:
                    os.kill(process.pid, signal.SIGTERM if way == "SIGTERM" else signal.SIGKILL)
            except ProcessLookupError:
                way = "ended by itself"
            status = process.ended(60)
            assert status is not None, f"{way}: it goes on"
            if way == "SIGTERM":
                assert not half(root), f"{way}: something is left at once"
        else:
            way = "ended by itself"
        until(partial(no_process, process.pid), 20, f"{way}: a process is left")
        ways.append(way)
        # The same key, or one that nobody has prepared.
        process = start(root, 2 * number + draw.randrange(2), True)
        assert process.ended(600) == 0, f"after {way}"
        assert prepared_tables(root) == expected, f"after {way}: something else is prepared"
        left = [*half(root), *(root / "cache").rglob("*.lock")]
        assert not left, f"after {way}: {left}"
    return {"kills": kills, "ways": ways, "prepared differently": 0, "left behind": 0}


def main() -> None:
    """Parse and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=30_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), args.rows)
        found = kill_and_go_on(Path(folder), Command, args.kills, args.seed)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
