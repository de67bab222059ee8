"""What the module asks of the data module and of the strategy, whoever has written them."""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray

from deft_lightning.annotations import Tokenizer
from deft_lightning.errors import UserError
from deft_lightning.evaluation import TestSet
from deft_lightning.models import Sharding


class PromptSource(Protocol):
    """A data module that gives prompts, as far as the module knows it.

    Attributes:
        tokenizer: Turns tokens into text.
        test_sets: What the prompts of each loader belong to, once the loaders are made.
    """

    tokenizer: Tokenizer
    test_sets: list[TestSet]

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest prepared example."""

    @property
    def label_counts(self) -> NDArray[np.int64] | None:
        """Return how often each token is a label of the training rows; None before they are prepared."""

    @property
    def stop_token_ids(self) -> list[int]:
        """Return tokens at which generation ends."""


def test_sets_of(prompts: PromptSource | None) -> list[TestSet]:
    """Return what the prompts of each loader belong to.

    Raises:
        UserError: There is no data module.
    """
    if prompts is None:
        raise UserError("test needs the data module: it knows the prompts and who grades them")
    return prompts.test_sets


def stop_tokens_of(prompts: PromptSource | None) -> list[int]:
    """Return the tokens at which generation ends.

    Raises:
        UserError: There is no data module with a tokenizer.
    """
    if prompts is None or prompts.tokenizer is None:
        raise UserError("generation needs the data module's tokenizer")
    return prompts.stop_token_ids


def computes_loss(trainer: Any | None) -> bool:
    """Return whether a trainer is about to fit or to validate; without one somebody's own loop may be."""
    return trainer is None or trainer.state.fn in (TrainerFn.FITTING, TrainerFn.VALIDATING)


class ShardingStrategy(Protocol):
    """A strategy under which every rank holds a share of the weights.

    Attributes:
        shards_weights: Whether it does.
        low_precision: Whether weights are gathered in bfloat16.
        replicate: Groups of ranks that hold the whole model each.
        cpu_offload: Whether shares are kept in host memory.
        offload_activations: Whether activations wait for backward in host memory.
    """

    shards_weights: bool
    low_precision: bool
    replicate: int
    cpu_offload: bool
    offload_activations: bool

    @property
    def root_device(self) -> torch.device:
        """Return the device of this rank."""

    @property
    def sharding(self) -> Sharding:
        """Return how the model is shared out, once the ranks have met."""


def shards(strategy: Any) -> TypeGuard[ShardingStrategy]:
    """Return whether a strategy shards the weights; nothing of it is touched that only its set-up knows."""
    return bool(getattr(type(strategy), "shards_weights", False))


def precision_of(trainer: Any) -> str:
    """Return the precision that was asked for: FSDP takes `bf16-mixed` over, and Lightning's own says 32-true then."""
    low = shards(trainer.strategy) and trainer.strategy.low_precision
    return "bf16-mixed" if low else str(trainer.precision)


def check_strategy(strategy: Any) -> None:
    """Refuse strategies under which the head would not see its whole weight.

    Raises:
        UserError: Names those that are supported.
    """
    if shards(strategy) or isinstance(strategy, DDPStrategy) or type(strategy).__name__.startswith("SingleDevice"):
        return
    raise UserError(f"{type(strategy).__name__} is not supported: use --trainer.strategy auto, ddp, or fsdp2 (sharded)")
