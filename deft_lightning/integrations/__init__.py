"""The objectives inside other trainers."""

from deft_lightning.integrations.transformers import compute_loss_func

__all__ = ["compute_loss_func"]
