"""Parser errors in one line: which option, what is wrong, what comes close."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from types import ModuleType

import torch

from deft_lightning.data import known_noise
from deft_lightning.errors import did_you_mean
from deft_lightning.objectives import known_objectives
from deft_lightning.optim import CosineWithWarmup


def one_line(message: str, options: Iterable[str] = ()) -> str:
    """Shorten a jsonargparse error.

    Args:
        message: What it would have printed, over many lines.
        options: Option strings that exist, for close matches.
    """
    text = message.strip()
    if found := re.search(r"invalid choice: '(\S+)' \(choose from (.*)\)", text):
        verbs = [*re.findall(r"\w+", found[2]), "figures"]
        return f"unknown verb {found[1]}.{did_you_mean(found[1], verbs)} Known: {', '.join(verbs)}"
    if found := re.search(r"[Uu]nrecognized arguments?: (\S+)", text):
        word = found[1].split("=")[0]
        return f"unknown option {word}.{did_you_mean(word, options)}"
    if found := re.search(
        r"[Kk]ey ['\"]([\w.]+)['\"] is not expected|does not accept (?:option|(?:nested )?key) ['\"]([\w.]+)", text
    ):
        word = next(group for group in found.groups() if group)
        return f"unknown option {word} in the configuration.{did_you_mean(f'--{word}', options)}"
    key = found[1] if (found := re.search(r"Parser key ['\"]([\w.]+)['\"]:?", text)) else ""
    if key == "subcommand" or "subcommand" in text.splitlines()[0]:
        return text.splitlines()[0].replace('"subcommand"', "the verb")
    families: dict[str, Mapping[str, type]] = {
        "model.objective": known_objectives(),
        "data.noise.ops": known_noise(),
        "objectives": known_objectives(),
        "remedies": known_objectives(),
        "model.optimizer": _classes(torch.optim),
        "model.scheduler": {"CosineWithWarmup": CosineWithWarmup, **_classes(torch.optim.lr_scheduler)},
    }
    for place, known in families.items():
        if not key.startswith(place):
            continue
        if missing := re.search(r"[Nn]o module named '([\w.]+)'", text):
            return f"--{place}: cannot import it, there is no module {missing[1]}. Known: {', '.join(known)}"
        if (word := _class_name(text)) and word not in known:
            return f"--{place} {word} is unknown.{did_you_mean(word, known)} Known: {', '.join(known)}"
        if found := re.search(r"Option '(\w+)' is not accepted", text):
            owners = [name for name, cls in known.items() if found[1] in inspect.signature(cls).parameters]
            if owners:
                return f"--{place}.{found[1]} is an option of {', '.join(owners)}: choose it with --{place} {owners[0]}"
            names = [name for cls in known.values() for name in inspect.signature(cls).parameters]
            return f"--{place}.{found[1]} is not an option of the class chosen.{did_you_mean(found[1], names)}"
    reason = _reason(text)
    return f"--{key}: {reason}" if key and f"--{key}" not in reason else reason


def _classes(module: ModuleType) -> dict[str, type]:
    return {name: value for name, value in vars(module).items() if inspect.isclass(value) and name[0].isupper()}


def _class_name(text: str) -> str:
    patterns = (
        r"Expected a dot import path string: (\S+)",
        r"[Uu]nexpected import path(?: string)?: (\S+)",
    )
    found = next((hit for pattern in patterns if (hit := re.search(pattern, text))), None)
    return found[1].strip("'\".,") if found else ""


def _reason(text: str) -> str:
    """The innermost complaints of a nested error, in plain words."""
    text = re.sub(r"Parser key ['\"][\w.]+['\"]:?", "", text)
    lines = [re.sub(r"^\s*-?\s+", "", f" {line}").strip() for line in text.splitlines() if line.strip(" -")]
    outer = (
        "Does not validate",
        "Subtypes:",
        "Errors:",
        "Given value",
        "Problem with",
        "Expected a <class 'NoneType'>",
    )
    inner = "; ".join(dict.fromkeys([line for line in lines if not line.startswith(outer)] or lines))
    inner = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", lambda found: f"one of {found[1]}", inner)
    inner = re.sub(r"<class '([\w.]+)'>", lambda found: found[1].rsplit(".", 1)[-1], inner)
    return re.sub(r"Expected an? (one of|int)", lambda found: f"expected {found[1]}", inner)
