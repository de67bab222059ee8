"""Malformed predictions files end in one line or in figures: no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.score import cases

from deft_lightning.evaluation.command import main


def test_no_malformed_predictions_are_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int = 80, seed: int = 12
) -> None:
    refused = 0
    for name, arguments in cases(seed, count, tmp_path):
        code = 0
        try:
            main(arguments[1:])
        except SystemExit as stop:
            code = int(stop.code or 0)
        told = capsys.readouterr()
        if code:
            assert code == 2 and told.err.startswith("error: ") and told.err.count("\n") == 1, name
            refused += 1
        else:
            assert told.out.startswith("benchmark"), name
    assert 3 < refused < count - 3, "both kinds of outcome"
