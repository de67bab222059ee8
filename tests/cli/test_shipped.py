"""``--config deft:NAME``: every configuration of the repository by name, a line for a name that there is none of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from parsed import parser, refused
from worlds import ROOT

from deft_lightning.cli import shipped
from deft_lightning.cli.subclasses import take_classes
from deft_lightning.errors import UserError
from deft_lightning.study.command import read_options


def test_every_configuration_of_the_repository_has_a_name() -> None:
    files = {str(path.relative_to(ROOT / "configs"))[: -len(".yaml")] for path in (ROOT / "configs").rglob("*.yaml")}
    assert set(shipped.names()) == files and "quickstart" in files
    for name in files:
        assert Path(shipped.path_of(f"deft:{name}")) == ROOT / "configs" / f"{name}.yaml"
    assert shipped.path_of("deft:model/lora.yaml") == shipped.path_of("deft:model/lora")


def test_inside_an_installed_package_its_own_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "deft_lightning"
    (package / "configs").mkdir(parents=True)
    (tmp_path / "site-packages" / "configs").mkdir()  # of somebody else
    monkeypatch.setattr(shipped, "PACKAGE", package)
    with pytest.raises(UserError, match="without its configurations"):
        shipped.path_of("deft:quickstart")
    (package / "configs" / "quickstart.yaml").write_text("seed_everything: 0\n")
    assert shipped.path_of("deft:quickstart") == str(package / "configs" / "quickstart.yaml")


@pytest.mark.parametrize(
    "words", [["--config", "deft:{}"], ["--config=deft:{}"], ["-c", "deft:{}"], ["-c=deft:{}"]], ids=" ".join
)
def test_every_spelling_of_the_option_takes_it(words: list[str]) -> None:
    line = ["fit", *(word.format("quickstart") for word in words), "--trainer.max_steps", "7"]
    options = parser().parse_args(line).fit
    assert options.data.source.startswith("reasoning_gym:") and options.trainer.max_steps == 7
    assert str(options.config[0]) == str(ROOT / "configs" / "quickstart.yaml")


def test_layers_and_files_mix_and_the_later_wins(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {lora: {r: 3}}\n")
    line = ["fit", "--config", "deft:model/lora", "--config", str(tmp_path / "mine.yaml")]
    options = parser().parse_args(line).fit
    assert options.model.lora.r == 3 and options.model.dtype == "bfloat16"


def test_study_takes_it_and_names_its_folder_after_it() -> None:
    _, options = read_options(["--config", "deft:study/regimes"])
    assert Path(options.output) == Path("logs/study/regimes")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("quikstart", "deft:quickstart"),
        ("lora", "deft:model/lora"),
        ("model/lroa", "deft:model/lora"),
        ("fsdp", "deft:strategy/fsdp2"),
        ("Quickstart", "deft:quickstart"),
    ],
)
def test_a_typo_is_one_line_with_what_was_meant_and_what_there_is(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["fit", "--config", f"deft:{typed}"], capsys)
    assert line.startswith(f"error: --config deft:{typed} is unknown. Did you mean {meant}")
    assert line.split("Known: ")[1].split(", ") == shipped.names()


@pytest.mark.parametrize("typed", ["", "../pyproject", "/etc/passwd", "study/records.py", "study"])
def test_what_is_no_name_leads_nowhere(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"--config deft:{typed} is unknown." in refused(["fit", "--config", f"deft:{typed}"], capsys)


def test_a_path_of_the_repository_outside_of_it_is_answered_with_the_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(["fit", "--config", "configs/model/lora.yaml"], capsys)
    assert "configs/model/lora.yaml does not exist here; the package has it as --config deft:model/lora" in line
    assert "deft:" not in refused(["fit", "--config", "configs/mine.yaml"], capsys)


def test_a_value_of_another_option_is_left_alone() -> None:
    words = ["fit", "--data.source", "deft:quickstart", "--model.pretrained=deft:x"]
    assert shipped.resolved(words) == words


def test_a_class_that_a_shipped_configuration_names_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("model_class: my_package.MyModule\n")
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path)
    assert take_classes(["fit", "--config", "deft:quickstart"])[1] == {"model_class": "my_package.MyModule"}


PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_names_in_the_documentation_exist(page: str) -> None:
    named = re.findall(r"--config deft:([\w./-]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert set(named) <= set(shipped.names())
    assert named or page != "README.md"
