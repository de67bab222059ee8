"""From a checkpoint, or a module as it is, to a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.annotations import CausalLM
from deft_lightning.atomic import check_output
from deft_lightning.errors import UserError
from deft_lightning.models import describe, gathered, is_sharded, model_from_checkpoint, save_hugging_face
from deft_lightning.models.contents import KEY
from deft_lightning.models.hub import check_push, push
from deft_lightning.models.merge import Merge
from deft_lightning.training.card_facts import facts_of_checkpoint, facts_of_run


def export(
    trainer: Any, module: Any, ckpt_path: str | None, output: str | None, merge: Merge | bool, datamodule: Any | None,
    push_to_hub: str | None = None, private: bool = True,
) -> Path:  # fmt: skip
    """Write the folder and return it; arguments as those of :meth:`deft_lightning.Trainer.export`.

    Raises:
        UserError: Neither a checkpoint nor a model, no folder, or one that cannot be written; or it cannot be pushed.
    """
    if output is None:
        raise UserError("export: set --output DIR")
    if trainer.is_global_zero and ckpt_path is not None:
        check_output(output, "export: --output")
    if trainer.is_global_zero and push_to_hub is not None:
        check_push(push_to_hub, private, "--push_to_hub")
    base = getattr(getattr(module, "base_weights", None), "files", None)
    if ckpt_path is not None:
        checkpoint = trainer.read_checkpoint(ckpt_path)
        network, tokenizer, stops = model_from_checkpoint(checkpoint, base)
        facts = facts_of_checkpoint(checkpoint, base)
    elif getattr(module, "model", None) is not None:
        network = whole_model(module, trainer.is_global_zero)
        tokenizer, stops = (datamodule.tokenizer, datamodule.stop_token_ids) if datamodule else (None, [])
        facts = facts_of_run(module)
    else:
        raise UserError("export: set --ckpt_path FILE, or last")
    folder = Path(output)
    if trainer.is_global_zero:
        for config in getattr(network, "peft_config", {}).values():  # a model put together of shares has no name
            config.base_model_name_or_path = config.base_model_name_or_path or base
        folder = save_hugging_face(network, tokenizer, stops, output, merge=merge, card=facts, name=push_to_hub)
        rank_zero_info(f"exported: {folder}")
        if push_to_hub is not None:
            push(folder, push_to_hub, private)
    return folder


def whole_model(module: Any, first: bool) -> CausalLM:
    """Return a module's model with whole weights; of one that is sharded, a copy in the memory of rank 0.

    Args:
        module: Has the model; every rank has to call this.
        first: Whether this is rank 0; other ranks of a sharded model get None.
    """
    if not is_sharded(module.model):
        return module.model
    state = gathered(module.model)
    if not first:
        return None
    about = describe(module.model, None, module.lora, [])
    named = {f"model.{name}": value for name, value in state.items()}
    return model_from_checkpoint({KEY: about, "state_dict": named})[0]
