"""Parser errors in one line: which option, what is wrong, what comes close."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from types import ModuleType

import torch
from lightning.pytorch import Callback, callbacks, loggers
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from deft_lightning.cli.parser_errors import Complaint, complaint, plainly, shown
from deft_lightning.cli.verbs import unknown_verb
from deft_lightning.data import known_noise
from deft_lightning.errors import did_you_mean
from deft_lightning.objectives import known_objectives
from deft_lightning.training.fsdp2 import FSDP2Strategy
from deft_lightning.training.optim import CosineWithWarmup


def one_line(message: str, options: Iterable[str] = ()) -> str:
    """Shorten a jsonargparse error.

    Args:
        message: What it would have printed, over many lines.
        options: Option strings that exist, for close matches.
    """
    text = message.strip()
    if match := re.search(r"invalid choice: '(\S+)' \(choose from (.*)\)", text):
        return unknown_verb(match[1])
    if match := re.search(r"[Uu]nrecognized arguments?: (\S+)", text):
        word = match[1].split("=")[0]
        return f"unknown option {word}.{did_you_mean(word, options)}"
    if match := re.search(
        r"[Kk]ey ['\"]([\w.]+)['\"] is not expected|does not accept (?:option|(?:nested )?key) ['\"]([\w.]+)", text
    ):
        word = next(group for group in match.groups() if group)
        return f"unknown option {word} in the configuration.{_close(word, options)}"
    if match := re.match(r"argument (?:-\w/)?(--[\w.+]+): expected (one|at least one) argument", text):
        return f"{match[1]} needs a value"
    if match := re.match(r"(?:Parser key \"config\": )?Unexpected config: (.*)", text, re.DOTALL):
        return f"--config: {shown(match[1])} is neither a file nor options as {{NAME: VALUE}}"
    problem = complaint(text)
    if problem.key == "subcommand" or "subcommand" in text.splitlines()[0]:
        return text.splitlines()[0].replace('"subcommand"', "the verb")
    place, known = next(
        ((place, known) for place, known in _families().items() if f"{problem.key}.".startswith(f"{place}.")), ("", {})
    )
    if known and (missing := re.search(r"[Nn]o module named '([\w.]+)'", text)):
        return f"--{place}: cannot import it, there is no module {missing[1]}. Known: {', '.join(known)}"
    if problem.kind == "class":
        return _no_class(problem, known)
    if problem.kind == "option":
        return _no_option(problem, known)
    if problem.kind == "missing":
        names = " and ".join(f"--{problem.key}.{name}" if problem.key else name for name in problem.what)
        are, them = ("is", "it") if len(problem.what) == 1 else ("are", "them")
        why = f": {problem.owner.rpartition('.')[2]} needs {them}" if problem.owner else ""
        return f"{names} {are} missing{why}"
    if problem.kind == "type" and problem.key == place and "list" in problem.what:
        return f"--{place}: {plainly(problem)}; add one with --{place}+=NAME"
    reason = plainly(problem) if problem.kind in ("type", "choice") else _plain(problem.what[0])
    if problem.kind == "choice":
        reason += f".{did_you_mean(problem.value or '', problem.what)}"
    return f"--{problem.key}: {reason}".rstrip(".") if problem.key and f"--{problem.key}" not in reason else reason


def _families() -> dict[str, Mapping[str, type]]:
    """Return the classes that an option knows by name."""
    return {
        "model.objective": known_objectives(),
        "data.noise.ops": known_noise(),
        "objectives": known_objectives(),
        "remedies": known_objectives(),
        "model.optimizer": _classes(torch.optim, torch.optim.Optimizer),
        "model.scheduler": {
            "CosineWithWarmup": CosineWithWarmup,
            **_classes(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler),
        },
        "trainer.callbacks": _classes(callbacks, Callback),
        "trainer.logger": _classes(loggers, Logger),
        "trainer.strategy": {"ddp": DDPStrategy, "fsdp2": FSDP2Strategy},
    }


def _classes(module: ModuleType, base: type) -> dict[str, type]:
    classes = {name: value for name, value in vars(module).items() if inspect.isclass(value)}
    return {
        name: cls for name, cls in classes.items() if issubclass(cls, base) and cls is not base and name[0].isupper()
    }


def _no_class(problem: Complaint, known: Mapping[str, type]) -> str:
    (word,) = problem.what
    if problem.key == "trainer.strategy" and (word == "auto" or word in StrategyRegistry):
        return f"--{problem.key} {word} has no options of its own: choose {' or '.join(known)}"
    if not known:
        return f"--{problem.key}: there is no class {word}"
    name = word.partition("(")[0]
    return f"--{problem.key} {word} is unknown.{did_you_mean(name, known)} Known: {', '.join(known)}"


def _no_option(problem: Complaint, known: Mapping[str, type]) -> str:
    """Return who has the option, if not the class that was chosen, or what comes close."""
    (name,) = problem.what
    above = problem.key.rpartition(".")[0]
    if owners := [other for other, cls in known.items() if name in _parameters(cls)]:
        return f"--{problem.key} is an option of {', '.join(owners)}: choose it with --{above} {owners[0]}"
    module, _, owner = problem.owner.rpartition(".")
    own = _parameters(getattr(import_module(module), owner, None)) if module else []
    names = own or [other for cls in known.values() for other in _parameters(cls)]
    others = f" Known: {', '.join(own)}" if own else ""
    return f"--{problem.key} is not an option of {owner or 'the class chosen'}.{did_you_mean(name, names)}{others}"


def _parameters(cls: type | None) -> list[str]:
    """Return the names of the options of a class."""
    try:
        parameters = inspect.signature(cls).parameters if cls is not None else {}
    except (ValueError, TypeError):  # classes written in C
        return []
    return [name for name in parameters if name not in ("self", "params", "optimizer", "args", "kwargs")]


def _close(word: str, options: Iterable[str]) -> str:
    """Return the options close to a key of a configuration, or to the keys that it lies below."""
    options, parts = list(options), word.split(".")
    for length in range(len(parts), 0, -1):
        if close := did_you_mean("--" + ".".join(parts[:length]), options):
            return close
    return ""


def _plain(text: str) -> str:
    """Return a complaint of another kind, in words that are not Python's."""
    text = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", lambda match: f"one of {match[1]}", text)
    return re.sub(r"<class '([\w.]+)'>", lambda match: match[1].rsplit(".", 1)[-1], text)
