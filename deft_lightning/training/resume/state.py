"""States in a checkpoint that restoring would take without a look, and training would then stumble over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deft_lightning._lightning import unwrapped
from deft_lightning.annotations import Checkpoint
from deft_lightning.errors import UserError
from deft_lightning.training.resume.refuse import short
from deft_lightning.training.resume.settings import of_optimizer, shown

LIKE_THE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def refuse_state(path: str | Path, held: Checkpoint, optimizers: list[Any]) -> None:
    """Refuse an optimizer's state that is of another optimizer, or of other parameters, than the one it is meant for.

    Raises:
        UserError: Number of groups or parameters, or the options of a group, are others.
    """
    states = held.get("optimizer_states")
    if not isinstance(states, list) or not states or not optimizers:
        return  # a folder of shares, or what the restoring complains about
    groups = states[0].get("param_groups") if isinstance(states[0], dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise UserError(f"{path}: cannot be resumed: its optimizer_states are malformed (--ckpt_path)")
    now = of_optimizer(optimizers[0])
    before = [len(group.get("params", ())) for group in groups]
    if before != now["parameters"]:
        raise UserError(
            f"{path}: its optimizer has {_counted(before)}, this run's {_counted(now['parameters'])}; they must train"
            " the same parameters (--model.lora, --model.pretrained, --model.architecture)"
        )
    saved = {str(name) for group in groups for name in group} - {"initial_lr"}
    own = {name for group in unwrapped(optimizers[0]).param_groups for name in group}
    if saved - own and own - saved:  # newer versions of an optimizer have more options, not others
        raise UserError(
            f"--model.optimizer {short(now['class'])}: {path} holds the state of another optimizer, with the options"
            f" {shown(', '.join(sorted(saved - own)))}"
        )
    params = [parameter for group in optimizers[0].param_groups for parameter in group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    for number, parameter in zip(numbers, params, strict=True):
        for name, value in (states[0].get("state") or {}).get(number, {}).items():
            if name in LIKE_THE_PARAMETER and isinstance(value, torch.Tensor) and value.shape != parameter.shape:
                raise UserError(
                    f"{path}: cannot be resumed: {name} of parameter {number} has the shape {tuple(value.shape)}, the"
                    f" parameter {tuple(parameter.shape)} (--ckpt_path)"
                )


def refuse_loops(path: str | Path, held: Checkpoint) -> None:
    """Refuse progress that is not counted in whole numbers, and a place in the data that is none.

    Raises:
        UserError: The message names the part.
    """
    loops = held.get("loops")
    progress = loops.get("fit_loop") if isinstance(loops, dict) else None
    if not isinstance(progress, dict):
        raise UserError(f"{path}: cannot be resumed: it holds no progress of a fit (--ckpt_path)")
    for name, value in progress.items():
        depth = 4 if str(name).endswith("optim_progress") else 2  # it counts steps of each optimizer
        if str(name).endswith("progress") and not (isinstance(value, dict) and _counts(value, depth)):
            raise UserError(f"{path}: cannot be resumed: its {shown(name)} is malformed (--ckpt_path)")
    state = progress.get("state_dict")
    places = state.get("combined_loader", []) if isinstance(state, dict) else []
    if not isinstance(places, list) or not all(
        isinstance(place, dict) and _counts({name: place[name] for name in ("epoch", "samples") if name in place})
        for place in places
    ):
        raise UserError(f"{path}: cannot be resumed: its place in the data is malformed (--ckpt_path)")


def _counts(value: Any, depth: int = 1) -> bool:
    if isinstance(value, dict) and depth:
        return all(_counts(one, depth - 1) for one in value.values())
    return isinstance(value, int) and value >= 0


def _counted(groups: list[int]) -> str:
    return f"{sum(groups)} parameters in {len(groups)} groups"
