"""Address that saved configs name; the code is in :mod:`deft_lightning.training.trainer`."""

from deft_lightning.training.trainer import Trainer

__all__ = ["Trainer"]
