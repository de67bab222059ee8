"""Address that saved configs name; the code is in :mod:`deft_lightning.training`."""

from deft_lightning.training.checkpoint_io import AtomicCheckpointIO
from deft_lightning.training.fsdp2 import FSDP2Strategy

__all__ = ["AtomicCheckpointIO", "FSDP2Strategy"]
