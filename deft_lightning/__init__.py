"""Supervised fine-tuning of causal language models on imperfect instruction data (arXiv 2602.11424).

The public names load on first use, so that ``import deft_lightning`` costs nothing.
"""

from importlib import import_module
from typing import Any

from deft_lightning._version import __version__

_HOMES = {
    "SFTModule": "deft_lightning.training.module",
    "InstructionDataModule": "deft_lightning.data",
    "Trainer": "deft_lightning.training.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'deft_lightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


__all__ = ["InstructionDataModule", "SFTModule", "Trainer", "__version__"]
