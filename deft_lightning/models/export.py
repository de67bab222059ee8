"""From a model to a Hugging Face folder that transformers and vLLM serve as it is."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.annotations import CausalLM, Tokenizer
from deft_lightning.atomic import whole_folder
from deft_lightning.errors import UserError
from deft_lightning.models.card import FILE, CardFacts, write_card
from deft_lightning.models.generation import savable
from deft_lightning.models.head import base_causal_lm
from deft_lightning.models.merge import Merge, merge_of, merged, stand_alone


def save_hugging_face(
    model: CausalLM,
    tokenizer: Tokenizer | None,
    stop_token_ids: Sequence[int],
    output: str | Path,
    *,
    merge: Merge | bool = "float32",
    card: CardFacts | None = None,
    name: str | None = None,
) -> Path:
    """Write a Hugging Face folder: weights as safetensors, config, generation config, tokenizer with chat template.

    The folder appears under its name only once it is complete.

    Args:
        model: A causal language model, with or without adapters.
        tokenizer: Saved beside it; None leaves it out.
        stop_token_ids: Where generation ends.
        output: Folder to create.
        merge: How adapters are merged, on a copy: in float32 (True), rounded to the dtype of the base, or not at all
            (False): then only the adapters are written.
        card: What its README.md says; None writes none.
        name: Hub id that the card names.

    Raises:
        UserError: The folder exists and is not empty, or cannot be written; nothing is left of it then.
    """
    target = Path(output)
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists already; choose another --output")
    if (way := merge_of(merge)) != "none" and hasattr(model, "merge_and_unload"):
        model = merged(model, way)
    elif not stand_alone(model):
        raise UserError(
            f"{target}: the initialisation of these adapters changed the base weights "
            "(--model.lora.init_lora_weights), so they do not fit the original base: --merge float32"
        )
    causal = base_causal_lm(model)
    before = causal.config.use_cache, causal.generation_config
    causal.config.use_cache = True
    causal.generation_config, changed = _generation(causal, tokenizer, stop_token_ids)
    try:
        with whole_folder(target) as partial:
            # What is trained whole is saved as that; peft would add an embedding of another size twice more.
            whole = model is not causal and getattr(model.active_peft_config, "modules_to_save", None)
            model.save_pretrained(partial, **({"save_embedding_layers": False} if whole else {}))
            if model is not causal:
                causal.generation_config.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            (partial / FILE).unlink(missing_ok=True)  # peft's own, with places on this machine in it
            if card is not None:
                write_card(partial, card, name)
            partial.chmod(0o755)  # some writers make their files private, a model folder is not
            for path in partial.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
    except UserError:
        raise
    except Exception as error:  # a full disk is an OSError or safetensors' own; configs refuse values with any kind
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{target}: cannot be written: {reason} (--output); what was trained is in the run's checkpoints: export"
            " --ckpt_path last"
        ) from None
    finally:
        causal.config.use_cache, causal.generation_config = before
    if changed:
        rank_zero_info(f"{target}: generation settings of the model that cannot be saved as they are: {changed}")
    return target


def _generation(causal: CausalLM, tokenizer: Tokenizer | None, stop_token_ids: Sequence[int]) -> tuple[Any, str]:
    """Return the generation config to save, and what of the model's own had to change; config.json keeps none."""
    settings = copy.deepcopy(causal.generation_config)
    for name, value in causal.config._get_generation_parameters().items():
        setattr(settings, name, value)
        vars(causal.config).pop(name, None)
    if stop_token_ids:
        settings.eos_token_id = list(stop_token_ids)
    if tokenizer is not None:
        settings.pad_token_id = tokenizer.pad_token_id
    settings, changed = savable(settings)
    return settings, "; ".join(changed)
