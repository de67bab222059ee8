"""Whether the weights of a folder are those of its config: all there, of the right shapes, and numbers."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from deft_lightning.annotations import CausalLM
from deft_lightning.errors import UserError, reason_of
from deft_lightning.models.contents import pickled

SHOWN = 3
# What wrappers put before every name: data parallel, torch.compile, peft, a module that holds the model.
WRAPPERS = re.compile(r"((module|_orig_mod|base_model\.model|base_model|model|transformer)\.)+")
COMPILED = "_orig_mod."


def renaming(missing: Iterable[str], unexpected: Iterable[str]) -> dict[str, str]:
    """Return how the names in a file become those of the model, where a wrapper's prefix is all that differs.

    Args:
        missing: Names the model has and the file has not.
        unexpected: Names the file has and the model has not.

    Returns:
        Patterns and what replaces them, for transformers' ``key_mapping``; empty if that does not explain it.
    """
    wanted, stored = set(missing), {name.replace(COMPILED, "") for name in unexpected}
    if not wanted:
        return {}
    mapping = {re.escape(COMPILED): ""} if any(COMPILED in name for name in unexpected) else {}
    if mapping and wanted <= stored:
        return mapping
    one = min(wanted)
    for name in sorted(stored):
        prefix = name.removesuffix(one)
        if prefix != name and WRAPPERS.fullmatch(prefix) and all(prefix + other in stored for other in wanted):
            return {**mapping, f"^{re.escape(prefix)}": ""}
    return {}


@contextmanager
def without_report() -> Iterator[None]:
    """Keep back transformers' table of missing weights: :func:`check_loaded` says the same in one line."""

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def check_loaded(name: str, model: CausalLM, info: dict[str, Any]) -> None:
    """Refuse a model of which weights are missing, of other shapes, or no numbers; say what was left over.

    Args:
        name: Folder or hub id.
        model: As loaded.
        info: transformers' ``output_loading_info``.

    Raises:
        UserError: Lists some of the weights, and how many there are.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    shapes = sorted((str(key), tuple(theirs), tuple(own)) for key, theirs, own in info["mismatched_keys"])
    if shapes:
        shown = [f"{key} is {theirs} in the file and {own} by config.json" for key, theirs, own in shapes]
        raise UserError(f"{name}: {_some(shown, 'weights have another shape')} (--model.pretrained)")
    if missing:
        hint = ""
        if unexpected:
            adapted = any("lora_" in key for key in unexpected)
            hint = f"; the files have {_some(unexpected, 'others')}" + (
                ": they belong to low-rank adapters that are not merged"
                if adapted
                else ", perhaps the same under other names"
            )
        elif all("head" in key or key.startswith("embed_out") for key in missing):
            hint = "; if it shares the embedding's weight, config.json must say tie_word_embeddings: true"
        raise UserError(f"{name}: {_some(missing, 'weights are missing from its files')}{hint} (--model.pretrained)")
    if unexpected:
        rank_zero_info(f"{name}: {_some(unexpected, 'not used, since the model has no such weights')}")
    _check_numbers(name, model)


def _check_numbers(name: str, model: CausalLM) -> None:
    """Refuse weights that are no numbers: the loss would be none, steps later and without a name."""
    bad, count = [], 0
    for key, value in model.named_parameters():
        if value.is_floating_point() and value.numel():
            count += 1
            # The sum alone is quick, and may overflow where no weight does.
            if not torch.isfinite(value.detach().sum(dtype=torch.float32)) and not torch.isfinite(value).all():
                bad.append(key)
    if bad and len(bad) == count:
        raise UserError(f"{name}: all its weights hold values that are not numbers (--model.pretrained)")
    if bad:
        rank_zero_warn(f"{name}: {_some(bad, 'weights hold values that are not numbers')} (--model.pretrained)")


def damaged(files: Iterable[Path]) -> str:
    """Return which of some weight files cannot be read, and why; empty if all can."""
    from safetensors import safe_open

    for path in files:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    file.keys()
            elif not zipfile.is_zipfile(path):
                # The format before zip files begins with this pickled number.
                with path.open("rb") as stream:
                    if b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" not in stream.read(32):
                        return f"{path.name} is not a file of torch weights, or is truncated"
            else:
                torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # safetensors, zip files and pickles each have their own kinds
            if named := pickled(error):
                return f"{path.name} holds {named}, which is not a weight, and loading it would run code"
            return f"{path.name} is damaged: {reason_of(error)}"
    return ""


def _some(names: list[str], what: str) -> str:
    """Return names in a few words: ``weights are missing (4): a, b, c and 1 more``."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{what} ({len(names)}): {', '.join(names[:SHOWN])}{more}"
