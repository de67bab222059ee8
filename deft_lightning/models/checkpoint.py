"""Checkpoints of this package: what they hold beside the weights, how they are read, and a model made of one."""

from __future__ import annotations

import json
import pickle
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deft_lightning.errors import UserError
from deft_lightning.hashing import key
from deft_lightning.models.build import ready
from deft_lightning.models.head import base_causal_lm
from deft_lightning.models.lora import LoRA, add_adapters

KEY = "deft_lightning"
SHARDED = "meta.pt"  # in a folder of shares, what is neither weights nor optimizer; the name is Lightning's


def vocabulary_digest(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's tokens and their ids."""
    items = sorted(tokenizer.get_vocab().items())
    return f"{key(*(part for item in items for part in item)):032x}"


def check_state(model: Any, state: dict[str, Any]) -> None:
    """Refuse weights of another architecture.

    Raises:
        UserError: A weight is missing, too many, or of another shape; the message names one.
    """
    own = {f"model.{name}": tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in state.items() if name.startswith("model.")}
    wrong = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
    if wrong:
        raise UserError(
            f"--ckpt_path: the checkpoint is of another model, for example {wrong[0]} has shape"
            f" {theirs.get(wrong[0])} in it and {own.get(wrong[0])} here (--model.architecture, --model.pretrained,"
            " --model.lora)"
        )


def describe(model: Any, tokenizer: Any | None, lora: LoRA | None, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """Return what a checkpoint must hold, in plain values, to be exported without its configuration or data."""
    files: dict[str, str] = {}
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for path in Path(folder).rglob("*"):
                if path.is_file():
                    files[str(path.relative_to(folder))] = path.read_text(encoding="utf-8")
    causal = base_causal_lm(model)
    return {
        "config": causal.config.to_json_string(use_diff=False),
        "generation_config": causal.generation_config.to_json_string(use_diff=False),
        "dtype": str(causal.dtype).removeprefix("torch."),
        "lora": None if lora is None else lora.settings(),
        "tokenizer": files,
        "vocabulary": None if tokenizer is None else vocabulary_digest(tokenizer),
        "stop_token_ids": list(stop_token_ids),
    }


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this package: a file, or a folder of the shares of many ranks.

    Of a folder everything but the optimizer's state is read, in this process alone.

    Raises:
        UserError: It does not exist, is incomplete, or was written by something else.
    """
    source = Path(path)
    if not source.exists():
        raise UserError(f"{path}: no such checkpoint (--ckpt_path)")
    if not is_complete(source):
        raise UserError(f"{path}: is not a complete checkpoint (--ckpt_path)")
    try:
        checkpoint = torch.load(
            source / SHARDED if source.is_dir() else source, map_location="cpu", weights_only=True, mmap=True
        )
        if source.is_dir() and isinstance(checkpoint, dict):
            checkpoint = {**checkpoint, "state_dict": _shared_out(source)}
    except (RuntimeError, pickle.UnpicklingError):  # another archive, or objects of another program
        checkpoint = None
    if not isinstance(checkpoint, dict) or KEY not in checkpoint or "state_dict" not in checkpoint:
        raise UserError(f"{path}: is not a checkpoint of SFTModule (--ckpt_path)")
    return dict(checkpoint)


def is_complete(path: Path) -> bool:
    """Whether a path is a checkpoint that was written to its end: a file, or a folder of shares."""
    if path.is_dir():
        return (path / ".metadata").is_file() and (path / SHARDED).is_file()
    return path.is_file() and zipfile.is_zipfile(path)


def _shared_out(folder: Path) -> dict[str, Any]:
    """Read the weights that many ranks have written, without a process group."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner(keys={"state_dict"})
    _load_state_dict(state, storage_reader=FileSystemReader(folder), planner=planner, no_dist=True)
    return dict(state["state_dict"])


def model_from_checkpoint(checkpoint: dict[str, Any]) -> tuple[Any, Any | None, list[int]]:
    """Rebuild model, tokenizer and stop tokens from a checkpoint alone."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    about = checkpoint[KEY]
    settings = json.loads(about["config"])
    config = AutoConfig.for_model(settings["model_type"]).from_dict(settings)
    model = ready(
        AutoModelForCausalLM.from_config(config, dtype=getattr(torch, about["dtype"]), trust_remote_code=False)
    )
    model.generation_config = GenerationConfig.from_dict(json.loads(about["generation_config"]))
    if about["lora"] is not None:
        model = add_adapters(model, LoRA(**about["lora"]))
    state = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items() if k.startswith("model.")}
    model.load_state_dict(state)
    return model, tokenizer_from_checkpoint(checkpoint), list(about["stop_token_ids"])


def tokenizer_from_checkpoint(checkpoint: dict[str, Any]) -> Any | None:
    """Return the tokenizer a checkpoint was trained with, or None if it had none."""
    from transformers import AutoTokenizer

    files = checkpoint[KEY]["tokenizer"]
    if not files:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
