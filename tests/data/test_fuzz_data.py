"""Malformed files end in one line or in clean rows: no traceback, no crash of the process."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from fuzz.data import DAMAGE, KINDS, cases

from deft_lightning.cli.main import run
from deft_lightning.data import InstructionDataModule
from deft_lightning.data.preview import as_text, page
from deft_lightning.errors import UserError

pytestmark = pytest.mark.slow


def outcome(arguments: list[str]) -> str:
    """Prepare and show the data of a command line of ``preview``; return the line of the error, or nothing."""
    given = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    template = given["--data.chat_template"]
    try:
        data = InstructionDataModule(
            given["--data.source"], on_bad_row=given["--data.on_bad_row"], cache=False,  # type: ignore[arg-type]
            chat_template=None if template == "null" else template, tokenizer_size=0,
            validation_fraction=float(given["--data.validation_fraction"]),
        )  # fmt: skip
        data.setup("fit")
        shown = data.samples("train", 20)
        text = page("a", shown, []) + "".join(map(as_text, shown))
        assert not set(text) & set("\0\x1b\u202e\u2028")
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1500
        assert given["--data.source"] in str(error)
        return str(error)
    except Exception:
        return "TRACEBACK " + traceback.format_exc()
    return ""


def _all(seed: int, count: int, folder: Path, pipe: Any) -> None:
    for name, arguments in cases(seed, count, folder):
        pipe.send((name, None))
        pipe.send((name, outcome(arguments)))
    pipe.send(None)


@pytest.mark.skipif(sys.platform != "linux", reason="a process that crashes is a fork of this one")
@pytest.mark.filterwarnings("ignore")
def test_no_malformed_file_is_a_traceback_or_a_crash(tmp_path: Path, count: int = 40, seed: int = 12) -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_all, args=(seed, count, tmp_path, sender))
    process.start()
    sender.close()
    found: dict[str, str] = {}
    name = "nothing"
    while True:
        try:
            told = receiver.recv()
        except EOFError:
            pytest.fail(f"the process ended with {process.exitcode} at {name}")
        if told is None:
            break
        name = told[0]
        if told[1] is not None:
            found[name] = told[1]
    process.join()
    assert len(found) == count
    wrong = {name: told for name, told in found.items() if told.startswith("TRACEBACK")}
    assert not wrong, "\n".join(f"{name}: {told}" for name, told in wrong.items())
    assert 3 < sum(not told for told in found.values()) < count - 3, "both kinds of outcome"


def test_cases_are_drawn_from_the_seed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = (list(cases(3, 60, tmp_path / name)) for name in "ab")
    assert [name for name, _ in one] == [name for name, _ in other] and len(one) == 60
    for (_, first), (_, second) in zip(one, other, strict=True):
        assert Path(first[2]).read_bytes() == Path(second[2]).read_bytes()
    drawn = " ".join(name for name, _ in one)
    assert all(how in drawn for how in DAMAGE) and sum(kind in drawn for kind in KINDS) > len(KINDS) // 2


def test_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, arguments = next((n, a) for n, a in cases(12, 40, tmp_path) if ".gz, cut off" in n or ".zst, cut off" in n)
    with pytest.raises(SystemExit) as stop:
        run(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("error: ") == 1 and "Traceback" not in error, name
