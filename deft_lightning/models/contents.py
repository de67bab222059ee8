"""What a checkpoint of this package must hold, checked before any of it is used."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, get_args

import torch
from torch import Tensor

from deft_lightning.models.lora import LoRA
from deft_lightning.models.quantized import Quantization

KEY = "deft_lightning"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
STORED = re.compile(r"unquantised|\w{3,8} from \w{4,16} on \w{2,16}")  # fingerprints of a quantised base
MOST = 128  # numbers that a run keeps for its objective
Test = Callable[[Any], bool]  # of one entry
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. +-]*")  # no step upwards, drive, backslash or control


def is_inside(name: object) -> bool:
    """Return whether a name is that of a file in a folder or below it, on every system."""
    parts = name.split("/") if isinstance(name, str) and len(name) <= 200 else []
    return 0 < len(parts) <= 3 and all(map(PART.fullmatch, parts))


def pickled(error: BaseException) -> str:
    """Return the name of the object that ``weights_only`` has refused to make, nothing if an error is another one."""
    match = re.search(r"GLOBAL ([\w.]+)", str(error))
    return match[1] if match else ""


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: object) -> bool:
    return isinstance(value, str)


def _maybe(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _numbers(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(n, int | float) and math.isfinite(n) for n in value)


def _settings(value: object) -> bool:
    """Return a config as JSON text."""
    if not isinstance(value, str):
        return False
    try:
        return isinstance(json.loads(value), dict)
    except (ValueError, RecursionError):
        return False


def _model(value: object) -> bool:
    return isinstance(value, str) and _settings(value) and isinstance(json.loads(value).get("model_type"), str)


def _lora(value: object) -> bool:
    known = {field.name for field in fields(LoRA)}
    return isinstance(value, dict) and value.keys() <= known


def _files(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _base(value: object) -> bool:
    if not isinstance(value, dict) or not (_text(value.get("name")) and _files(value.get("weights"))):
        return False
    return all(name in DTYPES or STORED.fullmatch(name) for name in value["weights"])


def _quantization(value: object) -> bool:
    """Return how a base was quantised: a kind, and the dtype of products with it."""
    if not isinstance(value, dict) or not {"kind"} <= value.keys() <= {"kind", "compute_dtype"}:
        return False
    return value["kind"] in get_args(Quantization) and value.get("compute_dtype") in (
        None,
        "float32",
        "bfloat16",
        "float16",
    )


def _facts(value: object) -> bool:
    """Return what a card says: texts, numbers, and lists of them by name; looked at again where it is written."""
    return isinstance(value, dict) and all(isinstance(part, dict | list | str) for part in value.values())


def _tensors(value: object) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def _listed(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


# What export and every resume read; whether it has to be there.
OWN: dict[str, tuple[Test, bool]] = {
    "config": (_model, True),
    "generation_config": (_settings, True),
    "dtype": (lambda value: _text(value) and value in DTYPES, True),
    "lora": (_maybe(_lora), True),
    "base": (_base, False),
    "quantization": (_quantization, False),
    "tokenizer": (_files, True),
    "vocabulary": (_maybe(_text), False),
    "stop_token_ids": (lambda value: isinstance(value, list) and all(map(_whole, value)), True),
    "objective": (_text, False),
    "tokens_seen": (_whole, False),
    "training": (lambda value: _numbers(value) and len(value) <= 8, False),
    "rates": (lambda value: _numbers(value) and len(value) <= MOST, False),
    "start_model": (_text, False),  # of checkpoints before 0.2
    "unprompted_alone": (lambda value: isinstance(value, bool), False),
    "marginal": (_numbers, False),
    "began_from": (_text, False),
    "card": (_maybe(_facts), False),
    "gates": (lambda value: _numbers(value) and 2 <= len(value) <= MOST, False),
}
# What Lightning reads.
LIGHTNING: dict[str, Test] = {
    "epoch": _whole,
    "global_step": _whole,
    "pytorch-lightning_version": lambda value: _text(value) and re.fullmatch(r"\d+(\.\w+)*", value) is not None,
    "optimizer_states": _listed,
    "lr_schedulers": _listed,
    "loops": lambda value: isinstance(value, dict),
    "callbacks": lambda value: isinstance(value, dict),
}


def problem(checkpoint: object) -> str:
    """Return what is wrong with a checkpoint, nothing if it can be used.

    Args:
        checkpoint: What was read from a file, plain values and tensors.
    """
    if not isinstance(checkpoint, dict) or KEY not in checkpoint or "state_dict" not in checkpoint:
        return "is not a checkpoint of SFTModule"
    about = checkpoint[KEY]
    if not isinstance(about, dict):
        return f"is malformed: {KEY!r} is not an object"
    for name, (test, needed) in OWN.items():
        if (needed and name not in about) or (name in about and not test(about[name])):
            return f"is malformed: '{KEY}.{name}' is {'missing' if name not in about else 'not what it should be'}"
    for name in about["tokenizer"]:
        if not is_inside(name):
            return f"is refused: it names a file of its tokenizer {str(name)[:200]!r}, which points outside its folder"
    if not _tensors(checkpoint["state_dict"]):
        return "is malformed: 'state_dict' is not an object of tensors"
    for name, test in LIGHTNING.items():
        if name in checkpoint and not test(checkpoint[name]):
            return f"is malformed: {name!r} is not what it should be"
    return ""
