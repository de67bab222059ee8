"""A subclass of one's own, by its path or from a script: its options beside the package's, and in the run's config."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from worlds import ROOT

from deft_lightning.__main__ import main
from deft_lightning.cli.subclasses import take_classes

pytestmark = pytest.mark.slow

TINY = [
    "--config", str(ROOT / "configs" / "from_scratch.yaml"), "--trainer.max_steps", "2",
    "--trainer.limit_val_batches", "1",
    "--trainer.num_sanity_val_steps", "0", "--model.architecture.hidden_size", "32",
    "--model.architecture.intermediate_size", "64", "--model.architecture.num_hidden_layers", "1",
    "--after_fit.test", "false", "--data.batch_size", "4",
    "--data.source", "reasoning_gym:spell_backward?size=60&question=metadata.word",
]  # fmt: skip
CLASSES = '''
from pathlib import Path
from typing import Any

from deft_lightning import InstructionDataModule, SFTModule


class MyModule(SFTModule):
    """Says what it was made with.

    Args:
        note: A text.
    """

    def __init__(self, note: str = "none", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.note = note

    def on_train_start(self) -> None:
        super().on_train_start()
        note = f"{self.note} {type(self.trainer.datamodule).__name__}"
        Path(self.trainer.default_root_dir, "note.txt").write_text(note)


class MyData(InstructionDataModule):
    pass


class Stranger:
    pass
'''

SCRIPT = """
if __name__ == "__main__":
    from deft_lightning.cli import run

    run(MyModule, MyData)
"""

Cli = Callable[..., Path]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cli]:
    """Run a verb in this process where the classes can be imported; return the folder of its runs."""
    (tmp_path / "classes_for_the_command_line.py").write_text(CLASSES, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    count = iter(range(100))

    def call(verb: str, *words: str) -> Path:
        folder = tmp_path / f"logs{next(count)}"
        root = [] if verb == "export" else ["--trainer.default_root_dir", str(folder)]
        monkeypatch.setattr("sys.argv", ["deft_lightning", verb, *words, *root])
        main()
        return folder

    yield call
    sys.modules.pop("classes_for_the_command_line", None)


def test_subclasses_by_their_path_train_and_their_config_repeats_the_run(cli: Cli, tmp_path: Path) -> None:
    ours = "classes_for_the_command_line."
    options = ["--model", f"{ours}MyModule", f"--data={ours}MyData", "--model.note", "hello"]
    folder = cli("fit", *options, *TINY)
    assert (folder / "note.txt").read_text() == "hello MyData"
    run = folder / "version_0"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["model_class"], config["data_class"]) == (f"{ours}MyModule", f"{ours}MyData")
    assert config["model"]["note"] == "hello" and config["model"]["architecture"]["hidden_size"] == 32
    assert (cli("fit", "--config", str(run / "config.yaml")) / "note.txt").read_text() == "hello MyData"
    cli("export", "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--output", str(tmp_path / "export"))
    assert (tmp_path / "export" / "config.json").is_file()


def test_a_script_with_three_lines_has_every_verb_and_option(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(CLASSES + SCRIPT)
    line = [sys.executable, str(script), "fit", *TINY, "--model.note", "script"]
    done = subprocess.run(
        [*line, "--trainer.default_root_dir", str(tmp_path / "logs")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "logs" / "note.txt").read_text() == "script MyData"
    config = tmp_path / "logs" / "version_0" / "config.yaml"
    again = [sys.executable, str(script), "fit", "--config", str(config), "--print_config"]
    done = subprocess.run(again, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["model"]["note"] == "script"


def test_without_a_subclass_the_config_names_none(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli("fit", "--print_config")
    assert "_class:" not in capsys.readouterr().out.replace("fallback_class:", "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "no_such_package.MyModule"], "--model no_such_package.MyModule: cannot import no_such_package"),
        (["--model", "classes_for_the_command_line.Stranger"], "is not a subclass of deft_lightning"),
        (
            ["--data", "classes_for_the_command_line.MyModule"],
            "classes_for_the_command_line.MyModule: is not a sub",
        ),
        (["--data", "classes_for_the_command_line.Missing"], "Missing: is not a subclass of"),
        (["--model", "classes_for_the_command_line.MyModule", "--model.nte", "x"], "--model.note"),
    ],
)
def test_what_is_no_subclass_is_one_line(
    options: list[str], said: str, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli("fit", *options)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_a_file_of_options_for_the_model_is_no_class(tmp_path: Path) -> None:
    words = ["fit", "--model", "model.yaml", "--model={pretrained: x}", "--data", "{source: rows.jsonl}"]
    assert take_classes(words) == (words, {})
    config = tmp_path / "run.yaml"
    config.write_text("model_class: a.B\ndata_class: c.D\n", encoding="utf-8")
    words = ["fit", "--config", str(config), "--model=e.F", "--model.pretrained", "x"]
    assert take_classes(words) == (
        ["fit", "--config", str(config), "--model_class=e.F", "--model.pretrained", "x"],
        {"model_class": "e.F", "data_class": "c.D"},
    )
