"""Optimizer and schedule of a run, made of what was asked for, the model and the trainer's limits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.optim import Muon, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from deft_lightning.annotations import CausalLM, Settings
from deft_lightning.errors import UserError, did_you_mean
from deft_lightning.models import is_sharded
from deft_lightning.training.fused_adam import fuse
from deft_lightning.training.muon import MuonAdamW, for_muon
from deft_lightning.training.optim import CosineWithWarmup
from deft_lightning.training.protocols import precision_of
from deft_lightning.training.rounding import warn_of_rounding
from deft_lightning.training.slow_products import warn_of_slow_products

CONSTANT = "--model.scheduler null"
FOR_WHOLE_MODELS = 5e-5  # the default learning rate


def make_optimizer(
    model: CausalLM,
    optimizer: Callable[..., Optimizer],
    scheduler: Callable[..., LRScheduler] | None,
    trainer: Trainer,
    rate: float | None = None,
) -> Settings:
    """Return optimizer and schedule as Lightning wants them; biases and norms are exempt from weight decay.

    Args:
        model: What is trained.
        optimizer: Called with parameter groups.
        scheduler: Called with the optimizer; None for a constant rate.
        trainer: Its optimizer steps are what the schedule is planned over.
        rate: Peak learning rate in place of the optimizer's own.

    Raises:
        UserError: One of them refuses its settings, or the run has no end to plan for.
    """
    groups = groups_of(model, optimizer)
    try:
        built = optimizer(groups)
    except (ValueError, TypeError) as error:
        raise UserError(f"--model.optimizer: {error}") from None
    fuse(built)
    if rate is not None:
        for group in built.param_groups:
            group["lr"] = rate
    warn_of_rounding(model, built)
    warn_of_slow_products(model, precision_of(trainer))
    if hasattr(model, "get_base_model") and (peak := built.param_groups[0]["lr"]) <= FOR_WHOLE_MODELS:
        rank_zero_info(
            f"adapters train with the learning rate {peak:g}, which suits full fine-tuning; 2e-4 is usual for"
            " adapters: --model.optimizer.lr 2e-4"
        )
    if scheduler is None:
        return {"optimizer": built}
    try:
        schedule = scheduler(built)
    except (ValueError, TypeError) as error:
        raise UserError(f"--model.scheduler: {error}") from None
    if isinstance(schedule, CosineWithWarmup) and schedule.total_steps is None:
        schedule.plan(planned_steps(trainer, "the schedule", f", or train at a constant rate with {CONSTANT}"))
    config: Settings = {"scheduler": schedule, "interval": "step"}
    if isinstance(schedule, ReduceLROnPlateau):
        config |= {"monitor": _monitor(schedule, trainer), "strict": False}
    return {"optimizer": built, "lr_scheduler": config}


def groups_of(model: CausalLM, optimizer: Callable[..., Optimizer]) -> list[dict[str, Any]]:
    """Return a model's trained weights in the groups that an optimizer gets; none is empty.

    Args:
        model: What is trained.
        optimizer: As for :func:`make_optimizer`.

    Raises:
        UserError: The optimizer cannot train this model.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2]},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if _class(optimizer) in (Muon, MuonAdamW):
        groups = _groups_of_muon(_class(optimizer), model, trained)
    return [group for group in groups if group["params"]]


def _class(optimizer: Callable[..., Optimizer]) -> type | None:
    """Return what a callable makes, of a weight of no meaning; None if it wants the true ones."""
    try:
        return type(optimizer([torch.nn.Parameter(torch.zeros(1, 1))]))
    except Exception:  # it is called again with the true ones, and what it says then is told
        return None


def _groups_of_muon(cls: type | None, model: CausalLM, trained: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    if cls is Muon:
        raise UserError(
            "--model.optimizer Muon trains only matrices; --model.optimizer MuonAdamW uses Muon for the "
            "matrices of the layers, and AdamW for the rest"
        )
    if hasattr(model, "get_base_model"):
        raise UserError(
            "--model.optimizer MuonAdamW is for full fine-tuning: leave --model.lora out, or use AdamW for adapters"
        )
    if is_sharded(model):
        raise UserError("--model.optimizer MuonAdamW needs whole matrices: use --trainer.strategy auto or ddp")
    return for_muon(model, trained)


def _monitor(schedule: ReduceLROnPlateau, trainer: Trainer) -> str:
    """Return the metric that decides when a rate is reduced: one of validation, `val/nll` unless it is named."""
    monitor = str(getattr(schedule, "monitor", "val/nll"))
    if not monitor.startswith("val"):
        raise UserError(f"--model.scheduler.monitor {monitor}: name a metric of validation, such as val/nll")
    if trainer.limit_val_batches == 0:
        raise UserError(
            "--model.scheduler ReduceLROnPlateau waits for a validation, and there is none: see"
            " --trainer.limit_val_batches"
        )
    # Lightning looks for it at each step, and would say each time that there was no validation yet.
    warnings.filterwarnings("ignore", message="ReduceLROnPlateau conditioned on metric .* strict is set to `False`")
    return monitor


def step_plateaus(trainer: Any, metrics: Mapping[str, Any]) -> None:
    """Step the schedules that wait for a metric, after a validation and before it is saved: a resumed run goes on.

    Args:
        trainer: Has the schedules; nothing is done outside a fit.
        metrics: Of the validation, by tag.

    Raises:
        UserError: The metric is not among them.
    """
    if trainer.state.fn != "fit" or trainer.sanity_checking:
        return
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau:
            if config.monitor not in metrics:
                raise UserError(
                    f"--model.scheduler.monitor {config.monitor}: no such metric of validation."
                    f"{did_you_mean(config.monitor, metrics)} Known: {', '.join(metrics)}"
                )
            config.scheduler.step(float(metrics[config.monitor]))


def planned_steps(trainer: Trainer, what: str, otherwise: str = "") -> int:
    """Return the number of optimizer steps of a run, for something that needs it.

    Args:
        trainer: Knows its limits.
        what: Needs it, for the message.
        otherwise: What else could be done, for the message.

    Raises:
        UserError: The run has no end that is counted in steps.
    """
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps) or steps < 0:
        raise UserError(f"{what} needs an end: set --trainer.max_epochs or --trainer.max_steps{otherwise}")
    return int(steps)
