"""Options that parse and yet cannot be meant, and Lightning's own complaints: each in a line that names the option."""

from __future__ import annotations

import inspect
import linecache
import math
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from deft_lightning.errors import UserError
from deft_lightning.training.fsdp2 import FSDP2Strategy

LEAST: dict[str, int] = {
    "accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "log_every_n_steps": 0,
    "max_epochs": -1, "max_steps": -1, "min_epochs": 0, "min_steps": 0, "num_nodes": 1, "num_sanity_val_steps": -1,
    "reload_dataloaders_every_n_epochs": 0,
}  # fmt: skip
SHARES = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")
SEEDS = ("seed_everything", "data.seed", "data.noise.seed", "model.generation.seed")
LARGEST_SEED = 2**32 - 1  # of numpy
PATHS = ("trainer.default_root_dir", "checkpoint.dirpath", "predictions.output", "data.cache_dir", "output", "audit",
         "ckpt_path", "trainer.logger.init_args.save_dir")  # fmt: skip
LIGHTNING = str(Path(lightning.__file__).parent)
COMPLAINTS = (MisconfigurationException, ValueError, TypeError, RuntimeError, NotImplementedError, ImportError)


def check_options(config: Any, verb: str) -> None:
    """Refuse values that every type accepts and nothing can be done with.

    Args:
        config: The parsed options of a verb.
        verb: Its name.

    Raises:
        UserError: Names the option.
    """
    for name in PATHS:
        value = config.get(name)
        if isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", value):
            name = name.replace(".init_args", "")
            raise UserError(f"--{name} {value}: is a URL; give a local folder or file")
    for name in SEEDS:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and not 0 <= value <= LARGEST_SEED:
            raise UserError(f"--{name} {value} is outside 0 to {LARGEST_SEED}")
    for key, value in _numbers(config):
        if not math.isfinite(value):
            raise UserError(f"--{key}: {value} is not a finite number")
    check_trainer(config.get("trainer") or {}, verb)


