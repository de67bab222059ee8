"""Ranks as real processes: started together, waited for, and shown and killed when one fails or hangs."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from forge import Forged, start_forged

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600.0  # many times what they take on a quiet machine


def run_ranks(script: Path, root: Path, *arguments: str, worlds: Sequence[int] = (2,)) -> None:
    """Run ``script ROOT ARGUMENTS`` in every rank of every world at once; fail the test if one fails.

    Args:
        script: What each rank runs, with RANK, LOCAL_RANK, WORLD_SIZE and MASTER_* set.
        root: Folder to run in; output goes to ``WORLD-RANK.log`` there.
        arguments: Of the script, after the folder.
        worlds: Sizes of the groups to start, each on a port of its own.
    """
    names = [(world, rank) for world in worlds for rank in range(world)]
    ports = dict(zip(worlds, free_ports(len(worlds)), strict=True))
    processes: list[Forged] = []
    deadline = time.monotonic() + SECONDS
    try:
        for world, rank in names:
            processes.append(_start(script, root, arguments, world, rank, ports[world]))
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() for process in processes):
                break  # one has failed, and another may wait for it
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(code != 0 for code in codes):
        logs = [
            f"--- rank {rank} of {world}\n{(root / f'{world}-{rank}.log').read_text(errors='replace')[-3000:]}"
            for world, rank in names
        ]
        pytest.fail("\n".join([f"ranks ended with {codes}", *logs]), pytrace=False)


def free_ports(count: int) -> list[int]:
    """Return ports that were free a moment ago, all different.

    Below those that the system gives to connections by itself, of which one could take the port meanwhile.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports += [port] if port not in ports else []
    return ports


def _start(script: Path, root: Path, arguments: Sequence[str], world: int, rank: int, port: int) -> Forged:
    common = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))},
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    common.pop("PYTEST_CURRENT_TEST", None)  # another for each test
    own = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    return start_forged(script, [str(root), *arguments], common, own, root, root / f"{world}-{rank}.log", rank)
