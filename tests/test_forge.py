"""Ranks that the tests start: processes of their own, and no rank that fails passes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from start_ranks import run_ranks

pytestmark = pytest.mark.slow

DRAW = """
import json, os, random, sys
import numpy as np, torch
drawn = [torch.initial_seed(), torch.rand(1).item(), float(np.random.rand()), random.random(), hash("a")]
own = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
with open(f"{sys.argv[1]}/{own['RANK']}.json", "w") as file:
    json.dump({"drawn": drawn, "own": own, "pid": os.getpid(), "session": os.getsid(0), "words": sys.argv[2:]}, file)
"""
ONE_FAILS = """
import os, signal, sys, time
with open(f"{sys.argv[1]}/{os.environ['RANK']}.pid", "w") as file:
    file.write(str(os.getpid()))
print("about to end", flush=True)
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGSEGV)
time.sleep(600)
"""


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_ranks_are_processes_that_share_no_seed(tmp_path: Path) -> None:
    run_ranks(script(tmp_path, DRAW), tmp_path, "word")
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert all(a != b for a, b in zip(one["drawn"], other["drawn"], strict=True))
    assert one["pid"] == one["session"] != other["pid"] == other["session"]
    assert [found["own"]["RANK"] for found in (one, other)] == ["0", "1"] and one["words"] == ["word"]


def test_a_rank_that_dies_fails_the_test_and_ends_the_others(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"ranks ended with \[.*-11.*\][\s\S]*about to end"):
        run_ranks(script(tmp_path, ONE_FAILS), tmp_path)
    assert time.monotonic() - begun < 300
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"{rank}.pid").read_text()), 0)
