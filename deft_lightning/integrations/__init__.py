"""The objectives inside other trainers."""

from deft_lightning.integrations.transformers import TokenWeights, compute_loss_func

__all__ = ["TokenWeights", "compute_loss_func"]
