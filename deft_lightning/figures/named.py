"""Objectives from text as people write them: ``DEFT``, ``Tsallis(q=0.3)``, ``my_pkg.Mine(power=2)``."""

from __future__ import annotations

import ast
import importlib
import inspect
from typing import Any

from deft_lightning.errors import UserError, did_you_mean
from deft_lightning.objectives import Objective, known_objectives


def parse_objective(text: str) -> Objective:
    """Build an objective from its name, with options in brackets; nothing of the text is evaluated.

    Options are numbers, strings (quotes may be left out), True, False, None, and other objectives:
    ``Truncated(threshold=0.4, keep=below, base=Likelihood)``. A repr of an objective is such a text.

    Args:
        text: A known name, or the class path of the user's own, which is imported.

    Raises:
        UserError: No such class or option, a value it refuses, or text that is none of this.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise UserError(f"objective {text!r}: write NAME or NAME(option=value, ...)") from None
    found = _build(tree, text)
    if not isinstance(found, Objective):
        raise UserError(f"objective {text!r}: {_unknown(text.strip())}")
    return found


def _build(node: ast.expr, text: str) -> Any:
    """Return an objective, or the plain value of an option."""
    if isinstance(node, ast.Call):
        cls = _class(node.func, text)
        if any(keyword.arg is None for keyword in node.keywords) or any(
            isinstance(argument, ast.Starred) for argument in node.args
        ):
            raise UserError(f"objective {text!r}: options are written out, without stars")
        if len({keyword.arg for keyword in node.keywords}) < len(node.keywords):
            raise UserError(f"objective {text!r}: an option is given twice")
        arguments = [_build(argument, text) for argument in node.args]
        options = {str(keyword.arg): _build(keyword.value, text) for keyword in node.keywords}
        return _made(cls, arguments, options, text)
    if isinstance(node, ast.Attribute) or (isinstance(node, ast.Name) and node.id in known_objectives()):
        return _made(_class(node, text), [], {}, text)
    if isinstance(node, ast.Name):
        return node.id
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        raise UserError(
            f"objective {text!r}: {ast.unparse(node)} is neither a number, a word nor an objective"
        ) from None


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
        raise UserError(f"objective {text!r}: {last} of {module} is no objective")
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
