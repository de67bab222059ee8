"""From a command line to the home of its verb; what needs no model is there before torch is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from deft_lightning._version import __version__
from deft_lightning.cli.verbs import TRAINER, VERBS, overview, unknown_verb
from deft_lightning.deferred import deferred, no_collection


def dispatch(arguments: Sequence[str], module: type | None = None, data: type | None = None) -> None:
    """Run a verb.

    Args:
        arguments: The command line behind the name of the program.
        module: A subclass of :class:`~deft_lightning.SFTModule` in its place.
        data: A subclass of :class:`~deft_lightning.InstructionDataModule` in its place.

    Raises:
        SystemExit: With status 2 after one line on stderr, for a user's mistake.
    """
    first = arguments[0] if arguments else ""
    if first in ("--version", "-V") and len(arguments) == 1:
        print(f"deft_lightning {__version__}")
    elif first in ("--help", "-h"):
        print(overview())
    elif not first:
        sys.stderr.write(f"{overview()}\n")
        sys.exit(2)
    elif not first.startswith("-") and first not in VERBS:
        sys.stderr.write(f"error: {unknown_verb(first)}\n")
        sys.exit(2)
    elif first == "--print_completion":
        _home("deft_lightning.cli.completion").main(arguments[1:])
    elif first in VERBS and VERBS[first].home != TRAINER:
        _home(VERBS[first].home).main(arguments[1:])
    else:  # the verb may also stand behind options, or in a configuration
        _home(TRAINER).run(module=module, data=data)


def _home(name: str) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers deadlock in forked loader processes
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls the deprecated names
    if name != TRAINER or name in sys.modules:
        return import_module(name)
    with no_collection(), deferred():
        return import_module(name)
