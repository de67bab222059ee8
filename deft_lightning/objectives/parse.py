"""The spelling of an objective: ``DEFT``, ``Tsallis(q=0.3)``, ``my_pkg.Mine(power=2)``, and back as a legend.

Figures, studies, the command line and configurations read it here, and legends are written in it.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from deft_lightning.errors import UserError, did_you_mean
from deft_lightning.objectives.base import Objective, known_objectives

CALL = re.compile(r"\s*(?P<name>[A-Za-z_][\w.]*)\s*\(.*\)\s*", re.DOTALL)


def parse_objective(text: str) -> Objective:
    """Build an objective from its name, with options in brackets; nothing of the text is evaluated.

    Options are numbers, strings (quotes may be left out), True, False, None, other objectives, and names with values
    in braces: ``Truncated(threshold=0.4, keep=below, base=Likelihood)``, ``BySource(own={gsm8k: NLL})``. A repr of an
    objective is such a text.

    Args:
        text: A known name, or the class path of the user's own, which is imported.

    Raises:
        UserError: No such class or option, a value it refuses, or text that is none of this.

    Example:
        >>> parse_objective("Rescaled(base=Cayley(floor=0.5))").base
        Cayley(floor=0.5)
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise UserError(f"objective {text!r}: write NAME or NAME(option=value, ...)") from None
    objective = _build(tree, text)
    if not isinstance(objective, Objective):
        raise UserError(f"objective {text!r}: {_unknown(text.strip())}")
    return objective


def as_objective(given: Any) -> Objective:
    """Return an objective that was given as one, or by its name as on the command line.

    Raises:
        UserError: It is neither; a class wants brackets.
    """
    if isinstance(given, str):
        return parse_objective(given)
    if isinstance(given, type) and issubclass(given, Objective):
        raise UserError(f"objective {given.__name__}is a class; make an instance, {given.__name__}()")
    if not isinstance(given, Objective):
        raise UserError(f"objective {given!r}: give an instance such as DEFT(), or a name")
    return given


def settings_of(text: str) -> dict[str, Any] | None:
    """Return ``NAME(option=value, ...)`` as a configuration has it: ``class_path`` and ``init_args``, nested likewise.

    Options are not checked: that is for whoever makes the objective.

    Args:
        text: Any text.

    Returns:
        The settings; None for text that is no such call of an objective, a bare name among it.

    Example:
        >>> settings_of("Cayley(floor=0.5)")
        {'class_path': 'Cayley', 'init_args': {'floor': 0.5}}
    """
    called = CALL.fullmatch(text)
    if called is None or not (called["name"] in known_objectives() or called["name"].rpartition(".")[2][:1].isupper()):
        return None
    try:
        node = ast.parse(text.strip(), mode="eval").body
        return _settings(node, text) if isinstance(node, ast.Call) else None
    except (SyntaxError, ValueError, TypeError):
        return None


def _settings(node: ast.Call, text: str) -> dict[str, Any]:
    cls, arguments, options = _parts(node, text)
    names = [name for name in inspect.signature(cls).parameters if name not in options]
    given = {**dict(zip(names, arguments, strict=False)), **options}
    if len(given) < len(arguments) + len(options):
        raise ValueError(f"{cls.__name__} has no {len(arguments)} options")
    return {
        "class_path": ast.unparse(node.func),
        "init_args": {name: _setting(value, text) for name, value in given.items()},
    }


def _setting(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call):
        return _settings(node, text)
    if isinstance(node, ast.Dict):
        return {name: _setting(value, text) for name, value in _named(node, text)}
    value = _build(node, text)
    return {"class_path": type(value).__name__} if isinstance(value, Objective) else value


def _named(node: ast.Dict, text: str) -> list[tuple[str, ast.expr]]:
    """Return names and values of ``{name: value}``; quotes around a name may be left out."""
    pairs = []
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Name):
            pairs.append((key.id, value))
        elif isinstance(key, ast.Constant) and isinstance(key.value, str):
            pairs.append((key.value, value))
        else:
            raise UserError(f"objective {text!r}: names in braces must be words or quoted text")
    return pairs


