"""``--model my.Module`` and ``--data my.Data``: a subclass of one's own in place of the package's class.

Its options stand where those of the package's class do. The run's config.yaml names it as ``model_class`` and
``data_class``, so that the config alone repeats the run.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from deft_lightning.cli.config_files import load, read_text
from deft_lightning.cli.shipped import OPTIONS, path_of
from deft_lightning.errors import UserError

SHORT = {"--model": "model_class", "--data": "data_class"}
CLASS_PATH = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")


def class_path(cls: type) -> str:
    """Return the path by which a class is named in a configuration."""
    return f"{cls.__module__}.{cls.__qualname__}"


def take_classes(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the arguments with ``--model_class`` for ``--model`` where a class is named, and the classes asked for.

    ``--model`` and ``--data`` also take a file of options or options as ``{NAME: VALUE}``: those stay.

    Args:
        arguments: A command line.

    Returns:
        The arguments, and class paths by ``model_class`` and ``data_class``; of several the last one counts.
    """
    rest: list[str] = []
    asked: dict[str, str] = {}
    at = 0
    while at < len(arguments):
        option, equals, value = str(arguments[at]).partition("=")
        words = 1 if equals else 2
        value = value if equals else str(arguments[at + 1]) if at + 1 < len(arguments) else ""
        name = option.removeprefix("--")
        if option in SHORT and _names_class(value):
            name = SHORT[option]
            rest.append(f"--{name}={value}")
            at += words
        else:
            rest.append(arguments[at])
            at += 1
        if name in SHORT.values() and value:
            asked[name] = value
        elif option in OPTIONS:
            asked |= _named_in(value)
    return rest, asked


def _names_class(value: str) -> bool:
    is_file = value.endswith((".yaml", ".yml", ".json")) or Path(value).exists()
    return CLASS_PATH.fullmatch(value) is not None and not is_file


def _named_in(file: str) -> dict[str, str]:
    """Return the classes that a configuration names; what is wrong with the file is for the parser to say."""
    with suppress(UserError, OSError, ValueError, TypeError, yaml.YAMLError):
        path: Any = jsonargparse.Path(path_of(file), mode="fr")  # type: ignore[attr-defined]
        options = load(read_text(path), file)
        return {name: str(options[name]) for name in SHORT.values() if options.get(name)}
    return {}


def find_class(path: str, base: type, option: str) -> Any:
    """Return the class of a path.

    Args:
        path: Module and class, ``my_package.module.MyModule``.
        base: What it must be a subclass of.
        option: The option, for the message.

    Raises:
        UserError: There is no such class, or it is no such subclass.
    """
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(import_module(module), name, None)
    except (ImportError, ValueError) as error:
        raise UserError(f"{option} {path}: cannot import {module or path} ({error})") from None
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        raise UserError(f"{option} {path}: is not a subclass of {class_path(base)}")
    return cls
