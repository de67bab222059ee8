"""The fused head: one implementation for every objective, which it knows only as a callable."""

from deft_lightning.ops.backend import Backend
from deft_lightning.ops.chunked import ReferenceHead
from deft_lightning.ops.linear import linear_loss, linear_token_stats

__all__ = ["Backend", "ReferenceHead", "linear_loss", "linear_token_stats"]
