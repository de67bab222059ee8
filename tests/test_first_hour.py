"""The first hour of a newcomer, with a tiny model: the commands of README and docs lead from one to the next."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import ROOT, save_tiny_llama

pytestmark = pytest.mark.slow
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_every_step_of_the_walk_leads_to_the_next(tmp_path: Path) -> None:
    rows = [
        {
            "instruction": f"Spell {number}.",
            "input": "Use words." if number % 2 else "",
            "response": " ".join(DIGITS[int(digit)] for digit in str(number)),
        }
        for number in range(100, 160)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    model = save_tiny_llama(tmp_path / "model", spread=0.3, max_position_embeddings=512)
    walked = subprocess.run(
        [
            sys.executable, "tests/benchmarks/first_hour.py", "--model", model, "--rows", str(tmp_path / "rows.json"),
            "--steps", "60", "--folder", str(tmp_path / "walk"), "--output", str(tmp_path / "walk.json"),
            "--without", "quickstart", "trl",  # other tests run these two
        ],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert walked.returncode == 0, walked.stderr[-4000:]
    told = json.loads((tmp_path / "walk.json").read_text(encoding="utf-8"))
    assert str(tmp_path) not in json.dumps(told) and str(ROOT) not in json.dumps(told), "no folder of a machine"
    page = (ROOT / "docs" / "evidence" / "first_hour.md").read_text(encoding="utf-8")
    assert all(f"| {step['step']} |" in page for step in told["walk"])
