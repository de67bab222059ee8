"""The README tells the truth: its examples run and its commands are the ones that are tested."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from worlds import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("source", PYTHON, ids=range(len(PYTHON)))
def test_python_examples_run(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(source, encoding="utf-8")
    scope = runpy.run_path(str(tmp_path / "example.py"), run_name="example")
    assert scope.keys() & {"trainer", "Damped"}


def test_two_commands_do_all_set_up() -> None:
    commands = [line for line in README.splitlines() if line.startswith("pip install")]
    assert len(commands) == 2
    assert all(" torch==2.13.0 " in command for command in commands)


def test_files_and_options_it_names_exist() -> None:
    for name in re.findall(r"(?:configs|docs|tests)/[\w./-]+\.\w+", README):
        assert (ROOT / name).is_file(), name
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "deft_lightning").rglob("*.py"))
    for option in set(re.findall(r"--(?:data|model|checkpoint|predictions)\.(\w+)", README)):
        assert re.search(rf"\b{option}\b", source), option


def test_every_objective_is_in_the_guide_s_table() -> None:
    from deft_lightning.objectives import known_objectives

    names = [name for name, cls in known_objectives().items() if cls.__module__.startswith("deft_lightning.")]
    guide = (ROOT / "docs" / "guides" / "objectives.md").read_text(encoding="utf-8")
    table = guide[guide.index("## All objectives") : guide.index("## Objectives that follow")]
    assert [name for name in names if f"`{name}" not in table] == []
    assert f"all {len(names)}\nobjectives" in README or f"all {len(names)} objectives" in README


def test_it_is_short() -> None:
    """A stranger reads a page; the rest is in docs."""
    assert len(README.splitlines()) <= 150
