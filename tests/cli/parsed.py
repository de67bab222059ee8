"""The parser of the command line, built once: it takes a second, and a test of an option needs no more than it."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import pytest

from deft_lightning.cli.main import DeftCLI, DeftParser
from deft_lightning.errors import UserError


class _Built(Exception):
    pass


class _Builder(DeftCLI):
    def parse_arguments(self, parser: Any, args: Any) -> None:
        raise _Built(parser)


@lru_cache
def parser() -> DeftParser:
    """Return the parser with all verbs."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    try:
        _Builder([])
    except _Built as built:
        return built.args[0]  # type: ignore[no-any-return]
    raise AssertionError


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line with which the parser refuses a command line."""
    capsys.readouterr()
    with pytest.raises((SystemExit, UserError)) as stop:
        parser().parse_args(args)
    error = capsys.readouterr().err
    if isinstance(stop.value, UserError):  # which `run` prints
        error += f"error: {stop.value}\n"
    else:
        assert stop.value.code == 2
    (line,) = error.splitlines()
    assert line.startswith("error: ") and "Traceback" not in line
    return line
