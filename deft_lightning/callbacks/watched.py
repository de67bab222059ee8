"""What callbacks read of the module that trains, whoever has written it."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from lightning.pytorch import LightningModule, Trainer

from deft_lightning.annotations import CausalLM, Tokenizer
from deft_lightning.objectives import Needs, Objective


class WatchedModule(Protocol):
    """A module that trains with a token objective, as far as callbacks know it.

    Its ``training_step`` gives ``stats``, the detached statistics of the supervised tokens, and where something is
    known of noise ``noise_code`` and ``clean_labels`` of the same tokens.

    Attributes:
        objective: The one that was chosen.
        model: The Hugging Face model, None until it is built.
        watched_needs: What callbacks want to know of tokens beside what the objective looks at.
        stop_asked: Set on a rank that is asked to stop.
        stop_agreed: Whether any rank had been asked when the last optimizer step was made.
    """

    objective: Objective
    model: CausalLM
    watched_needs: Needs
    stop_asked: bool
    stop_agreed: bool

    @property
    def current_objective(self) -> Objective:
        """Return the objective in force at this point of the run."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Return what turns tokens into text; None where there is none."""

    @property
    def device(self) -> torch.device:
        """Return where its tokens are."""

    def log(self, name: str, value: Any, prog_bar: bool = False) -> None:
        """Log a value under a tag."""


def is_watched(module: LightningModule) -> bool:
    """Return whether a module trains with a token objective; in any other there is nothing to watch."""
    return hasattr(module, "objective")


def watched(module: LightningModule) -> WatchedModule:
    """Return a module as what callbacks watch."""
    return cast("WatchedModule", module)


def compares(module: LightningModule) -> bool:
    """Return whether a module compares predictions with those before training, when it validates."""
    objective = getattr(module, "objective", None)
    anchored = isinstance(objective, Objective) and objective.needs.reference
    return anchored or bool(getattr(module, "forgetting", False))


def sources_of(trainer: Trainer, split: str) -> tuple[str, ...]:
    """Return the names of the sources that figures of a split are told apart by; none where there is but one."""
    splits = getattr(getattr(trainer, "datamodule", None), "splits", None)
    sources = getattr(splits, "sources", None)
    return tuple(sources.get(split, ())) if isinstance(sources, dict) else ()


def injects_noise(trainer: Trainer) -> bool:
    """Return whether labels are corrupted on purpose, so that it is known which are wrong."""
    noise = getattr(getattr(trainer, "datamodule", None), "noise", None)
    return bool(getattr(noise, "ops", ()))


def noisy_sources_of(trainer: Trainer) -> tuple[str, ...]:
    """Return the names of the sources of the corrupted examples that are validated on; some may have none of them.

    They are training rows, unless the noise is in the validation rows as well.
    """
    if not injects_noise(trainer):
        return ()
    return sources_of(trainer, "validation_noisy") or sources_of(trainer, "train")


def tracked_tags(objective: Objective) -> set[str]:
    """Return the tags of what a run keeps for its objective from step to step."""
    tracked = objective.tracks
    return set() if tracked is None else set(tracked.logged(tracked.told((), 0.0)))
