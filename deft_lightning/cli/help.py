"""The help of a verb on one or two screens: what is ours first, a sentence and the default of each option."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from docstring_parser import parse
from jsonargparse import Namespace

WHOLE = "--help=all"
ORDER = ("", "data", "model", "trainer", "checkpoint", "validation", "after_fit")  # others come behind
SHOWN = (
    "progress_bar",
    "gate_monitor",
    "entropy_monitor",
    "noise_monitor",
    "noise_estimate",
    "dashboard",
    "predictions",
)
WIDTH = 120  # of a line, at most
PLACE = 40  # where the text of an option begins

# Of Lightning's fifty options those that a run of ours wants; its own texts are a paragraph each.
TRAINER = {
    "max_steps": "Optimizer steps; -1 trains for max_epochs",
    "max_epochs": "Epochs; without max_steps the default is 1",
    "accumulate_grad_batches": "Micro-batches per optimizer step",
    "gradient_clip_val": "Clip the norm of the gradient to this",
    "precision": "32-true, bf16-mixed, 16-mixed, bf16-true, 64-true; default bf16-mixed on a GPU that has it",
    "strategy": "auto (one device, or ddp over several), ddp (one process per device), fsdp2 (sharded)",
    "devices": "Devices per node: a number, a list or auto",
    "num_nodes": "Nodes; start them with torchrun or SLURM",
    "val_check_interval": "Micro-batches between validations, or a share of an epoch (0.5)",
    "limit_val_batches": "Validation batches: a number, or a share (0.5)",
    "log_every_n_steps": "Log every this many optimizer steps",
    "default_root_dir": "Each run writes to version_N in this folder",
    "logger": "TensorBoard by default; others by class path, false for none",
}

# Options of every verb, whose texts are Lightning's.
SHARED = {
    "help": f"Show this help; {WHOLE} shows all of it",
    "config": "YAML file of options, or `deft:NAME` for a file of the package; later files win",
    "print_config": "Print all settings and exit",
    "seed_everything": "Seed of random weights, dropout and loader processes",
    "ckpt_path": "Checkpoint: a file, or `last` for the newest of a run",
    "weights_only": "Load only tensors and plain values from a checkpoint",
}


class Line(NamedTuple):
    """An option of a short help.

    Attributes:
        name: As it is typed.
        value: Its default, or what it takes.
        text: What it does.
    """

    name: str
    value: str
    text: str


def short_help(parser: Any, about: str, choices: str) -> str:
    """Return the help of a verb: its options by group, ours first, each with a sentence and its default.

    Args:
        parser: Of the verb.
        about: What the verb does.
        choices: What objectives, noise and sources there are.
    """
    verb = parser.prog.split()[-1]
    width = min(max(shutil.get_terminal_size((WIDTH, 24)).columns, 80), WIDTH)
    found: dict[str, list[Line]] = {}
    for action in parser._actions:
        for line in _lines(action):
            found.setdefault(_group(line.name), []).append(line)
    known = sorted(found, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    parts = [parser.usage and f"usage: {parser.usage}", about, textwrap.fill(choices, width)]
    parts.append(
        f"Options and their defaults. {verb} {WHOLE} shows the full text of each, and all options of Lightning."
    )
    for name in known:
        rows = [text for line in found[name] for text in _wrapped(line, width)]
        parts.append("\n".join([_heading(name, parser), *rows]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _group(option: str) -> str:
    """Return the group that an option is of, `data` of `--data.source`; nothing for those of the verb itself.

    What is shown and logged is one group.
    """
    first, dot, _ = option.removeprefix("--").partition(".")
    return "shown" if first in SHOWN else first if dot else ""


def _heading(name: str, parser: Any) -> str:
    if not name:
        return "General:"
    if name in ("trainer", "shown"):
        return "Lightning's Trainer:" if name == "trainer" else "What a run shows and logs:"
    group = (parser.groups or {}).get(name)
    return f"{(getattr(group, 'title', None) or name).rstrip('.:')}:"


def _lines(action: argparse.Action) -> Iterator[Line]:
    """Yield the option of an action, and the fields of what it makes; nothing for whole groups and their help."""
    names = [name for name in action.option_strings if name.startswith("--") and not name.endswith(("+", ".help"))]
    if not names or action.help == argparse.SUPPRESS or type(action).__name__ in ("_ActionConfigLoad", "_ActionHelp"):
        return
    name, default = names[0], action.default
    group, _, key = name.removeprefix("--").partition(".")
    text = _sentence(action.help or "")
    if group == "trainer":
        if key not in TRAINER:
            return
        text = TRAINER[key]
    text = SHARED.get(group, text) if not key else text
    yield Line(name, _value(default), text + _other_choices(action.metavar, default, text))
    if isinstance(default, dict) and isinstance(default.get("init_args"), dict):
        made = default["class_path"].rpartition(".")[2]
        yield from (Line(f"{name}.{key}", _value(value), f"Of {made}") for key, value in default["init_args"].items())
    for kind in get_args(getattr(action, "_typehint", None)):
        if dataclasses.is_dataclass(kind) and default is None:
            texts = {one.arg_name: one.description or "" for one in parse(kind.__doc__ or "").params}
            for field in dataclasses.fields(kind):
                yield Line(f"{name}.{field.name}", _value(field.default), _sentence(texts.get(field.name, "")))


def _sentence(text: str) -> str:
    """Return the first sentence of a help, on one line, without its full stop."""
    text = " ".join(text.replace("``", "`").split())
    return re.split(r"\.(?:\s+(?=[A-Z`-])|$)", text, maxsplit=1)[0]


def _value(default: Any) -> str:
    """Return a default as it is typed; nothing where there is none."""
    if isinstance(default, (dict, Namespace)):
        return str(default.get("class_path", "")).rpartition(".")[2]
    if isinstance(default, bool):
        return str(default).lower()
    if default is None or default in ([], (), argparse.SUPPRESS, dataclasses.MISSING):
        return ""
    if isinstance(default, (list, tuple)):
        return f"[{', '.join(map(str, default))}]"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _other_choices(metavar: Any, default: Any, text: str) -> str:
    """Return the words that an option takes beside its default, unless its text names them."""
    if not isinstance(metavar, str) or not metavar.startswith("{") or isinstance(default, bool):
        return ""
    others = [word for word in metavar.strip("{}").split(",") if word not in (str(default), "null", "true", "false")]
    named = all(re.search(rf"\b{word}\b", text) for word in others)
    return "" if named else f" (or {', '.join(others)})"


def _wrapped(line: Line, width: int) -> list[str]:
    """Return an option on one line, or on two where its text is long; what does not fit is left to the whole help."""
    left = f"  {line.name} {line.value}".rstrip()
    room = width - PLACE
    text = textwrap.shorten(line.text, 2 * room - 8, placeholder=" ...")
    rows = textwrap.wrap(text, room) or [""]
    if len(left) >= PLACE:
        return [left, *(" " * PLACE + row for row in rows)]
    return [f"{left:<{PLACE}}{rows[0]}".rstrip(), *(" " * PLACE + row for row in rows[1:])]
