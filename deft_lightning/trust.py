"""What the files of a stranger's model or tokenizer may do: name code, kernels and other files. Read before any load.

transformers runs code that a folder names (``auto_map``) where it may, and asks on standard input where nobody has
told it. Nobody is asked here: code is refused unless ``--model.trust_remote_code true`` admits it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from deft_lightning.annotations import Record, Settings
from deft_lightning.errors import UserError, did_you_mean
from deft_lightning.shipped_models import model_path

REMEDY = "--model.trust_remote_code true"
LARGEST = 64 << 20  # bytes of a config; those of real models have some kB
# Where transformers looks for weights, in its order.
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
OPTIONS = {"config.json": "--model.pretrained", "tokenizer_config.json": "--data.tokenizer, or --model.pretrained"}


def read_settings(name: str, file: str) -> Settings:
    """Return a JSON file of a folder, or of a hub id from the hub's cache or the hub; empty if it is not there.

    Raises:
        UserError: It is not JSON, not an object, or too large.
    """
    path, option = find_file(name, file), OPTIONS.get(file, "--model.pretrained")
    if path is None:
        return {}
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{name}: {file} has {path.stat().st_size >> 20} MiB, which no config needs")
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"{name}: {file} cannot be read: {reason} ({option})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{name}: {file} is not a JSON object ({option})")
    return settings


def find_file(name: str, file: str) -> Path | None:
    """Return a file of a folder, or of a hub id from the hub's cache or the hub; None if it is not there."""
    folder = model_path(name)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    from transformers.utils import cached_file

    try:
        cached = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # unknown, gated, offline: the load that follows says so in its own words
        return None
    return None if cached is None else Path(cached)


def check_model(name: str, trust: bool, attention: str | None = None) -> Settings:
    """Refuse a model that would run or fetch code, or read files elsewhere; return its config.

    Args:
        name: Folder or hub id.
        trust: Code of its own may run.
        attention: What was asked for in place of the attention that the config names.

    Raises:
        UserError: What it wants, and the option that admits it.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    settings = read_settings(name, "config.json")
    code = _code(settings.get("auto_map"), ("AutoConfig", "AutoModelForCausalLM"))
    kind = settings.get("model_type")
    known = isinstance(kind, str) and kind in CONFIG_MAPPING_NAMES and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if code and not known and not trust:
        _refuse(name, f"model type {kind!r} is code of its own", code, "--model.pretrained")
    check_code(settings, f"{name}: config.json: ", trust, attention)
    if find_file(name, "adapter_config.json") is not None:
        base = read_settings(name, "adapter_config.json").get("base_model_name_or_path")
        raise UserError(
            f"{name}: holds low-rank adapters (adapter_config.json, of {base!r}); they would be applied to "
            "the model silently: merge them into a model first, or name the model without them (--model.pretrained)"
        )
    _check_index(name, settings.get("transformers_weights"))
    return settings


def check_code(settings: Record, where: str, trust: bool = False, attention: str | None = None) -> None:
    """Refuse kernels that a config names, which are code; code of its parts is not asked about either.

    Args:
        settings: The config as plain values.
        where: What it is of, for the error.
        trust: Code may run.
        attention: What was asked for in place of the attention that the config names.

    Raises:
        UserError: What it wants, and the option that admits it.
    """
    ask_nobody()
    # What was asked for wins over the one, the other over what was asked for.
    for key in ("attn_implementation", "_attn_implementation")[attention is not None :]:
        for value in _values(settings, key):
            check_attention(value, trust, f"{where}{key}")


def ask_nobody() -> None:
    """Let transformers refuse where it would ask on standard input whether code may run.

    It asks for the parts of a model, to which it does not hand down that their code may not run.
    """
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


def check_tokenizer(name: str, trust: bool) -> None:
    """Refuse a tokenizer that is code of its own, which ``auto_map`` of tokenizer_config.json names.

    A tokenizer whose class transformers knows is loaded without that code.

    Raises:
        UserError: Names the code and the option that admits it.
    """
    ask_nobody()
    if trust:
        return
    settings = read_settings(name, "tokenizer_config.json")
    auto_map = settings.get("auto_map")
    code = _code(auto_map if isinstance(auto_map, Mapping) else {"AutoTokenizer": auto_map}, ("AutoTokenizer",))
    if code and not _tokenizer_known(settings.get("tokenizer_class")):
        _refuse(name, "its tokenizer is code of its own", code, "--data.tokenizer, or --model.pretrained")


def check_attention(value: object, trust: bool, where: str) -> None:
    """Refuse an attention that transformers does not have; a kernel of the hub is code, which has to be admitted.

    Args:
        value: Name, or a name for each part of a model; None is transformers' choice.
        trust: Kernels of the hub may be fetched and run.
        where: What named it.
    """
    if value is None:
        return
    if isinstance(value, Mapping):
        for part in value.values():
            check_attention(part, trust, where)
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ["eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key)]
    if value in known:
        return
    if isinstance(value, str) and "/" in value:
        if trust:
            return
        raise UserError(
            f"{where} {value} is a kernel from the hub, code that is not run: choose another "
            f"(--model.attention sdpa; remove a key that begins with _ from the file), or allow it with {REMEDY}"
        )
    hint = did_you_mean(str(value), known)
    raise UserError(f"{where} {value!r} is unknown.{hint} Known: {', '.join(sorted(known))} (--model.attention)")


def inside(name: str) -> bool:
    """Return whether the name of a file stays in its folder: relative, without steps upwards, on any system."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return not (posix.is_absolute() or windows.anchor or ".." in (*posix.parts, *windows.parts) or "\0" in name)


