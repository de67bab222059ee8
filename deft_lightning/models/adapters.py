"""Going on with adapters that were exported: a folder of peft that names its base and holds their weights."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from deft_lightning.annotations import CausalLM
from deft_lightning.errors import UserError, reason_of
from deft_lightning.models.lora import LoRA, plain_lora
from deft_lightning.trust import read_settings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, A = "base_model.model.", ".lora_A.weight"
TWICE = (".original_module.", ".modules_to_save.")  # peft may save an embedding of another size three times


@dataclass(frozen=True)
class AdapterFolder:
    """A folder of low-rank adapters.

    Attributes:
        folder: Where it is.
        base: Folder or hub id of the model they belong to.
        lora: What they are.
        rows: Of the embedding that was trained beside them; 0 if none was.
    """

    folder: str
    base: str
    lora: LoRA
    rows: int

    def agreed(self, asked: LoRA | None) -> LoRA:
        """Return the adapters to train: those of the folder, with the dropout that was asked for.

        Raises:
            UserError: Others were asked for; names the option.
        """
        if asked is None:
            return self.lora
        own = self.lora
        same = {
            "r": asked.r == own.r,
            "alpha": asked.alpha in (None, own.alpha),
            "target_modules": asked.target_modules == "all-linear" or _names(asked) == _names(own),
            "embeddings": own.embeddings or not asked.embeddings,
            "use_rslora": own.use_rslora or not asked.use_rslora,
            "use_dora": not asked.use_dora,
            "init_lora_weights": asked.init_lora_weights is True,
            "modules_to_save": not asked.modules_to_save,
            "target_parameters": not asked.target_parameters,
        }
        for name, agrees in same.items():
            if not agrees:
                raise UserError(
                    f"--model.lora.{name} {getattr(asked, name)}: the adapters in {self.folder} have"
                    f" {getattr(own, name)}; leave --model.lora out to train them further"
                )
        return replace(own, dropout=asked.dropout)

    def widen(self, model: CausalLM) -> None:
        """Give the base the rows that tokens were added for."""
        if self.rows > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(self.rows, mean_resizing=False)

    def load_into(self, model: CausalLM) -> None:
        """Put the weights of the folder into the adapters of a model; on the meta device there is nothing to put.

        Raises:
            UserError: They are not those of the model.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors.torch import load_file

        if torch.get_default_device().type == "meta":
            return
        stored = load_file(Path(self.folder).expanduser() / WEIGHTS)
        state = {name: value for name, value in stored.items() if not any(part in name for part in TWICE)}
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        wrong = sorted(
            name
            for name in own.keys() | state.keys()
            if name not in own or name not in state or own[name].shape != state[name].shape
        )
        if wrong:
            raise UserError(
                f"{self.folder}: its adapters do not fit {self.base}, for example {wrong[0]} (--model.pretrained)"
            )
        set_peft_model_state_dict(model, state)


def _names(lora: LoRA) -> set[str]:
    return {lora.target_modules} if isinstance(lora.target_modules, str) else set(lora.target_modules)


def adapter_folder(name: Any) -> AdapterFolder | None:
    """Return the adapters that a folder holds; None if it is another folder, or none.

    Raises:
        UserError: They are no plain LoRA, or the folder is incomplete.
    """
    folder = Path(name).expanduser() if isinstance(name, str) else None
    if folder is None or (folder / "config.json").is_file() or not (folder / CONFIG).is_file():
        return None
    from peft import LoraConfig
    from safetensors import safe_open

    settings = read_settings(name, CONFIG)
    base, kind = settings.get("base_model_name_or_path"), settings.get("peft_type")
    if kind != "LORA" or not isinstance(base, str) or not base:
        raise UserError(f"{name}: {CONFIG} is of {kind} on {base!r}: LoRA on a named model alone (--model.pretrained)")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        places = sorted(key.removeprefix(PREFIX).removesuffix(A) for key in shapes if key.endswith(A))
        known = {field.name for field in fields(LoraConfig)}
        given = {key: value for key, value in settings.items() if key in known}
        if isinstance(given.get("target_modules"), str):  # a pattern of a stranger may match for ever
            given["target_modules"] = places
        saved = given.pop("modules_to_save", None)
        lora = plain_lora(LoraConfig(**given), [])
    except Exception as error:  # safetensors and peft each have their own kinds
        raise UserError(f"{name}: its adapters cannot be read: {reason_of(error)} (--model.pretrained)") from None
    beyond = lora is None or lora.use_dora or lora.changes_base or lora.target_parameters
    if lora is None or beyond or {shapes[f"{PREFIX}{place}{A}"][0] for place in places} != {lora.r}:
        raise UserError(f"{name}: its adapters are not plain LoRA with one rank (--model.pretrained)")
    rows = [shape[0] for key, shape in shapes.items() if ".lora_" not in key] if saved else []
    return AdapterFolder(name, base, replace(lora, embeddings=bool(saved)), max(rows, default=0))
