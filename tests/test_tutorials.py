"""The tutorials are true: what they tell to type runs, and finds what they say."""

from __future__ import annotations

import copy
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from page_commands import blocks, commands
from worlds import ROOT

from deft_lightning.cli import run as command_line

pytestmark = pytest.mark.slow
TUTORIALS = ROOT / "docs" / "tutorials"
PAGE = (TUTORIALS / "first_noisy_file.md").read_text(encoding="utf-8")
NOTEBOOK = ROOT / "docs" / "tutorials" / "wrong_answers.ipynb"


def test_a_first_noisy_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "make_rows.py").write_text(blocks(PAGE, "python")[0])
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


def test_an_objective_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (TUTORIALS / "own_objective.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trust.py").write_text(blocks(page, "python")[0])
    # Of 60 steps a few, on a tenth of the rows: the numbers of the page take longer than a test may.
    settings = blocks(page, "yaml")[0]
    for long, short in (("steps: 60", "steps: 4"), ("rows: 1500", "rows: 150"), ("held_out: 100", "held_out: 10")):
        assert long in settings
        settings = settings.replace(long, short)
    (tmp_path / "compare.yaml").write_text(settings)
    draw, fit, compare = commands(page)
    fit += ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--after_fit.test", "false"]
    fit += ["--after_fit.compare", "false", "--data.source", "reasoning_gym:spell_backward?size=200"]
    for words in (draw, fit, compare):
        done = subprocess.run(
            [sys.executable, "-m", "deft_lightning", *words], capture_output=True, text=True, check=False, timeout=900
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    table = re.findall(r"^\| (\w+) \| [\d.]+ \| [\d.]+ \|$", done.stdout, flags=re.MULTILINE)
    assert table[:3] == re.findall(r"^\| (\w+) \| [\d.]+ \| [\d.]+ \|$", page, flags=re.MULTILINE)
    assert (tmp_path / "compared" / "bars.png").stat().st_size > 1000


@pytest.mark.parametrize("page", [*TUTORIALS.glob("*.md"), ROOT / "docs" / "quickstart.md"], ids=lambda page: page.stem)
def test_a_tutorial_ends_with_what_to_read_next(page: Path) -> None:
    last = page.read_text(encoding="utf-8").rpartition("\n## ")[2]
    assert last.startswith("Next\n") and len(re.findall(r"\]\([\w./]+", last)) >= 3


def test_two_devices(tmp_path: Path) -> None:
    page = (TUTORIALS / "two_gpus.md").read_text(encoding="utf-8")
    (tmp_path / "make_rows.py").write_text(blocks(page, "python")[0])
    subprocess.run([sys.executable, "make_rows.py"], cwd=tmp_path, check=True)
    said = []
    for words in commands(page):
        done = subprocess.run(
            [sys.executable, "-m", "deft_lightning", *words, "--trainer.accelerator", "cpu"],
            capture_output=True, text=True, check=False, timeout=900, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(done.stdout + done.stderr)
    measured = [re.findall(r"val/nll: ([\d.]+) before training, ([\d.]+) at step 12", text) for text in said[:3]]
    told = re.findall(r"^\| .*device.* \| ([\d.]+) \| ([\d.]+) \|$", page, flags=re.MULTILINE)
    assert len(told) == 3
    for found, expected in zip(measured, told, strict=True):
        assert [float(value) for value in found[0]] == pytest.approx([float(value) for value in expected], abs=0.02)
    assert "2 -> 1 ranks" in said[3] and "at step 16" in said[3]


def kinds(outputs: list[Any]) -> list[list[str]]:
    """Return the kinds of data of each output of a cell."""
    return [sorted(output.get("data", {output.get("name", ""): None})) for output in outputs]


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install -e '.[test]'")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -e '.[test]'")
    kept = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(kept)
    run = copy.deepcopy(kept)
    for cell in run.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    # An error in a cell is raised. Nothing but the package is there: the folder is empty.
    nbclient.NotebookClient(run, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    before, now = ([cell for cell in book.cells if cell.cell_type == "code"] for book in (kept, run))
    assert [cell.execution_count for cell in before] == list(range(1, len(before) + 1)), "kept as it ran, once"
    for cell, again in zip(before, now, strict=True):
        assert kinds(cell.outputs) == kinds(again.outputs), cell.source
        assert all(output.get("name") != "stderr" for output in again.outputs), again.outputs
    for book in (before, now):
        text = json.dumps([cell.outputs for cell in book])
        assert "noise: 0.50 of the answers" in text and "'pmal'" in text
        scores = {name: float(score) for name, score in re.findall(r"'(\w+)': ([\d.]+)", text)}
        assert scores["NLL"] < 0.95 < min(scores["DEFT"], scores["Contaminated"])
    assert str(ROOT.parent) not in NOTEBOOK.read_text(encoding="utf-8"), "no folder of a machine"
    assert (tmp_path / "my-model" / "model.safetensors").is_file() and (tmp_path / "gate.html").is_file()
