"""What the data asks of the run it is read for: of the trainer, its strategy, and the module that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lightning.pytorch import Trainer

from deft_lightning.annotations import CausalLM
from deft_lightning.evaluation.generate import positions


@runtime_checkable
class LoadsPretrained(Protocol):
    """A module whose model is loaded: its tokenizer is taken where the data names none.

    Attributes:
        pretrained: Hub id or folder; None for random weights.
        trust_remote_code: Whether code that comes with it may run.
    """

    pretrained: str | None
    trust_remote_code: bool


@runtime_checkable
class AddsTokens(Protocol):
    """A module whose model gets tokens of its own.

    Attributes:
        add_tokens: Their spellings; None for none.
    """

    add_tokens: list[str] | None


@runtime_checkable
class ChoosesAttention(Protocol):
    """A module that says how its model computes attention.

    Attributes:
        attention: Name of an implementation of transformers; None for the model's own.
    """

    attention: str | None


@runtime_checkable
class HoldsModel(Protocol):
    """A module around a Hugging Face model.

    Attributes:
        model: The model; None before it is built.
    """

    model: CausalLM


@runtime_checkable
class MayShard(Protocol):
    """A strategy that says whether every rank holds but a share of the weights.

    Attributes:
        shards_weights: Whether it does.
    """

    shards_weights: bool


@dataclass(frozen=True)
class Run:
    """What the data has to know of the run, as it is now; without a trainer, one process and no model.

    Attributes:
        rank: Of this process.
        world: Number of ranks.
        shards_weights: Whether the ranks share their weights, and so run the model together.
        pretrained: Hub id or folder of the model.
        trust_remote_code: Whether code that comes with it may run.
        attention: How the model computes attention.
        add_tokens: Spellings of tokens that the tokenizer gets.
        positions: How many tokens the model can tell apart by their place; None where nothing limits them.
    """

    rank: int = 0
    world: int = 1
    shards_weights: bool = False
    pretrained: str | None = None
    trust_remote_code: bool = False
    attention: str | None = None
    add_tokens: tuple[str, ...] = ()
    positions: int | None = None

    @classmethod
    def of(cls, trainer: Trainer | None) -> Run:
        """Look at a trainer, if there is one."""
        if trainer is None:
            return cls()
        module, strategy = trainer.lightning_module, trainer.strategy
        pretrained, trust = None, False
        if isinstance(module, LoadsPretrained):
            pretrained, trust = module.pretrained, module.trust_remote_code
        model = module.model if isinstance(module, HoldsModel) else None
        return cls(
            rank=trainer.global_rank,
            world=trainer.world_size,
            shards_weights=isinstance(strategy, MayShard) and strategy.shards_weights,
            pretrained=pretrained,
            trust_remote_code=trust,
            attention=module.attention if isinstance(module, ChoosesAttention) else None,
            add_tokens=tuple(module.add_tokens or ()) if isinstance(module, AddsTokens) else (),
            positions=positions(model) if model is not None else None,
        )
