"""The class tree as registry: what is imported is known, a user's own classes included."""

from __future__ import annotations

import inspect
from typing import TypeVar

T = TypeVar("T")


def concrete(root: type[T], *besides: type[T]) -> dict[str, type[T]]:
    """Return the classes below a base that can be made, by name.

    Args:
        root: The base.
        besides: Classes that are only there to be derived from, though Python would make them.

    Returns:
        Every class imported so far that derives from ``root``, and ``root`` itself if it is concrete; of two with one
        name the one found first.
    """
    classes: dict[str, type[T]] = {}
    todo = [root]
    while todo:
        cls = todo.pop()
        todo.extend(cls.__subclasses__())
        if not inspect.isabstract(cls) and cls not in besides:
            classes.setdefault(cls.__name__, cls)
    return dict(sorted(classes.items()))
