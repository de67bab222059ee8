"""What cannot be resumed: said in one line that names the option, before anything is prepared or built."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from deft_lightning.annotations import Checkpoint, Settings
from deft_lightning.errors import UserError
from deft_lightning.models import LoRA
from deft_lightning.models.checkpoint import is_complete
from deft_lightning.models.contents import KEY
from deft_lightning.models.lora import changes_base
from deft_lightning.models.seal import unbounded
from deft_lightning.models.shares import SHARED
from deft_lightning.training.protocols import shards
from deft_lightning.training.resume.settings import class_path, of_optimizer, shown

DEFAULTS = LoRA().settings()


def peek(path: str | Path) -> dict[str, Any] | None:
    """Return what a checkpoint holds, its tensors not yet read; None if it cannot be read, which loading it will tell.

    Of a folder of shares it is what is neither weights nor optimizer.
    """
    source = Path(path)
    file = source / SHARED if source.is_dir() else source
    try:
        with zipfile.ZipFile(file) as archive:
            if unbounded(archive):
                return None
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # the unpickler fails in any way
        return None
    return held if isinstance(held, dict) else None


def about(held: Checkpoint) -> Settings:
    """Return what this package has written into a checkpoint; empty if it is not one of this package."""
    own = held.get(KEY)
    return own if isinstance(own, dict) else {}


def known_settings(held: Checkpoint) -> Settings:
    """Return what a checkpoint was trained with; empty for one from before this was kept."""
    settings = about(held).get("settings")
    return settings if isinstance(settings, dict) else {}


def refuse(path: str | Path, trainer: Trainer, module: Any) -> None:
    """Refuse to resume what cannot be.

    Raises:
        UserError: The checkpoint holds weights only, is a folder of shares under another strategy, is further than the
            limits of this run, or is of another optimizer, another schedule, or other adapters.
    """
    if Path(path).is_dir() and is_complete(Path(path)) and not shards(trainer.strategy):
        raise UserError(
            f"{path}: is a sharded checkpoint, which only --trainer.strategy fsdp2 can resume; export it to "
            "start from its weights"
        )
    held = peek(path)
    if held is None or not about(held):
        return
    if "lr_schedulers" not in held or (Path(path).is_file() and "optimizer_states" not in held):
        raise UserError(
            f"{path}: holds weights only (--checkpoint.save_weights_only true), so fit cannot resume it; "
            "export it and start a run from its weights with --model.pretrained FOLDER"
        )
    _refuse_limits(path, held, trainer)
    _refuse_adapters(path, about(held).get("lora"), getattr(module, "lora", None))
    _refuse_quantization(path, about(held).get("quantization"), getattr(module, "quantization", None))
    before = known_settings(held)
    asked = getattr(module, "add_tokens", None)
    if before.get("model.add_tokens", asked) != asked:
        old = shown(before["model.add_tokens"])
        raise UserError(f"--model.add_tokens {shown(asked)}: {path} was trained with {old}; set it as it was")
    classes = _made(module)
    if classes is not None:
        refuse_classes(path, before, *classes)


def _refuse_limits(path: str | Path, held: Checkpoint, trainer: Trainer) -> None:
    step, steps, epochs = held.get("global_step"), trainer.max_steps, trainer.max_epochs
    if isinstance(step, int) and 0 <= steps < step:
        raise UserError(
            f"--trainer.max_steps {steps}: {path} is at step {step} already; set --trainer.max_steps to more than"
            f" {step}"
        )
    done = _epochs_done(held)
    if epochs is not None and 0 <= epochs < done:
        raise UserError(
            f"--trainer.max_epochs {epochs}: {path} has {done} finished epochs; set --trainer.max_epochs to more than"
            f" {done}"
        )


def _epochs_done(held: Checkpoint) -> int:
    """Return how many epochs a checkpoint has behind it; 0 if its progress cannot be read, which loading it tells."""
    try:
        progress = held["loops"]["fit_loop"]
        epoch, batches = progress["epoch_progress"]["current"], progress["epoch_loop.batch_progress"]
        open_one = epoch["started"] > epoch["processed"]
        return int(epoch["processed"]) + int(open_one and bool(batches["is_last_batch"]))
    except (KeyError, TypeError, ValueError):
        return 0


def _refuse_adapters(path: str | Path, before: Any, lora: Any) -> None:
    now = None if lora is None else lora.settings()
    if before == now:
        return
    if before is None or now is None:
        has, asked = ("no adapters", "some") if before is None else ("adapters", "none")
        way = "leave --model.lora out" if before is None else f"set --model.lora as it was: {shown(before)}"
        raise UserError(f"--model.lora: {path} has {has}, and this run asks for {asked}; {way}")
    if not isinstance(before, dict):
        return
    for name in now:
        old, new = _scale(before, name), _scale(now, name)
        if name == "init_lora_weights" and not (changes_base(old) or changes_base(new)):
            continue  # replaced by what is resumed
        if old != new and name != "dropout":  # drawn anew in each step
            raise UserError(
                f"--model.lora.{name} {shown(new)}: {path} was trained with {shown(old)}, and cannot be resumed with"
                " another one"
            )


def _refuse_quantization(path: str | Path, before: Any, now: str | None) -> None:
    old = before.get("kind") if isinstance(before, dict) else None
    if old != now:
        had = "is not quantised" if old is None else f"is quantised to {old}"
        way = "leave --model.quantization out" if old is None else f"set --model.quantization {old}"
        raise UserError(f"--model.quantization {shown(now)}: the base of the adapters in {path} {had}; {way}")


def _scale(lora: Settings, name: str) -> Any:
    value = lora.get(name, DEFAULTS[name])  # earlier checkpoints say less
    return 2 * lora.get("r", 0) if name == "alpha" and value is None else value


def _made(module: Any) -> tuple[str, str | None] | None:
    """Return classes of the optimizer and the schedule that a module will make, from one parameter of no meaning."""
    try:
        optimizer = module.optimizer_callable([{"params": [torch.nn.Parameter(torch.zeros(1, 1))]}])
        scheduler = module.scheduler_callable(optimizer) if module.scheduler_callable is not None else None
        return of_optimizer(optimizer)["class"], None if scheduler is None else class_path(scheduler)
    except Exception:  # a user's own callable may want the true parameters; they are looked at again when made
        return None


def refuse_classes(path: str | Path, before: Settings, optimizer: str, scheduler: str | None) -> None:
    """Refuse another optimizer or schedule than the one whose state a checkpoint holds.

    Raises:
        UserError: They are of another class; the message names both.
    """
    for option, now in (("optimizer", optimizer), ("scheduler", scheduler)):
        known = before.get(f"model.{option}")
        if not isinstance(known, dict) or "class" not in known or known["class"] == now:
            continue
        old, new = (short(one) for one in (known["class"], now))
        if old == new:  # of two modules
            old, new = shown(known["class"]), str(now)
        raise UserError(
            f"--model.{option} {new}: {path} was trained with {old}, whose state {new} cannot use; set"
            f" --model.{option} {old}, or export the checkpoint and start a run from its weights with"
            " --model.pretrained FOLDER"
        )


def short(path: str | Path | None) -> str:
    """Return the name of a class without its module."""
    return "null" if path is None else shown(path).rpartition(".")[2]
