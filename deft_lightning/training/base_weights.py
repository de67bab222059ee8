"""What a run's checkpoints leave out: the frozen weights beside adapters, which the base's files have."""

from __future__ import annotations

from pathlib import Path

import torch

from deft_lightning.annotations import CausalLM, Settings, State
from deft_lightning.models import adapter_folder, base_causal_lm
from deft_lightning.models.base import BASE, OWNER, check_base, completed, describe_base, left_out
from deft_lightning.training.model_source import ModelSource


class BaseWeights:
    """Knows where the weights beside a run's adapters come from, and whether they are those of a checkpoint.

    Args:
        source: Of the run's model.

    Attributes:
        files: Folder, as it is found from everywhere, or hub id of the base; None where a checkpoint needs all weights:
            random ones, and those of a model that was given.
    """

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self.files = _files(source)

    def leave_out(self, model: CausalLM, state: State, about: Settings) -> State:
        """Return the weights of a checkpoint without those of the base; of a sharded model every rank has to call it.

        Args:
            model: As it is trained.
            state: All weights of the module.
            about: What the checkpoints of the run say of themselves; gets an entry of the base, once.
        """
        lora = self._source.lora
        # What was rounded to float16 is not found in files again.
        if lora is None or lora.changes_base or self.files is None or model.dtype == torch.float16:
            return state
        names = left_out(model)
        if BASE not in about:
            about[BASE] = describe_base(model, self.files, names)
        base = {f"{OWNER}{name}" for name in names}
        return {name: value for name, value in state.items() if name not in base}

    def put_back(self, model: CausalLM, state: State, about: Settings) -> State:
        """Return the weights of a checkpoint with those of the base as the model has them.

        Raises:
            UserError: The model has another base than the checkpoint's.
        """
        self.check(model, state, about)
        return completed(model, about, state)

    def check(self, model: CausalLM, held: State, about: Settings) -> None:
        """Refuse another base than a checkpoint's; of a sharded model every rank has to call it.

        Raises:
            UserError: The weights differ.
        """
        given, name = self._source.given, self._source.pretrained
        check_base(
            model, about, held, "the model that was given" if given else str(name or "a model of random weights")
        )


def _files(source: ModelSource) -> str | None:
    if source.pretrained is None or (source.given and source.quantization is None):
        return None
    adapters = adapter_folder(source.pretrained)
    name = str(source.pretrained if adapters is None else adapters.base)
    if source.given:  # weights that are quantised come from files
        name = str(base_causal_lm(source.pretrained).config._name_or_path)
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name
