"""The help of a verb: short, ours first, and every word of every option for who asks."""

from __future__ import annotations

import re

import pytest

from deft_lightning.__main__ import main
from deft_lightning.cli.help import TRAINER, _sentence


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["deft_lightning", *words])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_fit_says_what_is_ours_on_few_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(monkeypatch, capsys, "fit", "--help")
    lines = text.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120
    options = re.findall(r"^  --(\S+)", text, re.MULTILINE)
    assert len(options) == len(set(options))
    first = {name.partition(".")[0]: place for place, name in reversed(list(enumerate(options)))}
    assert first["data"] < first["model"] < first["trainer"] < first["gate_monitor"]
    assert {name.removeprefix("trainer.") for name in options if name.startswith("trainer.")} == set(TRAINER)
    assert not re.search(r"Conditional|ast-resolver|<class|Union\[|typing|Namespace\(|==SUPPRESS==|MISSING", text)
    # Defaults as they are typed, fields of what an option makes, and the words of a choice that its text does not name.
    for wanted in (
        r"--data\.batch_size 8 ", r"--data\.packing false ", r"--model\.objective DEFT ",
        r"--model\.optimizer\.lr 5e-05 ",
        r"--model\.lora\.r 16 ", r"--model\.lora\.use_rslora false ", r"--model\.dtype float32 .*or bfloat16",
        r"--ckpt_path +Checkpoint: a file, or `last`", r"--data\.exclude_top ",
    ):  # fmt: skip
        assert re.search(wanted, text), wanted
    for word in ("DEFT", "Contaminated", "ResponseSwap", "fsdp2", "reasoning_gym:", "gsm8k", "--help=all"):
        assert word in text


def test_who_asks_gets_every_word_and_the_rest_of_lightning_s(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(monkeypatch, capsys, "fit", "--help=all")
    assert len(text.splitlines()) > 600
    for option in ("--trainer.sync_batchnorm", "--trainer.plugins", "--data.noise.ops.help", "--model.lora.help"):
        assert option in text
    joined = " ".join(text.split())
    assert "a share of the ranked rows (5%), or a count (50)" in joined


def test_a_verb_has_its_own_options_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(monkeypatch, capsys, "probe", "--help")
    options = re.findall(r"^  --(\S+)", text, re.MULTILINE)
    assert {"audit", "page", "truth", "examples"} <= set(options[:15])
    assert text.startswith("usage: python -m deft_lightning probe")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Column of x, for example `a.b`. Second one.", "Column of x, for example `a.b`"),
        ("Longest\n  example", "Longest example"), ("A share (0.5). -1 for none", "A share (0.5)"), ("", ""),
        ("``fused`` or not.", "`fused` or not"), ("In version 0.2 it is new", "In version 0.2 it is new"),
    ],
)  # fmt: skip
def test_a_sentence_ends_where_the_next_begins(text: str, sentence: str) -> None:
    assert _sentence(text) == sentence
