"""Address that saved configs name; the code is in :mod:`deft_lightning.training.optim`."""

from deft_lightning.training.optim import CosineWithWarmup, MuonAdamW

__all__ = ["CosineWithWarmup", "MuonAdamW"]
