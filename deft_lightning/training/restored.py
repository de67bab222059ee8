"""A module made of a checkpoint alone: its model, its tokenizer, its settings."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.annotations import Settings
from deft_lightning.errors import UserError
from deft_lightning.models import BASE, load_checkpoint, model_from_checkpoint
from deft_lightning.models.contents import KEY
from deft_lightning.training.card_facts import facts_of_checkpoint
from deft_lightning.training.hyper_parameters import settings_of

Module = TypeVar("Module")


def restored(cls: type[Module], path: Any, map_location: Any, given: Settings) -> Module:
    """Return a module with the model and the settings of a checkpoint.

    Args:
        cls: Class of the module, which takes the arguments of :class:`deft_lightning.SFTModule`.
        path: A checkpoint file, or a folder of shares.
        map_location: Device of the weights; None is the CPU.
        given: Arguments that win over the checkpoint's; `pretrained` is where the base of its adapters is now.

    Raises:
        UserError: It cannot be read, or its model cannot be built.
    """
    checkpoint = load_checkpoint(path)
    base = given.pop("pretrained", None) if BASE in checkpoint[KEY] else None
    model, tokenizer, _ = model_from_checkpoint(checkpoint, base)
    settings, unknown = settings_of(checkpoint)
    if unknown := [name for name in unknown if name not in given]:
        rank_zero_info(
            f"{path}: says nothing of {', '.join(unknown)} that could be used, so defaults apply (give them to"
            " load_from_checkpoint)"
        )
    if "pretrained" in given or "architecture" in given:
        raise UserError("load_from_checkpoint: the model is the checkpoint's; leave pretrained and architecture out")
    module: Any = cls(**{**settings, **given, "pretrained": model})
    module.own_tokenizer, module.card_facts = tokenizer, facts_of_checkpoint(checkpoint, base)
    if BASE in checkpoint[KEY]:  # its own checkpoints leave out the same
        module.base_weights.files = base or checkpoint[KEY][BASE]["name"]
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    if map_location is not None:
        if not isinstance(map_location, str | torch.device):
            raise UserError("load_from_checkpoint: map_location is a device, such as 'cuda:0'")
        module.to(map_location)
    found: Module = module
    return found
