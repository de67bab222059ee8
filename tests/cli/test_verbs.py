"""One table of verbs: dispatch, help, suggestions, completion and the README say the same."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
from worlds import ROOT

from deft_lightning.__main__ import main
from deft_lightning.cli.main import DeftCLI, parsers
from deft_lightning.cli.verbs import TRAINER, VERBS

TEN = ["fit", "validate", "test", "predict", "export", "probe", "preview", "score", "figures", "study"]


def started(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-X", "importtime", "-m", "deft_lightning", *words]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=120)


def stderr_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a process wrote to stderr, without the times of its imports."""
    return [line for line in done.stderr.splitlines() if not line.startswith("import time:")]


def test_the_table_has_ten_verbs_with_a_home_and_a_line_each() -> None:
    assert list(VERBS) == TEN
    for verb in VERBS.values():
        assert 10 < len(verb.help) < 90 and not verb.help.endswith(".")
        assert callable(getattr(import_module(verb.home), "run" if verb.home == TRAINER else "main"))
    assert set(DeftCLI.subcommands()) == {verb.name for verb in VERBS.values() if verb.home == TRAINER}


@pytest.mark.slow
def test_the_help_of_a_verb_has_no_control_characters() -> None:
    """One that is printed is shown escaped: a backspace of the parser's was."""
    done = started("export", "--help=all")
    assert "--print_config[=flags]" in done.stdout and "\\x" not in done.stdout and "\b" not in done.stdout


def test_help_lists_every_verb_before_torch_is_imported() -> None:
    done = started("--help")
    assert done.returncode == 0 and "torch" not in done.stderr and stderr_of(done) == []
    for verb in VERBS.values():
        assert re.search(rf"^  {verb.name} +{re.escape(verb.help)}$", done.stdout, re.MULTILINE)


def test_no_verb_is_answered_with_the_list_and_status_2() -> None:
    done = started()
    assert done.returncode == 2 and done.stdout == "" and "torch" not in done.stderr
    assert "\n".join(stderr_of(done)) + "\n" == started("--help").stdout


@pytest.mark.parametrize(
    ("typed", "meant"), [("scroe", "score"), ("stdy", "study"), ("prview", "preview"), ("fti", "fit")]
)
def test_a_typo_is_one_line_with_the_verb_that_was_meant(typed: str, meant: str) -> None:
    start = time.perf_counter()
    done = started(typed, "--data.source", "rows.jsonl")
    assert time.perf_counter() - start < 5, "about 0.1 s on an idle machine; torch alone takes seconds"
    assert done.returncode == 2 and "torch" not in done.stderr
    (line,) = stderr_of(done)
    assert line.startswith(f"error: unknown verb {typed}. Did you mean {meant}? Known: fit, validate,")


def test_a_word_like_no_verb_is_one_line_without_a_suggestion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["deft_lightning", "xyzzy"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: unknown verb xyzzy. Known: {', '.join(TEN)}\n"


def test_a_typo_behind_options_gets_the_same_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("fit:\n  seed_everything: 1\n")
    monkeypatch.setattr("sys.argv", ["deft_lightning", "--config", str(tmp_path / "config.yaml"), "ftt"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown verb ftt. Did you mean fit? Known: fit,")


@pytest.mark.slow
def test_a_configuration_with_a_section_for_the_verb_stands_before_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("fit:\n  seed_everything: 41\ntest:\n  seed_everything: 42\n")
    for verb, seed in (("fit", 41), ("test", 42)):
        line = ["deft_lightning", "--config", str(tmp_path / "config.yaml"), verb, "--print_config"]
        monkeypatch.setattr("sys.argv", line)
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        assert f"seed_everything: {seed}\n" in capsys.readouterr().out


class Unbuilt(Exception):
    """Ends a command line once its parsers are there."""


@pytest.mark.slow
def test_only_the_parser_of_the_verb_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(DeftCLI):
        def parse_arguments(self, parser: object, args: object) -> None:
            raise Unbuilt({verb: len(self._parser(verb)._option_string_actions) for verb in self.subcommands()})

    def options(words: list[str]) -> dict[str, int]:
        with pytest.raises(Unbuilt) as built:
            Stopped(words)
        return dict(built.value.args[0])

    few = options(["probe", "--model.pretrained", "x"])
    assert few["probe"] > 100 and all(count < 10 for verb, count in few.items() if verb != "probe")
    assert all(count > 100 for count in options(["--config", "x.yaml", "probe"]).values())


def test_the_guides_have_the_table_and_the_readme_names_each() -> None:
    guide, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/guides/index.md", "README.md"))
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", guide, re.MULTILINE)
    assert [row for row in rows if row[0] in VERBS] == [(verb.name, verb.help) for verb in VERBS.values()]
    assert [name for name in VERBS if f"`{name}`" not in readme] == []
    used = {word for word in re.findall(r"-m deft_lightning (\w+)", readme)}
    assert used <= set(VERBS)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_use_verbs_that_there_are(page: Path) -> None:
    used = set(re.findall(r"python -m deft_lightning (\w+)", page.read_text(encoding="utf-8")))
    assert used <= set(VERBS)


# --- completion ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def completion() -> str:
    from deft_lightning.cli.completion import script

    return script()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("st", ["study"]),
        ("p", ["predict", "preview", "probe"]),
        ("fit --model.obj", ["--model.objective"]),
        ("score --bench", ["--benchmark"]),
        ("figures --coll", ["--collision"]),
        ("study --smo", ["--smoke"]),
        ("fit rows.j", []),
        # A colon and an equals sign are words of their own in bash, as they are between these spaces.
        ("fit --config deft : quick", ["quickstart"]),
        ("fit --config = deft : model/l", ["model/lora"]),
        ("study --config deft : study/re", ["study/real_noise", "study/real_tasks", "study/regimes"]),
        ("fit --config x.yaml --config deft : strategy/", ["strategy/ddp", "strategy/fsdp2"]),
        ("fit --config deft:quick", ["deft:quickstart"]),  # one word in zsh
        ("fit --data.source deft : quick", []),
    ],
)
def test_bash_completes_verbs_options_and_configurations(words: str, wanted: list[str], completion: str) -> None:
    typed = ["deft-lightning", *words.split(" ")]
    quoted = " ".join(f"'{word}'" for word in typed)
    ask = f"COMP_WORDS=({quoted}); COMP_CWORD={len(typed) - 1}; _deft_lightning; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", f"{completion}\n{ask}"], capture_output=True, text=True, check=True)
    assert [word for word in sorted(done.stdout.split()) if not word.endswith(".help")] == wanted


def test_completion_knows_the_options_of_every_parser(completion: str) -> None:
    for verb, (parser,) in parsers().items():
        case = next(line for line in completion.splitlines() if re.match(rf" *(?:\w+\|)*{verb}(?:\|\w+)*\) ", line))
        known = set(re.findall(r"--[\w.+-]+", case))
        assert known == {option for option in parser._option_string_actions if option.startswith("--")}


def test_print_completion_takes_no_value(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["deft_lightning", "--print_completion", "fish"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "fish; the script is for bash and zsh" in capsys.readouterr().err


def test_dispatch_imports_no_home_by_itself() -> None:
    source = inspect.getsource(import_module("deft_lightning.cli.dispatch")) + inspect.getsource(
        import_module("deft_lightning.cli.verbs")
    )
    assert "torch" not in re.sub(r'""".*?"""|#.*', "", source, flags=re.DOTALL)
