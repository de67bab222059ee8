"""Names of optimizers without their module: torch's come first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import isclass
from typing import Any

import torch
from jsonargparse import _typehints


@contextmanager
def torch_first() -> Iterator[None]:
    """Let a name that several optimizers have mean torch's.

    Other packages bring optimizers of the same names, bitsandbytes for one, and peft imports them: whether a name is
    ambiguous would depend on what else is installed. Schedules are not meant: Lightning's ReduceLROnPlateau takes a
    metric to watch and torch's does not, so that name stays refused with both.
    """
    before = _typehints.resolve_class_path_by_name

    def resolve(cls: Any, name: str) -> str:
        try:
            return before(cls, name)
        except ValueError:  # several classes
            own = getattr(torch.optim, name, None)
            if isclass(own) and isclass(cls) and issubclass(own, cls):
                return f"torch.optim.{name}"
            raise

    _typehints.resolve_class_path_by_name = resolve
    try:
        yield
    finally:
        _typehints.resolve_class_path_by_name = before