def weight_files(name: str, named: object = None) -> list[Path]:
    """Return the files in a folder that hold the weights to be loaded; none of a hub id.

    Args:
        name: Folder or hub id.
        named: File or index that the config names in place of the usual ones.
    """
    folder = model_path(name)
    names = [named] if isinstance(named, str) else list(WEIGHTS)
    first = next((file for file in names if inside(file) and (folder / file).is_file()), None)
    if first is None:
        return []
    if not first.endswith(".index.json"):
        return [folder / first]
    return [folder / part for part in sorted(set(read_settings(name, first)["weight_map"].values()))]


def _check_index(name: str, named: object) -> None:
    folder = model_path(name)
    if not folder.is_dir():
        return  # the hub's own names are held to their repository by its client
    if named is not None and not (isinstance(named, str) and inside(named)):
        raise UserError(
            f"{name}: config.json names {named!r} as its weights, a file outside the folder (--model.pretrained)"
        )
    names = [named] if named else list(WEIGHTS)
    file = next((file for file in names if (folder / file).is_file()), "")
    if not file.endswith(".index.json"):
        return
    parts = read_settings(name, file).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise UserError(f"{name}: {file} has no weight_map from weights to files (--model.pretrained)")
    for part in sorted(set(parts.values())):
        if not inside(part):
            raise UserError(f"{name}: {file} names {part!r}, a file outside the folder (--model.pretrained)")
        if not (folder / part).is_file():
            raise UserError(f"{name}: {file} names {part!r}, which is not there (--model.pretrained)")


def _code(auto_map: object, wanted: tuple[str, ...]) -> list[str]:
    """Return the classes that an ``auto_map`` names for what is to be loaded."""
    if not isinstance(auto_map, Mapping):
        return []
    classes: list[str] = []
    for key in wanted:
        value = auto_map.get(key)
        classes += [part for part in (value if isinstance(value, list | tuple) else [value]) if isinstance(part, str)]
    return classes


def _refuse(name: str, what: str, code: list[str], option: str) -> None:
    files = sorted({_file(reference) for reference in code})
    raise UserError(f"{name}: {what} ({', '.join(files)}), which is not run; to run it: {REMEDY} ({option})")


def _file(reference: str) -> str:
    """Return the file of a class: ``own.py`` of ``own.Net``, that of another hub id of ``org/name--own.Net``."""
    elsewhere, _, rest = reference.rpartition("--")
    return f"{elsewhere + ': ' if elsewhere else ''}{rest.rpartition('.')[0] or rest}.py"


def _tokenizer_known(name: object) -> bool:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if not isinstance(name, str):
        return False
    return any(tokenizer_class_from_name(way) is not None for way in (name.removesuffix("Fast"), name))


def _values(settings: Any, name: str) -> Iterator[Any]:
    """Return the values of a key at any depth of a config."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            if key == name:
                yield value
            yield from _values(value, name)
    elif isinstance(settings, list):
        for value in settings:
            yield from _values(value, name)
