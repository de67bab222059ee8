"""The verb as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_scatter import sample

from deft_lightning.__main__ import main as command_line
from deft_lightning.figures.command import main

RUN = {"focus/mean": [0.1, 0.6], "prob/mean": [0.1, 0.4], "val/nll": [3.0, 1.0], "train/nll": [3.0, 1.0]}


def shell(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deft_lightning", "figures", *args]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.slow
def test_it_draws_and_names_its_files(tmp_path: Path, log: Callable[..., Path]) -> None:
    log("weak", RUN), log("strong", RUN)
    done = shell("focus", "weak", "top=strong", "--output", "out/focus", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.split() == ["out/focus.png", "out/focus.svg"]
    assert ">top<" in (tmp_path / "out" / "focus.svg").read_text() and (tmp_path / "out" / "focus.png").stat().st_size


def test_a_mistake_is_one_line_and_status_two(tmp_path: Path) -> None:
    done = shell("run", "logs/version_7", "--output", "x.png", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr == (
        "error: logs/version_7: no such folder; a run is a folder with TensorBoard event files\n"
    )  # fmt: skip


def test_the_other_verbs_know_of_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["deft_lightning", "figure", "run"])
    with pytest.raises(SystemExit):
        command_line()
    assert "unknown verb figure. Did you mean figures?" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["deft_lightning", "--help"])
    command_line()
    assert "figures   Draw figures" in capsys.readouterr().out


@pytest.mark.slow
def test_help_and_figures_of_runs_wait_for_nothing(tmp_path: Path, log: Callable[..., Path]) -> None:
    run = log("run", RUN)
    code = (
        "import sys; from deft_lightning.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print({'torch', 'lightning', 'transformers'} & set(sys.modules))"
    )
    for args in (["--help"], ["focus", "--help"], ["run", str(run), "--output", str(tmp_path / "x.png")]):
        done = subprocess.run(
            [sys.executable, "-c", code, "figures", *args], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "set()", args


@pytest.mark.slow
def test_every_kind_draws(
    tmp_path: Path, log: Callable[..., Path], drawn: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(log("logs/version_0", RUN))
    sample(noise=True).save(tmp_path / "tokens.npz")
    table = tmp_path / "t.json"
    table.write_text(json.dumps({"a": {"NLL": [1.0, 2.0], "DEFT": [3.0]}}))
    calls = [
        ["run", run], ["focus", str(tmp_path / "logs"), "--progress", "share", "--together"],
        ["gates", "--objectives", "NLL", "Tsallis(q=0.3)", "DEFT", "--collision", "0.2", "0.4"],
        ["losses", "--objectives", "DEFT"],
        ["scatter", str(tmp_path), "--objectives", "DEFT", "EAFT", "--tokens", "50"],
        ["bars", str(table), "--value", "points", "--title", "T"],
        ["bars", "--tag", "val/nll", "--take", "max", f"Cayley(floor=0.5)={run}", *2 * [f"noisy/NLL={run}"]],
    ]  # fmt: skip
    for number, call in enumerate(calls):
        main([*call, "--output", str(tmp_path / f"{number}.png"), str(tmp_path / f"{number}.svg")])
        assert capsys.readouterr().out.split() == [str(tmp_path / f"{number}.{end}") for end in ("png", "svg")]
        assert (tmp_path / f"{number}.png").stat().st_size > 5000
    assert [len(figure.axes) for figure in drawn] == [3, 1, 1, 1, 3, 1, 1]
    legends = [text.get_text() for text in drawn[2].axes[0].get_legend().get_texts()]
    assert legends[:4] == ["NLL", "Tsallis(q=0.3)", "DEFT, C = 0.2", "DEFT, C = 0.4"]
    assert drawn[1].axes[0].get_lines()[0].get_xdata().tolist() == [0, 1]
    assert len(drawn[4].axes[0].collections[0].get_offsets()) + len(drawn[4].axes[0].collections[1].get_offsets()) == 50
    bars = drawn[6].axes[0]
    assert [patch.get_height() for patch in bars.patches] == [3.0, 3.0]
    assert [text.get_text() for text in bars.get_legend().get_texts()] == ["Cayley(floor=0.5)", "NLL"]
    assert bars.get_ylabel() == "val/nll" and drawn[5].axes[0].get_ylabel() == "points"


def test_a_folder_with_an_equals_sign_is_a_run(tmp_path: Path, log: Callable[..., Path], drawn: list[Any]) -> None:
    run = log("lr=0.1", RUN)
    main(["focus", str(run), f"named={run}", "--output", str(tmp_path / "x.png")])
    assert [axes.get_title("left") for axes in drawn[0].axes] == ["lr=0.1", "named"]


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ([], ["KIND"]), (["gate"], ["Did you mean gates"]), (["gates"], ["--output"]),
        (["gates", "--objectives", "DEFF", "--output", "x"], ["DEFF", "Did you mean DEFT"]),
        (["gates", "--objective", "DEFT", "--output", "x"], ["--objective", "Did you mean --objectives"]),
        (["gates", "--collision", "2", "--output", "x"], ["(0, 1]"]),
        (["focus", "nowhere", "--output", "x"], ["nowhere", "no such folder"]),
        (["focus", "{run}", "{run}", "--output", "x"], ["named twice"]),
        (["scatter", "{run}", "--output", "x"], ["no sample of tokens", "probe"]),
        (["bars", "a.json", "b.json", "--output", "x"], ["one JSON file", "--tag"]),
        (["bars", "--tag", "val/nll", "{run}", "--output", "x"], ["METHOD=RUN"]),
        (["bars", "--tag", "val/nl", "a={run}", "--output", "x"], ["val/nl", "Did you mean val/nll"]),
        (["bars", "{run}", "--output", "x"], ["cannot be read as JSON"]),
        (["run", "{run}", "--output", "{file}/x.png"], ["cannot be written"]),
    ],
    ids=" ".join,
)  # fmt: skip
def test_mistakes_are_one_line(
    args: list[str], wanted: list[str], tmp_path: Path, log: Callable[..., Path], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run, file = log("run", RUN), tmp_path / "file"
    file.touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([arg.format(run=run, file=file) for arg in args])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert all(part in captured.err for part in wanted), captured.err
    assert not list(tmp_path.glob("x*"))
