"""Address that saved configs name; the code is in :mod:`deft_lightning.training.strategy`."""

from deft_lightning.training.strategy import AtomicCheckpointIO, FSDP2Strategy

__all__ = ["AtomicCheckpointIO", "FSDP2Strategy"]