def complete(config: Any) -> None:
    """Let early stopping by a validation metric look after validations.

    Lightning looks after each training epoch unless told otherwise, and ends a run that :attr:`max_steps` cuts within
    the first epoch, before any validation, as if the metric did not exist.
    """
    callbacks = config.get("trainer.callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        name, options = str(callback.get("class_path")), callback.get("init_args") or {}
        early = name.startswith("lightning.") and name.endswith(".EarlyStopping")
        if early and str(options.get("monitor")).startswith("val") and options.get("check_on_train_epoch_end") is None:
            options["check_on_train_epoch_end"] = False


def _numbers(config: Any) -> Iterator[tuple[str, float]]:
    """Yield the numbers for which infinity means nothing, by option."""
    for place in ("model.optimizer", "model.scheduler", "model.generation", "trainer", "data.noise"):
        stack = [(place, config.get(place))]
        while stack:
            key, value = stack.pop()
            if isinstance(value, float):
                yield key, value
            elif isinstance(value, Mapping) or hasattr(value, "__dict__"):
                if key.startswith("trainer."):  # callbacks and loggers have bounds that may be infinite
                    continue
                members = value if isinstance(value, Mapping) else vars(value)
                stack += [(key if name == "init_args" else f"{key}.{name}", below) for name, below in members.items()]
            elif isinstance(value, (list, tuple)):
                stack += [(key, below) for below in value]


def check_trainer(options: Any, verb: str) -> None:
    """Refuse values of the trainer that Lightning takes, or about which it complains without the option's name."""
    for name, least in LEAST.items():
        value = options.get(name)
        if value is not None and value < least:
            raise UserError(f"--trainer.{name} must be at least {least}, got {value}")
    for name in SHARES:
        value = options.get(name)
        if value is not None and (value < 0 or (isinstance(value, float) and value > 1)):
            raise UserError(f"--trainer.{name} {value}: give a whole number of batches, or a share from 0.0 to 1.0")
    if verb == "fit" and options.get("limit_train_batches") == 0:
        raise UserError("--trainer.limit_train_batches 0: nothing would be trained")
    interval = options.get("val_check_interval")
    if isinstance(interval, (int, float)) and (interval <= 0 or (isinstance(interval, float) and interval > 1)):
        raise UserError(
            f"--trainer.val_check_interval {interval}: give a number of batches from 1, or a share of an epoch up to"
            " 1.0; --trainer.limit_val_batches 0 switches validation off"
        )
    devices, cores = str(options.get("devices", "auto")), os.cpu_count() or 1
    if options.get("accelerator") == "cpu" and devices.isdigit() and int(devices) > max(8, 4 * cores):
        raise UserError(f"--trainer.devices {devices}: one process for each, and this machine has {cores} CPU cores")
    strategy = options.get("strategy")
    if str(getattr(strategy, "class_path", None)).endswith(".FSDP2Strategy"):
        FSDP2Strategy(**vars(strategy.init_args))  # the parser would say what else could stand there, and not why
    if isinstance(strategy, str) and strategy.startswith("fsdp") and strategy != "fsdp2":
        raise UserError(
            f"--trainer.strategy {strategy}: FSDP1 hides the weight of the head from the loss and is no longer"
            " developed; use fsdp2"
        )
    if isinstance(strategy, str) and not strategy.startswith(("auto", "ddp", "fsdp2")):
        raise UserError(f"--trainer.strategy {strategy} is not supported: use auto, ddp, or fsdp2 (sharded)")


def check_optimizer(make: Any) -> None:
    """Refuse settings of an optimizer before data and model are loaded: it is made for a single weight.

    Args:
        make: What makes the optimizer of parameters.
    """
    try:
        make([torch.nn.Parameter(torch.zeros(1, 1))])
    except (ValueError, TypeError) as error:
        raise UserError(f"--model.optimizer: {error}") from None


def trainer_error(error: Exception) -> UserError:
    """Return Lightning's complaint about what its trainer was made with, by the option that it is about."""
    text = " ".join(str(error).split())
    names = [name for name in inspect.signature(Trainer).parameters if name in re.findall(r"\w+", text)]
    if "backend found" in text or (not names and "accelerator" in text.lower()):
        names = ["accelerator"]
    first = min(names, key=text.find, default=None)
    if first is None and (match := re.match(r"`Timer\(duration=(.*)\)`", text)):
        return UserError(f"--trainer.max_time {match[1]}: give a time as DD:HH:MM:SS")
    return UserError(f"--trainer{'' if first is None else f'.{first}'}: {text}")


def made_in_vain(error: BaseException) -> UserError:
    """Return why a class that an option names could not be made: the cause alone, without the parser's words."""
    text, cause = str(error), error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    options = {"loggers.logger.Logger": "trainer.logger", "callbacks.callback.Callback": "trainer.callbacks"}
    option = next((option for base, option in options.items() if base in text), "")
    return UserError(f"--{option}: {cause}" if option else str(cause))


def complaint_of_lightning(error: BaseException) -> UserError | None:
    """Return the line for an error that Lightning raised on purpose, None for any other.

    On purpose means that the innermost frame is a ``raise`` in its files; errors of our own code, and those that
    merely pass through Lightning, keep their traceback.

    Args:
        error: What a run ended with.
    """
    if isinstance(error, UserError) or not isinstance(error, COMPLAINTS):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not frames[-1].filename.startswith(LIGHTNING):
        return None
    frame, core = frames[-1], os.path.join(LIGHTNING, "pytorch", "core")
    if frame.filename.startswith(core) or "raise" not in linecache.getline(frame.filename, frame.lineno or 0):
        return None  # the core complains about how a module was written
    text = " ".join(str(error).split())
    if match := re.match(r"`val_check_interval` \((\d+)\) must be less than .*?training batches \((\d+)\)", text):
        return UserError(
            f"--trainer.val_check_interval {match[1]} is above the {match[2]} batches of an epoch: set it to at most"
            f" {match[2]}, or count over epochs with --trainer.check_val_every_n_epoch null"
        )
    if match := re.match(r"Early stopping conditioned on metric `(train/.*?)` which is not available", text):
        return UserError(
            f"--trainer.callbacks.monitor {match[1]}: it is logged every --trainer.log_every_n_steps steps, "
            "and was not logged yet when early stopping looked for it; set --trainer.log_every_n_steps 1"
        )
    return trainer_error(error) if "`" in text else UserError(text)
