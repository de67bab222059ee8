"""Optimizer and learning-rate schedule of the paper's recipe, and Muon."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from deft_lightning.annotations import State
from deft_lightning.errors import UserError
from deft_lightning.training.muon import MuonAdamW

__all__ = ["CosineWithWarmup", "MuonAdamW", "adamw"]


def adamw(params: Iterable[Any]) -> Optimizer:
    """Return AdamW as in the paper's recipe: lr 5e-5, betas (0.9, 0.95), weight decay 0.01."""
    return torch.optim.AdamW(params, lr=5e-5, betas=(0.9, 0.95), weight_decay=0.01)


class CosineWithWarmup(LRScheduler):
    """Linear warm-up, then half a cosine, counted in optimizer steps.

    Factor on each group's rate at step t of T with w = warmup * T: ``(t + 1) / w`` before w, then
    ``floor + (1 - floor) (1 + cos(pi (t - w) / (T - w))) / 2``.

    Args:
        optimizer: Its groups' rates are the peaks.
        warmup: Share of the steps, in [0, 1].
        floor: Factor at the end, in [0, 1].
        total_steps: T; None lets the trainer fill it in from its own limits.
    """

    def __init__(
        self, optimizer: Optimizer, warmup: float = 0.1, floor: float = 0.0, total_steps: int | None = None
    ) -> None:
        for name, value in (("warmup", warmup), ("floor", floor)):
            if not 0.0 <= value <= 1.0:
                raise UserError(f"--model.scheduler.{name} {value} is outside [0, 1]")
        self.warmup, self.floor, self.total_steps = warmup, floor, total_steps
        super().__init__(optimizer)

    def plan(self, total_steps: int) -> None:
        """Set the number of optimizer steps before the first one."""
        self.total_steps = total_steps
        self._apply()

    def _apply(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> State:
        """Return the place in the schedule; its shape and the peak rates belong to the run, not to the checkpoint."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: State) -> None:
        """Go to a place in the schedule."""
        self.__dict__.update(state_dict)
        self._apply()

    def factor(self, step: int) -> float:
        """Return the factor on the peak rate at an optimizer step, from 0."""
        if self.total_steps is None:
            return 1.0
        rising = math.ceil(self.warmup * self.total_steps - 1e-9)  # 0.07 * 100 is a little above 7 in binary
        if step < rising:
            return (step + 1) / rising
        progress = min((step - rising) / max(self.total_steps - rising, 1), 1.0)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2

    def get_lr(self) -> list[float | Any]:
        """Return the rates of the current step."""
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]
