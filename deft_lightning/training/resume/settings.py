"""What a run is trained with, in plain values: kept in its checkpoints, and compared when one is resumed."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from deft_lightning._lightning import unwrapped
from deft_lightning.annotations import Settings
from deft_lightning.data.prepared.cache import source_files
from deft_lightning.data.sources.given import GivenRows
from deft_lightning.data.sources.places import last_identity
from deft_lightning.data.sources.read import address_of, weights
from deft_lightning.terminal import visible
from deft_lightning.training.protocols import precision_of

ADDRESSES = {"deft_lightning.training.optim": "deft_lightning.optim"}  # where code is, where it is known to be
WHOLE = 1 << 26  # bytes up to which a file is known by all of its content; of a larger one, blocks of it are read
BLOCK, BLOCKS = 1 << 16, 64
LETTERS = 80  # of a value in a line

# Options of the data and of the module that change no number of the training, or that are compared elsewhere.
NOT_DATA = {
    "num_workers", "num_proc", "cache", "cache_dir", "test_source", "benchmarks", "benchmark_instruction",
    "eval_batch_size", "tokenizer", "tokenizer_size", "chat_template", "source", "validation_source", "noise",
    "exclude", "weights_from",
}  # fmt: skip
NOT_MODEL = {
    "self", "optimizer", "scheduler", "lora", "generation", "compile", "gradient_checkpointing", "head_backend",
    "trust_remote_code", "forgetting",
}  # fmt: skip
OF_TRAINER = (
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches", "max_steps",
    "max_epochs",
)  # fmt: skip
TOLD_APART = {"examples", "model.optimizer", "model.scheduler"}  # of the settings: not compared value by value
# Limits say how far training goes, not how; another model of the same shape is found in its config.
NOT_COMPARED = {"trainer.max_steps", "trainer.max_epochs", "model.pretrained", "model.architecture"}
NOT_IN_CONFIG = {"transformers_version", "dtype", "torch_dtype", "use_cache"}  # of a model: they change nothing here
PROGRESS = {"last_epoch", "base_lrs", "num_bad_epochs", "cooldown_counter", "best", "T_cur"}  # of a scheduler


def plain(value: Any) -> Any:
    """Return a value as numbers, text, lists and dicts; what is none of these as its representation."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # an address is another one in each process


def settings(trainer: Any) -> Settings:
    """Return what the fit of a trainer trains with, under the names of the options."""
    module, data, strategy = trainer.lightning_module, trainer.datamodule, trainer.strategy
    seed = os.environ.get("PL_GLOBAL_SEED")
    values: Settings = {
        "seed_everything": int(seed) if seed is not None and seed.isdigit() else seed,
        "trainer.strategy": _strategy_name(strategy),
        "trainer.precision": precision_of(trainer),
        "trainer.world_size": trainer.world_size,
        **{f"trainer.{name}": plain(getattr(trainer, name)) for name in OF_TRAINER},
        **_options(module, "model", NOT_MODEL),
    }
    if hasattr(module, "dtype_name"):
        values["model.dtype"] = module.dtype_name
    if getattr(module, "lora", None) is not None:
        values["model.lora.dropout"] = module.lora.dropout  # other adapters are not resumed at all
    if data is not None:
        values |= {
            **_options(data, "data", NOT_DATA),
            **_options(getattr(data, "settings", data), "data", NOT_DATA),
            **_data(data),
        }
    if trainer.optimizers:
        values["model.optimizer"] = of_optimizer(trainer.optimizers[0])
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        values["model.scheduler"] = of_scheduler(schedulers[0] if schedulers else None)
    return values


def _strategy_name(strategy: Any) -> str:
    return {"SingleDeviceStrategy": "auto", "DDPStrategy": "ddp", "FSDP2Strategy": "fsdp2"}.get(
        type(strategy).__name__, type(strategy).__name__
    )


def _options(owner: Any, prefix: str, leave_out: set[str]) -> Settings:
    """Return values of what a class is made with, where it keeps them under the same names."""
    names = [name for name in inspect.signature(type(owner).__init__).parameters if name not in leave_out]
    return {f"{prefix}.{name}": plain(vars(owner)[name]) for name in names if name in vars(owner)}


def _data(data: Any) -> Settings:
    values: Settings = {}
    for name in ("source", "validation_source"):
        if (source := getattr(data, name, None)) is not None:
            values[f"data.{name}"] = [[weight, content(one)] for one, weight in weights(source).items()]
    for name in ("exclude", "weights_from"):
        audit = getattr(getattr(data, "settings", None), name, None)
        values[f"data.{name}"] = None if audit is None else content(audit)
    noise = getattr(data, "noise", None)
    if is_dataclass(noise):
        values |= {f"data.noise.{field.name}": plain(getattr(noise, field.name)) for field in fields(noise)}
    template = getattr(getattr(data, "tokenizer", None), "chat_template", None)
    if template is not None:
        values["data.chat_template"] = hashlib.blake2b(str(template).encode(), digest_size=8).hexdigest()
    if "train" in getattr(data, "reports", {}):
        values["examples"] = data.size("train")
    return values


