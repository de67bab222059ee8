"""The tutorials are true: what they tell to type runs, and finds what they say."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from worlds import ROOT

from deft_lightning.cli import run as command_line

pytestmark = pytest.mark.slow
PAGE = (ROOT / "docs" / "tutorials" / "first_noisy_file.md").read_text(encoding="utf-8")


def commands(page: str) -> list[list[str]]:
    """Return the words behind ``python -m deft_lightning`` of each command."""
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    return [shlex.split(block.replace("\\\n", " "))[3:] for block in blocks]


def test_a_first_noisy_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "make_rows.py").write_text(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[0])
    made = runpy.run_path("make_rows.py")
    probe, *fits = commands(PAGE)
    monkeypatch.setattr("sys.argv", ["deft-lightning", *probe])
    command_line()
    assert "noise: 0.33 of the answers" in capsys.readouterr().out
    assert (tmp_path / "gate.html").stat().st_size > 10_000
    ranked = [json.loads(line)["prompt"] for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    wrong = {made["words"][at] for at in made["wrong"]}
    assert len(ranked) == len(made["words"])
    assert sum(prompt in wrong for prompt in ranked[: len(wrong)]) > 0.95 * len(wrong)
    for words in fits:  # of 20 epochs a few steps: the numbers of the page take longer than a test may
        monkeypatch.setattr("sys.argv", ["deft-lightning", *words, "--trainer.max_epochs", "1"])
        command_line()
        assert "test/exact_match" in capsys.readouterr().out
    assert len(fits) == 3
