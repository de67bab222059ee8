"""CONTRIBUTING and the walk tell the truth: every recipe runs as it is written, every linked file is there."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from check_files import faults
from worlds import ROOT

from deft_lightning import __version__
from deft_lightning.__main__ import main

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^### Add an? ([\w ]+)\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))
SMALL = [  # a run of seconds in place of minutes
    "--model.architecture.hidden_size", "32", "--model.architecture.intermediate_size", "64",
    "--model.architecture.num_hidden_layers", "1", "--data.batch_size", "4",
    "--data.source", "reasoning_gym:spell_backward?size=60&question=metadata.word",
]  # fmt: skip
SHORT = [
    "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.num_sanity_val_steps", "0",
    "--trainer.log_every_n_steps", "1", "--after_fit.test", "false",
]  # fmt: skip


def test_there_is_a_recipe_for_each_kind_of_part() -> None:
    assert set(RECIPES) == {"objective", "noise operation", "format", "grader", "monitor"}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_works_as_it_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", RECIPES[name], re.DOTALL)
    (source,) = [text for kind, text in blocks if kind == "python"]
    file = re.match(r"# (\w+\.py)\n", source)
    assert file is not None
    (tmp_path / file[1]).write_text(source, encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    if name == "format":
        from deft_lightning.data.records import formats

        monkeypatch.setattr(formats, "CONVERSATIONS", dict(formats.CONVERSATIONS))
        runpy.run_path(file[1])
    lines = [line for kind, text in blocks if kind == "bash" for line in text.splitlines()]
    for line in lines:
        words = shlex.split(line)
        if words[:3] != ["python", "-m", "deft_lightning"]:
            subprocess.run(["bash", "-c", line], check=True)
            continue
        more = [*SMALL, *(SHORT if words[3] == "fit" else [])] if words[3] in ("fit", "preview") else []
        monkeypatch.setattr("sys.argv", ["deft_lightning", *words[3:], *more])
        main()
    printed = capsys.readouterr().out
    sys.modules.pop(file[1].removesuffix(".py"), None)
    if name == "objective":
        assert "power: 1" in (tmp_path / "logs" / "version_0" / "config.yaml").read_text()
    elif name == "noise operation":
        assert "FirstLetter" in (tmp_path / "noise.html").read_text(encoding="utf-8")
    elif name == "grader":
        assert re.search(r"LAST_WORD +1  avg@1 +1\.0000", printed)
    elif name == "monitor":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "logs" / "version_0"))
        events.Reload()
        assert len(events.Scalars("surprise/mean")) == 2


def test_the_commands_of_the_quick_loop_name_what_there_is() -> None:
    for name in re.findall(r"(?:tests|docs|\.ci|configs)/[\w./-]+", PAGE):
        assert (ROOT / name.rstrip(".")).exists(), name
    for folder in re.findall(r" in `([\w/]+)/`", PAGE):
        assert (ROOT / "deft_lightning" / folder).is_dir(), folder
    markers = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "slow:" in markers


@pytest.mark.parametrize("page", ["docs/concepts/walk.md", "CONTRIBUTING.md"])
def test_every_linked_file_is_there(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert ((ROOT / page).parent / link).exists(), link


def test_the_walk_has_ten_steps_in_the_order_of_the_folders() -> None:
    text = (ROOT / "docs" / "concepts" / "walk.md").read_text(encoding="utf-8")
    assert [int(number) for number in re.findall(r"^(\d+)\. \*\*", text, re.MULTILINE)] == list(range(1, 11))


def test_the_layout_names_every_room() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    layout = page[page.index("## Layout") :].split("```")[1]
    package = ROOT / "deft_lightning"
    rooms = {path.name for path in package.iterdir() if (path / "__init__.py").is_file()}
    rooms |= {path.name for path in (package / "data").iterdir() if (path / "__init__.py").is_file()}
    assert {room for room in rooms if f"{room}/" not in layout} == set()
    for name in re.findall(r"([\w/]+)/ ", layout.partition("configs/")[0]):
        last = name.rpartition("/")[2]
        assert last == "deft_lightning" or last in rooms, name


def test_the_newest_release_is_the_version_of_the_package() -> None:
    heads = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert heads[0] == "Unreleased", "others add their lines there"
    assert heads[1] == f"{__version__} - {citation['date-released']}"
    releases = [head.split(" - ") for head in heads[1:]]
    assert releases == sorted(releases, key=lambda release: release[1], reverse=True)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Status: {__version__.rpartition('.')[0]}," in readme


def test_citation_and_templates_are_whole() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"
    assert citation["references"][0]["url"].endswith("2602.11424")
    assert (ROOT / ".github" / "pull_request_template.md").is_file()
    for template in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"):
        head = yaml.safe_load(template.read_text(encoding="utf-8").split("---")[1])
        assert {"name", "about", "labels"} <= set(head)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    names = {hook["id"] for repo in hooks["repos"] for hook in repo["hooks"]}
    assert names >= {"files", "ruff-check", "ruff-format", "mypy"}
    assert all(repo["repo"] == "local" for repo in hooks["repos"]), "hooks run without a network"


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.yaml", b"a: [1\n", "flow sequence"),
        ("a.json", b"{'a': 1}\n", "double quotes"),
        ("a.toml", b"a = b\n", "Invalid value"),
        ("a.md", b"a \n", "line 1: ends in blanks"),
        ("a.md", b"a", "one line break"),
        ("a.md", b"a\r\n", "line ends"),
        ("a.py", b"<<<<<<< a\n", "a mark of a merge"),
        ("a.png", bytes(range(256)) * 4000, "has 1,024,000 bytes"),
        ("a.svg", b"<a \n>\n", ""),
    ],
)
def test_the_hook_for_files_names_what_is_wrong(name: str, content: bytes, fault: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    named = faults(tmp_path / name)
    assert [fault in line for line in named] == [True] * bool(fault), named


def test_types_travel_with_the_package() -> None:
    assert (ROOT / "deft_lightning" / "py.typed").is_file()


# --- doctests --------------------------------------------------------------------------------------------------------

EXAMPLES = [ROOT / "deft_lightning" / "functional.py", *sorted((ROOT / "deft_lightning" / "objectives").glob("*.py"))]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_of_docstrings_print_what_they_say(path: Path) -> None:
    import doctest
    from importlib import import_module

    module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_there_are_examples() -> None:
    assert sum(path.read_text(encoding="utf-8").count(">>>") for path in EXAMPLES) >= 10


def quick_tests(path: Path) -> list[str]:
    """Names of the tests of a file that are not marked as slow, by themselves or by their file."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    if any(isinstance(node, ast.Assign) and ast.unparse(node) == "pytestmark = pytest.mark.slow" for node in body):
        return []
    return [
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if "pytest.mark.slow" not in map(ast.unparse, node.decorator_list)
    ]


@pytest.mark.parametrize(
    "folder",
    sorted(
        str(path.parent.relative_to(ROOT / "deft_lightning"))
        for pattern in ("*/__init__.py", "data/*/__init__.py")
        for path in (ROOT / "deft_lightning").glob(pattern)
    ),
)
def test_the_quick_loop_has_tests_of_every_folder_of_the_package(folder: str) -> None:
    files = (ROOT / "tests" / folder).glob("test_*.py")
    assert any(quick_tests(path) for path in files)
