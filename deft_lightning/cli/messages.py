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

from deft_lightning.cli.parser_errors import Complaint, complaint, plainly, shown
from deft_lightning.cli.verbs import unknown_verb
from deft_lightning.data import known_noise
from deft_lightning.errors import did_you_mean
from deft_lightning.objectives import known_objectives
from deft_lightning.training.optim import CosineWithWarmup


def one_line(message: str, options: Iterable[str] = ()) -> str:
    """Shorten a jsonargparse error.

    Args:
        message: What it would have printed, over many lines.
        options: Option strings that exist, for close matches.
    """
    text = message.strip()
    if found := re.search(r"invalid choice: '(\S+)' \(choose from (.*)\)", text):
        return unknown_verb(found[1])
    if found := re.search(r"[Uu]nrecognized arguments?: (\S+)", text):
        word = found[1].split("=")[0]
        return f"unknown option {word}.{did_you_mean(word, options)}"
    if found := re.search(
        r"[Kk]ey ['\"]([\w.]+)['\"] is not expected|does not accept (?:option|(?:nested )?key) ['\"]([\w.]+)", text
    ):
        word = next(group for group in found.groups() if group)
        return f"unknown option {word} in the configuration.{_close(word, options)}"
    if found := re.match(r"argument (?:-\w/)?(--[\w.+]+): expected (one|at least one) argument", text):
        return f"{found[1]} needs a value"
    if found := re.match(r"(?:Parser key \"config\": )?Unexpected config: (.*)", text, re.DOTALL):
        return f"--config: {shown(found[1])} is neither a file nor options as {{NAME: VALUE}}"
    said = complaint(text)
    if said.key == "subcommand" or "subcommand" in text.splitlines()[0]:
        return text.splitlines()[0].replace('"subcommand"', "the verb")
    place, known = next(
        ((place, known) for place, known in _families().items() if f"{said.key}.".startswith(f"{place}.")), ("", {})
    )
    if known and (missing := re.search(r"[Nn]o module named '([\w.]+)'", text)):
        return f"--{place}: cannot import it, there is no module {missing[1]}. Known: {', '.join(known)}"
    if said.kind == "class":
        return _no_class(said, known)
    if said.kind == "option":
        return _no_option(said, known)
    if said.kind == "missing":
        names = " and ".join(f"--{said.key}.{name}" if said.key else name for name in said.what)
        why = f": {said.owner.rpartition('.')[2]} needs {'it' if len(said.what) == 1 else 'them'}" if said.owner else ""
        return f"{names} {'is' if len(said.what) == 1 else 'are'} missing{why}"
    if said.kind == "type" and said.key == place and "list" in said.what:
        return f"--{place}: {plainly(said)}; add one with --{place}+=NAME"
    reason = plainly(said) if said.kind in ("type", "choice") else _plain(said.what[0])
    if said.kind == "choice":
        reason += f".{did_you_mean(said.value or '', said.what)}"
    return f"--{said.key}: {reason}".rstrip(".") if said.key and f"--{said.key}" not in reason else reason


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
    }


def _classes(module: ModuleType, base: type) -> dict[str, type]:
    found = {name: value for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)}
    return {name: value for name, value in found.items() if value is not base and name[0].isupper()}


def _no_class(said: Complaint, known: Mapping[str, type]) -> str:
    (word,) = said.what
    if not known:
        return f"--{said.key}: there is no class {word}"
    name = word.partition("(")[0]
    return f"--{said.key} {word} is unknown.{did_you_mean(name, known)} Known: {', '.join(known)}"


def _no_option(said: Complaint, known: Mapping[str, type]) -> str:
    """Return who has the option, if not the class that was chosen, or what comes close."""
    (name,) = said.what
    above = said.key.rpartition(".")[0]
    if owners := [other for other, cls in known.items() if name in _parameters(cls)]:
        return f"--{said.key} is an option of {', '.join(owners)}: choose it with --{above} {owners[0]}"
    module, _, chosen = said.owner.rpartition(".")
    own = _parameters(getattr(import_module(module), chosen, None)) if module else []
    names = own or [other for cls in known.values() for other in _parameters(cls)]
    told = f" Known: {', '.join(own)}" if own else ""
    return f"--{said.key} is not an option of {chosen or 'the class chosen'}.{did_you_mean(name, names)}{told}"


def _parameters(cls: type | None) -> list[str]:
    """Return the names of the options of a class."""
    try:
        found = inspect.signature(cls).parameters if cls is not None else {}
    except (ValueError, TypeError):  # classes written in C
        return []
    return [name for name in found if name not in ("self", "params", "optimizer", "args", "kwargs")]


def _close(word: str, options: Iterable[str]) -> str:
    """Return the options close to a key of a configuration, or to the keys that it lies below."""
    options, parts = list(options), word.split(".")
    for length in range(len(parts), 0, -1):
        if close := did_you_mean("--" + ".".join(parts[:length]), options):
            return close
    return ""


def _plain(text: str) -> str:
    """Return a complaint of another kind, in words that are not Python's."""
    text = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", lambda found: f"one of {found[1]}", text)
    return re.sub(r"<class '([\w.]+)'>", lambda found: found[1].rsplit(".", 1)[-1], text)
