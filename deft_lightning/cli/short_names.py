"""Names without their module: those of strategies, and of optimizers, where torch's come first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import isclass
from typing import Any

import torch
from jsonargparse import _typehints
from lightning.pytorch.strategies import Strategy

# The names that --trainer.strategy takes, where an option of the class follows.
STRATEGIES = {"fsdp2": "deft_lightning.strategy.FSDP2Strategy", "ddp": "lightning.pytorch.strategies.DDPStrategy"}


@contextmanager
def named_classes() -> Iterator[None]:
    """Let a name that several optimizers have mean torch's, and the name of a strategy its class.

    Other packages bring optimizers of the same names, bitsandbytes for one, and peft imports them: whether a name is
    ambiguous would depend on what else is installed. Schedules are not meant: Lightning's ReduceLROnPlateau takes a
    metric to watch and torch's does not, so that name stays refused with both. The parser asks for the class of
    `fsdp2` only where an option of it is given: `--trainer.strategy fsdp2 --trainer.strategy.replicate 2`.
    """
    before = _typehints.resolve_class_path_by_name

    def resolve(cls: Any, name: str) -> str:
        if isclass(cls) and issubclass(cls, Strategy):
            name = STRATEGIES.get(name, name)
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
