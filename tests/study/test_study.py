"""A study through the command line, in processes that are killed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from worlds import ROOT

from deft_lightning.__main__ import main

pytestmark = pytest.mark.slow

CONFIG = """
regimes:
  strong:
    source: &words reasoning_gym:spell_backward?size=2000&question=metadata.word&min_word_len=3&max_word_len=4
    base: {source: *words, steps: 6, batch_size: 8}
    steps: 5
    rate: 1.0e-3
    rates: [3.0e-3]
    noise: [0.0, 0.5]
    headline: [0.5]
    batch_size: 8
  weak: {source: *words, steps: 7, rate: 4.0e-3, noise: [0.0], headline: [0.0], batch_size: 8}
architecture:
  model_type: llama
  hidden_size: 16
  intermediate_size: 32
  num_hidden_layers: 1
  num_attention_heads: 2
  tie_word_embeddings: true
objectives: [NLL, DEFT]
seeds: 1
headline_seeds: 1
rows: 100
held_out: 20
"""


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    config = folder.parent / "study.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    command = [sys.executable, "-m", "deft_lightning", "study", "--config", str(config), "--output", str(folder)]
    return subprocess.Popen(
        [*command, "--workers", "2", *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        # What a shell starts in the background ignores SIGINT, and so would all that the tests start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-2000:]
    return out


def values(report: Path) -> object:
    found = json.loads(report.read_text(encoding="utf-8"))
    return {key: found[key] for key in ("grid", "tuned", "ranking_shared", "ranking_tuned", "margins_shared")}


def workers_of(pid: int) -> set[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], stdout=subprocess.PIPE, text=True, check=False).stdout
    return {int(line) for line in found.split()}


def gone(processes: set[int]) -> bool:
    """Whether processes end within a while."""
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{process}").exists() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(Path(f"/proc/{process}").exists() for process in processes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a study that was left alone."""
    folder = tmp_path_factory.mktemp("study") / "whole"
    out = finish(start(folder))
    assert "Worst regime" in out and "| DEFT |" in out
    return folder


def interrupted(folder: Path, ready: Callable[[], bool], signals: list[int]) -> str:
    """Start a study, send signals once it is as far as wanted, and return what it said; its processes are gone."""
    process = start(folder)
    deadline = time.monotonic() + 200
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = workers_of(process.pid)
    for number in signals:
        # A terminal sends Ctrl-C to all processes of the group.
        (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if signal.SIGKILL in signals else 130), err[-2000:]
    assert len(children) >= 2 and gone(children)  # workers of a study that is gone go too
    return err


def test_a_study_that_is_stopped_at_any_moment_ends_with_the_same_table(whole: Path, tmp_path: Path) -> None:
    """Killed in its base; then one Ctrl-C among its runs, and that of an impatient user twice."""
    assert (whole / "bars.png").stat().st_size > 5000
    folder = tmp_path / "stopped"

    def cells() -> list[Path]:
        return list((folder / "cells").glob("*.json"))

    interrupted(folder, lambda: any((folder / "data").glob("*")), [signal.SIGKILL])
    for wanted, presses in ((1, 1), (4, 2)):
        err = interrupted(folder, lambda wanted=wanted: len(cells()) >= wanted, [signal.SIGINT] * presses)
        assert "stopped; the finished runs are kept" in err.splitlines()[-1] and "Traceback" not in err
    done = {path: path.stat().st_mtime_ns for path in cells()}
    assert len(done) >= 4 and all(json.loads(path.read_text())["test"] for path in done)
    finish(start(folder))
    assert values(folder / "report.json") == values(whole / "report.json")
    assert (folder / "report.md").read_bytes() == (whole / "report.md").read_bytes()
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())  # nothing was run twice
    assert not [path for path in folder.rglob(".*") if path.suffix not in (".lock", "")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objectives", "[NLL, NNL]"], "--objectives NNL is unknown. Did you mean NLL?"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--held_out", "100000"], "too few to hold out"),
        (["--sseds", "2"], "Did you mean --seeds"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "study.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    arguments = ["study", "--config", str(config), "--output", str(tmp_path / "out"), "--workers", "2", *options]
    monkeypatch.setattr("sys.argv", ["deft_lightning", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out
    assert message in err.splitlines()[-1] and "Traceback" not in err


def test_nll_is_judged_under_the_tokenizer_of_the_model(tmp_path: Path) -> None:
    """From random weights and after a base, with a vocabulary that is built from the training rows."""
    judged = "tokenizer_size: 300, judge: nll"
    config = CONFIG.replace("headline: [0.5]", "headline: [0.0]").replace("weak: {", f"weak: {{{judged}, ")
    config = config.replace("steps: 7, rate: 4.0e-3", "steps: 80, rate: 1.0e-2")  # until tokens are not all alike
    config = config.replace("rates: [3.0e-3]", "rates: []\n    " + judged.replace(", ", "\n    "))
    (tmp_path / "study.yaml").write_text(config, encoding="utf-8")
    command = [sys.executable, "-m", "deft_lightning", "study", "--config", str(tmp_path / "study.yaml")]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out"), "--workers", "1", "--headline_seeds", "1"], capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Plain NLL of held-out answers" in done.stdout and "tuned" not in done.stdout
    results = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("*.json")]
    assert len(results) == 6
    for result in results:
        # The validation rows are others of the same kind; under another vocabulary the test rows are nonsense.
        steps, validation = result["curves"]["val/nll"]
        assert result["test"]["nll"] == pytest.approx(validation[-1], rel=0.06)
        assert steps[-1] < result["steps"]  # what it is judged by is no further step of its validation
    (base,) = (tmp_path / "out" / "bases").glob("*/base.json")
    assert json.loads(base.read_text())["nll"] < math.log(300)
