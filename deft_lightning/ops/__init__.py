"""The fused head: one implementation for every objective, which it knows only as a callable."""

from deft_lightning.ops.backend import Backend
from deft_lightning.ops.columns import ColumnSparsity
from deft_lightning.ops.linear import linear_loss, linear_token_stats
from deft_lightning.ops.reference import ReferenceHead

__all__ = ["Backend", "ColumnSparsity", "ReferenceHead", "linear_loss", "linear_token_stats"]
