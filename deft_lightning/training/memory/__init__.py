"""What a fit takes of memory: estimated from shapes before its first step, and compared with what the device has."""

from deft_lightning.training.memory.advice import estimate_of, setup_of, tell_memory
from deft_lightning.training.memory.estimate import MemoryEstimate, Setup, estimate

__all__ = ["MemoryEstimate", "Setup", "estimate", "estimate_of", "setup_of", "tell_memory"]
