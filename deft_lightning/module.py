"""Address that saved configs name; the code is in :mod:`deft_lightning.training.module`."""

from deft_lightning.training.module import SFTModule

__all__ = ["SFTModule"]
