"""Settings of a module as plain values, for loggers and checkpoints; and from a checkpoint back to settings."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from deft_lightning.annotations import Record, Settings
from deft_lightning.evaluation import Generation
from deft_lightning.models import LoRA
from deft_lightning.models.contents import KEY
from deft_lightning.objectives import Objective, known_objectives
from deft_lightning.objectives.parse import parse_objective
from deft_lightning.training.head_sparsity import check_sparsity
from deft_lightning.training.optim import CosineWithWarmup, MuonAdamW
from deft_lightning.training.resume.settings import of_optimizer, of_scheduler, plain

OURS = "deft_lightning."
HYPER_PARAMETERS = "hyper_parameters"  # the key is Lightning's
# Optimizers that a checkpoint may name: nothing is imported for it.
OPTIMIZERS: dict[str, type[Optimizer]] = {
    f"{cls.__module__}.{cls.__qualname__}": cls
    for cls in (*vars(torch.optim).values(), MuonAdamW)
    if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
}
SWITCHES = ("gradient_checkpointing", "forgetting")
PLAIN = (
    "pretrained", "architecture", "head", "head_backend", "head_sparsity", "dtype", "attention",
    "gradient_checkpointing", "compile", "on_nonfinite", "trust_remote_code", "add_tokens", "resize_vocabulary",
    "forgetting", "quantization", "compute_dtype",
)  # fmt: skip


def hyper_parameters(settings: Record) -> Settings:
    """Return the settings of a module as numbers, text, lists and dicts: nothing large, nothing that cannot be dumped.

    Args:
        settings: Arguments of a module by name, whatever else is among them.

    Returns:
        The objective as its legend; optimizer and schedule as the class that is made, and its arguments.
    """
    optimizer, scheduler, lora = (settings[name] for name in ("optimizer", "scheduler", "lora"))
    made = _attempt(optimizer, [{"params": [torch.nn.Parameter(torch.zeros(1, 1))]}])
    schedule = None if scheduler is None or made is None else _attempt(scheduler, made)
    values = {name: plain(settings[name]) for name in PLAIN}
    values |= {"objective": repr(settings["objective"]), "generation": asdict(settings["generation"])}
    values["lora"] = None if lora is None else lora.settings()
    values["optimizer"] = _named(optimizer) if made is None else _flat(of_optimizer(made))
    values["scheduler"] = None
    if scheduler is not None:
        values["scheduler"] = _named(scheduler) if schedule is None else _flat(of_scheduler(schedule))
    return values


def _attempt(make: Callable[..., Any], argument: Any) -> Any | None:
    """Return what a callable makes of a weight of no meaning; None where it wants the true ones."""
    try:
        return make(argument)
    except Exception:  # it is called again with the true ones, and what it says then is told
        return None


def _named(make: Any) -> Settings:
    return {"class": str(getattr(make, "__qualname__", type(make).__qualname__))}


def _flat(described: Record) -> Settings:
    return {"class": described["class"], **described["arguments"]}


def settings_of(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of a module that a checkpoint was saved from, and what it does not say or may not name.

    Nothing in it is imported: objectives are those of this package, optimizers those of torch.

    Args:
        checkpoint: As :func:`deft_lightning.models.load_checkpoint` returns it.

    Returns:
        Arguments by name, without the model; names of settings that are left at their defaults.
    """
    about = checkpoint[KEY]
    held = checkpoint.get(HYPER_PARAMETERS)
    held = _of_earlier(about) if not isinstance(held, Mapping) or "objective" not in held else held
    arguments: Settings = {}
    unknown: list[str] = []
    readers: dict[str, Callable[[Any], Any]] = {
        "objective": _objective, "optimizer": _optimizer, "scheduler": _scheduler, "generation": _generation,
        **{name: partial(_plain, name) for name in ("head", "head_backend", "on_nonfinite", *SWITCHES)},
    }  # fmt: skip
    if "head_sparsity" in held:
        readers["head_sparsity"] = _sparsity
    else:  # a checkpoint from before the option: nothing was left out
        arguments["head_sparsity"] = "off"
    for name, read in readers.items():
        try:
            arguments[name] = read(held[name])
        except Exception:  # a stranger's values fail in any way
            unknown.append(name)
    lora = about["lora"]
    arguments["lora"] = None if lora is None else LoRA(**lora)
    arguments["dtype"] = about["dtype"] if about["dtype"] in ("float32", "bfloat16") else "float32"
    return arguments, unknown


def _of_earlier(about: Record) -> Settings:
    """Return what a checkpoint from before hyper-parameters were kept says of its settings."""
    settings = about.get("settings")
    settings = settings if isinstance(settings, Mapping) else {}
    held = {name.removeprefix("model."): value for name, value in settings.items() if name.startswith("model.")}
    for name in ("optimizer", "scheduler"):
        if isinstance(described := held.get(name), Mapping) and isinstance(described.get("arguments"), Mapping):
            held[name] = _flat(described)
    return {**held, "objective": about.get("objective")}


def _objective(text: Any) -> Objective:
    """Return an objective of this package from its legend; one that names any other class is not made."""
    own = {name for name, cls in known_objectives().items() if cls.__module__.startswith(OURS)}
    for node in ast.walk(ast.parse(text, mode="eval")):
        if isinstance(node, ast.Attribute) or (isinstance(node, ast.Call) and ast.unparse(node.func) not in own):
            raise ValueError(f"{ast.unparse(node)} is not an objective of this package")
    return parse_objective(text)


def _optimizer(described: Record) -> Callable[..., Optimizer]:
    cls = OPTIMIZERS[described["class"]]
    return partial(cls, **_arguments(cls, described))


def _scheduler(described: Mapping[str, Any] | None) -> Callable[..., Any] | None:
    if described is None:
        return None
    if described["class"] not in (f"{OURS}optim.CosineWithWarmup", f"{OURS}training.optim.CosineWithWarmup"):
        raise ValueError(f"{described['class']} is not a schedule of this package")
    return partial(CosineWithWarmup, warmup=float(described["warmup"]), floor=float(described["floor"]))


def _arguments(cls: type, described: Record) -> Settings:
    """Return the arguments that a class takes, of plain values alone."""
    known = inspect.signature(cls).parameters
    values = {name: value for name, value in described.items() if name in known and name != "params"}
    for name, value in values.items():
        if not isinstance(value, bool | int | float | list | str | None):
            raise ValueError(f"{name} is not a plain value")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _generation(described: Record) -> Generation:
    known = {field.name for field in fields(Generation)}
    return Generation(**{name: value for name, value in described.items() if name in known})


def _sparsity(value: Any) -> Any:
    check_sparsity(value)
    return value


def _plain(name: str, value: Any) -> Any:
    wanted = bool if name in SWITCHES else str
    if not isinstance(value, wanted):
        raise ValueError(f"{name} is not a {wanted.__name__}")
    return value
