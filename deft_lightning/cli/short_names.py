"""Names of optimizers and schedules without their module: torch's come first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import isclass
from typing import Any

import torch
from jsonargparse import _typehints

MODULES = (torch.optim, torch.optim.lr_scheduler)


@contextmanager
def torch_first() -> Iterator[None]:
    """Let a name that several classes have mean torch's.

    Other packages bring optimizers of the same names, bitsandbytes for one, and peft imports them: whether a name is
    ambiguous would depend on what else is installed.
    """
    before = _typehints.resolve_class_path_by_name

    def resolve(cls: Any, name: str) -> str:
        try:
            return before(cls, name)
        except ValueError:  # several classes
            for module in MODULES:
                own = getattr(module, name, None)
                if isclass(own) and isclass(cls) and issubclass(own, cls):
                    return f"{module.__name__}.{name}"
            raise

    _typehints.resolve_class_path_by_name = resolve
    try:
        yield
    finally:
        _typehints.resolve_class_path_by_name = before
