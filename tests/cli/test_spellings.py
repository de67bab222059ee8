"""``Cayley(floor=0.5)`` is one spelling: on the command line, in a configuration, in a study and in figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deft_lightning.cli.main import DeftCLI
from deft_lightning.figures.command import parser as figures_parser
from deft_lightning.objectives import DEFT, NLL, Cayley, Objective, Rescaled, Truncated, Tsallis
from deft_lightning.objectives.parse import parse_objective
from deft_lightning.study.command import read_options


class Parsed(Exception):
    """Ends a command line before anything is loaded."""


class ParsedCLI(DeftCLI):
    def before_instantiate_classes(self) -> None:
        parser = self._parser("fit")
        raise Parsed(self.config.fit, parser)


def objective_of(*words: str) -> Objective:
    with pytest.raises(Parsed) as parsed:
        ParsedCLI(["fit", *words])
    config, _ = parsed.value.args
    return made(config.model.objective)


def made(settings: Any) -> Any:
    """An objective of its parsed settings."""
    from importlib import import_module

    if not hasattr(settings, "class_path"):
        return settings
    module, _, name = settings.class_path.rpartition(".")
    options = {key: made(value) for key, value in vars(settings.init_args).items()}
    return getattr(import_module(module), name)(**options)


SPELLINGS = [
    ("DEFT", DEFT()),
    ("Cayley(floor=0.5)", Cayley(floor=0.5)),
    ("deft_lightning.objectives.Cayley(floor=0.5)", Cayley(floor=0.5)),
    ("Tsallis(q=0.3)", Tsallis(q=0.3)),
    ("Rescaled(base=Cayley(floor=0.5))", Rescaled(base=Cayley(floor=0.5))),
    ("Truncated(threshold=0.4, keep=below, base=NLL)", Truncated(threshold=0.4, keep="below", base=NLL())),
]
each_spelling = pytest.mark.parametrize(("text", "objective"), SPELLINGS, ids=[text for text, _ in SPELLINGS])


@pytest.mark.slow
@each_spelling
def test_the_command_line_reads_it(text: str, objective: Objective) -> None:
    assert objective_of("--model.objective", text) == objective == parse_objective(text)


@pytest.mark.slow
@each_spelling
def test_a_configuration_reads_it(text: str, objective: Objective, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"model:\n  objective: '{text}'\n", encoding="utf-8")
    assert objective_of("--config", str(tmp_path / "run.yaml")) == objective


@each_spelling
def test_figures_read_it(text: str, objective: Objective) -> None:
    args = figures_parser().parse_args(["gates", "--objectives", text, "--output", "x.png"])
    assert [parse_objective(one) for one in args.objectives] == [objective]


def test_a_study_reads_it(tmp_path: Path) -> None:
    lines = "".join(f"- {text}\n" for text, _ in [*SPELLINGS[:2], *SPELLINGS[3:]])
    regime = "regimes: {a: {source: 'reasoning_gym:spell_backward', steps: 1, rate: 0.1}}\narchitecture: {}\n"
    (tmp_path / "study.yaml").write_text(f"{regime}objectives:\n{lines}", encoding="utf-8")
    study, _ = read_options(["--config", str(tmp_path / "study.yaml")])
    assert study.objectives == [objective for _, objective in [*SPELLINGS[:2], *SPELLINGS[3:]]]


def test_what_the_command_line_took_before_it_takes_still() -> None:
    assert objective_of("--model.objective", "Cayley", "--model.objective.floor", "0.5") == Cayley(floor=0.5)
    assert objective_of("--model.objective", "Cayley(floor=0.5)", "--model.objective.floor", "0.3") == Cayley(floor=0.3)
    nested = ["--model.objective", "Rescaled", "--model.objective.base", "Cayley(floor=0.5)"]
    assert objective_of(*nested) == Rescaled(base=Cayley(floor=0.5))


def test_text_that_looks_like_one_stays_text_elsewhere(tmp_path: Path) -> None:
    words = ["fit", "--data.benchmark_instruction", "Cayley(floor=0.5)"]
    with pytest.raises(Parsed) as parsed:
        ParsedCLI(words)
    assert parsed.value.args[0].data.benchmark_instruction == "Cayley(floor=0.5)"
    (tmp_path / "run.yaml").write_text("data:\n  benchmark_instruction: Cayley(floor=0.5)\n", encoding="utf-8")
    with pytest.raises(Parsed) as parsed:
        ParsedCLI(["fit", "--config", str(tmp_path / "run.yaml")])
    assert parsed.value.args[0].data.benchmark_instruction == "Cayley(floor=0.5)"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Cayley(flor=1)", "--model.objective.flor is not an option of Cayley. Did you mean floor?"),
        ("Cayleyy(floor=1)", "Cayleyy(floor=1) is unknown. Did you mean Cayley?"),
        ("Cayley(floor=high)", "--model.objective.floor"),
    ],
)
def test_what_is_wrong_in_it_is_one_line(text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        ParsedCLI(["fit", "--model.objective", text])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