def label(objective: Objective) -> str:
    """Return the legend of an objective: its name, and the options that depart from their defaults.

    Example:
        >>> from deft_lightning.objectives import Cayley, DEFT, Floored
        >>> label(DEFT()), label(Floored(base=Cayley(floor=0.5)))
        ('DEFT', 'Floored(base=Cayley(floor=0.5))')
    """
    if type(objective).__repr__ is not Objective.__repr__:  # a user's own may say it in its own way
        return repr(objective).removesuffix("()")
    fields: tuple[dataclasses.Field[Any], ...] = (
        dataclasses.fields(objective) if dataclasses.is_dataclass(objective) else ()
    )
    shown = []
    for field in fields:
        if not field.init:  # what a run tells it is no setting
            continue
        value, made = getattr(objective, field.name), field.default_factory
        if value != (field.default if made is dataclasses.MISSING else made()):
            shown.append(f"{field.name}={_label_of(value)}")
    return type(objective).__name__ + (f"({', '.join(shown)})" if shown else "")


def _label_of(value: Any) -> Any:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_label_of(part)}" for name, part in value.items()) + "}"
    return label(value) if isinstance(value, Objective) else value


def short_legend(legend: str) -> str:
    """Return a legend without the empty brackets of objectives that have no settings."""
    return legend.replace("()", "")


def readable(legend: str) -> str:
    """Return a legend without options at their defaults; one of a class that is not known here as it is.

    Example:
        >>> readable("Floored(base=DEFT(), floor=0.3, decay='constant')"), readable("my.Own(power=2)")
        ('Floored(floor=0.3)', 'my.Own(power=2)')
    """
    try:
        return label(parse_objective(legend))
    except UserError:
        return short_legend(legend)


def _parts(node: ast.Call, text: str) -> tuple[type[Objective], list[ast.expr], dict[str, ast.expr]]:
    """Return the class of a call, its arguments, and its options by name."""
    cls = _class(node.func, text)
    starred = any(isinstance(argument, ast.Starred) for argument in node.args)
    if starred or any(keyword.arg is None for keyword in node.keywords):
        raise UserError(f"objective {text!r}: write options out, without stars")
    options = {str(keyword.arg): keyword.value for keyword in node.keywords}
    if len(options) < len(node.keywords):
        raise UserError(f"objective {text!r}: an option is given twice")
    return cls, list(node.args), options


def _build(node: ast.expr, text: str) -> Any:
    """Return an objective, or the plain value of an option."""
    if isinstance(node, ast.Call):
        cls, first, named = _parts(node, text)
        arguments = [_build(argument, text) for argument in first]
        options = {name: _build(value, text) for name, value in named.items()}
        return _made(cls, arguments, options, text)
    if isinstance(node, ast.Attribute) or (isinstance(node, ast.Name) and node.id in known_objectives()):
        return _made(_class(node, text), [], {}, text)
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Dict):
        return {name: _build(value, text) for name, value in _named(node, text)}
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        raise UserError(f"objective {text!r}: {ast.unparse(node)} is not a number, a word or an objective") from None


def _class(node: ast.expr, text: str) -> type[Objective]:
    name = ast.unparse(node)
    known = known_objectives()
    if name in known:
        return known[name]
    module, _, last = name.rpartition(".")
    if not module:
        raise UserError(f"objective {text!r}: {_unknown(name)}")
    try:
        cls = getattr(importlib.import_module(module), last, None)
    except (ImportError, ValueError) as error:
        raise UserError(f"objective {text!r}: cannot import {module} ({error})") from None
    if not (inspect.isclass(cls) and issubclass(cls, Objective) and not inspect.isabstract(cls)):
        raise UserError(f"objective {text!r}: {last} of {module} is not an objective")
    return cls


def _made(cls: type[Objective], arguments: list[Any], options: dict[str, Any], text: str) -> Objective:
    signature = inspect.signature(cls)
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        known = ", ".join(signature.parameters) or "none"
        raise UserError(f"objective {text!r}: {error}; options of {cls.__name__}: {known}") from None
    try:
        return cls(*arguments, **options)
    except (TypeError, ValueError, AttributeError) as error:  # refused by the class, or a word where a number belongs
        raise UserError(f"objective {text!r}: {error}") from None


def _unknown(name: str) -> str:
    known = known_objectives()
    return f"{name} is unknown.{did_you_mean(name, known)} Known: {', '.join(known)}, or a class path of your own"
