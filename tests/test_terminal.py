"""Texts of strangers never steer the terminal."""

from __future__ import annotations

import io
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from deft_lightning.cli.crash import ended
from deft_lightning.errors import UserError
from deft_lightning.terminal import GuardedStream, guarded, visible

ATTACKS = {
    "clears the screen": "\x1b[2J",
    "changes the title": "\x1b]0;title\x07",
    "8-bit escape": "\x9b31m",
    "link": "\x1b]8;;http://example.invalid\x07link\x1b]8;;\x07",
    "overwrites its line": "harmless\rerror: none",
    "backspaces": "evil\x08\x08\x08\x08good",
    "turns text round": "\u202etxt.exe",
    "isolates": "\u2066a\u2069",
    "invisible tags": "\U000e0041\U000e0042",
    "line separator": "a\u2028b",
    "half a surrogate": "a\ud800b",
}


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
def test_nothing_that_steers_is_left(text: str) -> None:
    shown = visible(text)
    assert shown != text and "\\" in shown
    assert not {unicodedata.category(letter) for letter in shown} & {"Cc", "Cs", "Zl", "Zp"}
    assert not set(shown) & set("\u202e\u2066\u2069\U000e0041\U000e0042")


@pytest.mark.slow
@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Zl", "Zp", "Co", "Cn"))))
def test_what_can_be_seen_stays(text: str) -> None:
    assert visible(text) == text


def test_tabs_line_feeds_and_joined_letters_stay() -> None:
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert visible(f"a\tb\n{family} \u0915\u094d\u200d\u0937") == f"a\tb\n{family} \u0915\u094d\u200d\u0937"


def test_errors_show_it() -> None:
    assert str(UserError("row \x1b[2J 3: \u202e")) == "row \\x1b[2J 3: \\u202e"


def test_a_guarded_stream_shows_it_and_bars_go_on_to_work() -> None:
    plain, under = io.StringIO(), io.StringIO()
    for stream in (plain, GuardedStream(under)):
        for _ in tqdm(range(3), file=stream, desc="a", mininterval=0, position=1):  # type: ignore[arg-type]
            pass
    kept = [text.partition("|")[0] for text in (plain.getvalue(), under.getvalue())]
    assert kept[0] == kept[1] and "\x1b[A" in under.getvalue(), "the bar moves the cursor as before"
    GuardedStream(under).write("row \x1b[2J\r 1\r\n")
    assert under.getvalue().endswith("row \\x1b[2J\\r 1\n")


def test_the_standard_streams_are_guarded_and_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with guarded(), guarded():
        print("\x1b[31mred")
        assert sys.stdout.fileno is not None
    assert sys.stdout is before
    assert capsys.readouterr().out == "\\x1b[31mred\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no disk that is always full")
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_on_a_full_disk_costs_its_text_and_not_the_work(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, name, full)
        with pytest.raises(SystemExit) as end, guarded(), ended():
            for step in range(3):
                print("a" * 10_000, file=getattr(sys, name), flush=True)
                done.append(step)
        full.flush()
    assert done == [0, 1, 2] and end.value.code == 2
    assert capsys.readouterr().err == ("error: standard output: the disk is full\n" if name == "stdout" else "")


def test_a_stream_that_was_closed_takes_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with guarded(), ended():
        print("a")
        sys.stderr.write("b")
        sys.stdout.flush()