def content(source: str | GivenRows) -> str:
    """Return what a source holds, whatever its files are called: a digest; the name itself of the hub and of tasks."""
    if isinstance(source, GivenRows):
        return source.digest
    files = source_files(source)
    if not files:
        return last_identity(address_of(source) or source)
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(_digest(file))
    # Which split and options are asked for stands behind the name.
    asked = re.search(r"(\[[^\]]*\])?(\?\w+=.*)?$", source) if not Path(source).expanduser().exists() else None
    return digest.hexdigest() + (asked[0] if asked else "")


def _digest(path: Path) -> bytes:
    """Return the digest of a file's content; of a large one of its size and of blocks all over it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        for number in range(BLOCKS):
            file.seek((size - BLOCK) * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.digest()


def of_optimizer(optimizer: Optimizer) -> Settings:
    """Return class and arguments of an optimizer, and how many parameters each of its groups has."""
    optimizer = unwrapped(optimizer)
    return {
        "class": class_path(optimizer),
        "arguments": plain(optimizer.defaults),
        "parameters": [len(group["params"]) for group in optimizer.param_groups],
    }


def of_scheduler(scheduler: Any) -> Settings:
    """Return class and arguments of a schedule; no place in it."""
    if scheduler is None:
        return {"class": None, "arguments": {}}
    kept = {name: value for name, value in vars(scheduler).items() if name[0] != "_" and name not in PROGRESS}
    arguments = {name: plain(value) for name, value in kept.items() if not isinstance(value, Optimizer)}
    return {"class": class_path(scheduler), "arguments": arguments}


def class_path(instance: Any) -> str:
    """Return module and name of an object's class, by the address that saved configs and checkpoints know."""
    module = type(instance).__module__
    return f"{ADDRESSES.get(module, module)}.{type(instance).__qualname__}"


def differences(before: Settings, now: Settings) -> list[str]:
    """Return a line for each setting that differs, of those both sides know."""
    lines = []
    for name in now:
        if name not in before or name in TOLD_APART | NOT_COMPARED or before[name] == now[name]:
            continue
        if name in ("data.source", "data.validation_source", "data.exclude", "data.weights_from"):
            counts = before.get("examples"), now.get("examples")
            known = name in ("data.source", "data.exclude") and None not in counts
            sizes = f" ({shown(counts[0])} -> {shown(counts[1])} training examples)" if known else ""
            lines.append(f"{name}: other content than the checkpoint was trained on{sizes}")
        elif name == "data.chat_template":
            lines.append(f"{name}: another template than the checkpoint was trained with")
        elif name == "trainer.world_size":
            lines.append(
                f"{name}: {shown(before[name])} -> {shown(now[name])} ranks; gradients differ by rounding, "
                "dropout is drawn again, and a step has more or fewer examples in proportion"
            )
        else:
            lines.append(f"{name}: {shown(before[name])} -> {shown(now[name])}")
    return [*lines, *_of_optimizer(before, now), *_of_scheduler(before, now)]


def of_model(before: str, now: str) -> list[str]:
    """Return a line for each value that two texts of a model's config do not share, names and versions apart."""
    try:
        old, new = json.loads(before), json.loads(now)
    except ValueError:
        return []
    if not isinstance(old, dict):
        return []
    return [
        f"model: {shown(name)} is {shown(old[name])} in the checkpoint's model -> {shown(new[name])}"
        for name in new
        if name in old and old[name] != new[name] and name[0] != "_" and name not in NOT_IN_CONFIG
    ]


def changed_arguments(before: Settings, now: Settings) -> set[str]:
    """Return the arguments of the optimizer for which another value is asked than the checkpoint was trained with."""
    old, new = (_arguments(side, "model.optimizer") for side in (before, now))
    return {name for name in new if name in old and old[name] != new[name]}


def _of_optimizer(before: Settings, now: Settings) -> list[str]:
    old, new = (_arguments(side, "model.optimizer") for side in (before, now))
    # Torch's own schedules restore the rates they began with; ours has those of the run.
    kept = "" if _class(now, "model.scheduler").startswith("deft_lightning.") else "; the schedule keeps the former"
    return [
        f"model.optimizer.{name}: {shown(old[name])} -> {shown(new[name])}{kept if name == 'lr' else ''}"
        for name in new
        if name in old and old[name] != new[name]
    ]


def _of_scheduler(before: Settings, now: Settings) -> list[str]:
    old, new = (_arguments(side, "model.scheduler") for side in (before, now))
    ours = _class(now, "model.scheduler").startswith("deft_lightning.")
    lines = []
    for name in new:
        if name not in old or old[name] == new[name]:
            continue
        if ours and name == "total_steps":
            lines.append(
                f"model.scheduler: planned over {shown(old[name])} -> {shown(new[name])} optimizer steps; the "
                "rate continues at the same step of the new plan"
            )
        else:
            kept = "" if ours else "; the schedule keeps the former"
            lines.append(f"model.scheduler.{name}: {shown(old[name])} -> {shown(new[name])}{kept}")
    return lines


def _arguments(side: Settings, name: str) -> Settings:
    about = side.get(name)
    arguments = about.get("arguments") if isinstance(about, dict) else None
    return arguments if isinstance(arguments, dict) else {}


def _class(side: Settings, name: str) -> str:
    about = side.get(name)
    return str(about.get("class")) if isinstance(about, dict) else ""


def shown(value: Any) -> str:
    """Return a value for a line: short, and without what a terminal would obey."""
    text = " ".join(visible(str(value)).split())
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"
