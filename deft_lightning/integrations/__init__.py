"""The objectives inside other trainers: ``transformers.Trainer``, and TRL's SFTTrainer, which is one.

GateCallback loads on first use: it is a class of transformers, the losses need torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deft_lightning.integrations.transformers import OneForward, TokenWeights, compute_loss_func

if TYPE_CHECKING:
    from deft_lightning.integrations.callback import GateCallback


def __getattr__(name: str) -> Any:
    if name == "GateCallback":
        return import_module("deft_lightning.integrations.callback").GateCallback
    raise AttributeError(f"module 'deft_lightning.integrations' has no attribute {name!r}")


__all__ = ["GateCallback", "OneForward", "TokenWeights", "compute_loss_func"]
