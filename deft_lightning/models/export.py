"""From a model to a Hugging Face folder that transformers and vLLM serve as it is."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deft_lightning.errors import UserError
from deft_lightning.models.head import base_causal_lm
from deft_lightning.models.lora import untie_adapted_head


def save_hugging_face(
    model: Any, tokenizer: Any | None, stop_token_ids: Sequence[int], output: str | Path, *, merge: bool = True
) -> Path:
    """Write a Hugging Face folder: weights as safetensors, config, generation config, tokenizer with chat template.

    The folder appears under its name only once it is complete.

    Args:
        model: A causal language model, with or without adapters.
        tokenizer: Saved beside it; None leaves it out.
        stop_token_ids: Where generation ends.
        output: Folder to create.
        merge: Merge adapters into the weights; otherwise only the adapters are written. The merge is done on a copy.

    Raises:
        UserError: The folder exists and is not empty.
    """
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists already; choose another --output")
    if hasattr(model, "merge_and_unload") and merge:
        model = copy.deepcopy(model)
        untie_adapted_head(model)
        model = model.merge_and_unload()
    causal = base_causal_lm(model)
    training_cache = causal.config.use_cache
    causal.config.use_cache = True
    if stop_token_ids:
        causal.generation_config.eos_token_id = list(stop_token_ids)
    if tokenizer is not None:
        causal.generation_config.pad_token_id = tokenizer.pad_token_id
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.save_pretrained(partial)
        if model is not causal:
            causal.generation_config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        partial.chmod(0o755)  # temporary folders and files are private, a model folder is not
        for path in partial.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        causal.config.use_cache = training_cache
        shutil.rmtree(partial, ignore_errors=True)
    return target
