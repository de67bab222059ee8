"""Low-rank adapters through peft."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from deft_lightning.annotations import CausalLM, Settings
from deft_lightning.errors import UserError

# What LoRA says of an adapter, or what changes nothing of its arithmetic.
DESCRIBED = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "peft_version", "base_model_name_or_path",
    "revision", "auto_mapping", "inference_mode", "init_lora_weights", "ensure_weight_tying",
    "modules_to_save", "fan_in_fan_out",
}  # fmt: skip


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (arXiv 2106.09685): ``W + alpha / r * B A``, only A and B are trained.

    Args:
        r: Rank, at least 1.
        alpha: Scale; None is ``2 r``.
        dropout: Dropout on the adapter's input, in [0, 1).
        target_modules: Names of the linear modules to adapt; `all-linear` is every one but the head.
        embeddings: Train the embedding and the head too, whole; tokens that are added need it, and switch it on.
    """

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    embeddings: bool = False

    def __post_init__(self) -> None:
        """Refuse ranks and dropouts that mean nothing."""
        if self.r < 1:
            raise UserError(f"--model.lora.r must be at least 1, got {self.r}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"--model.lora.dropout {self.dropout} is outside [0, 1)")

    def settings(self) -> Settings:
        """Return the fields as plain values, for a checkpoint."""
        return asdict(self)


def add_adapters(model: CausalLM, lora: LoRA) -> CausalLM:
    """Wrap a model so that only its adapters train, and copies of embedding and head if ``lora`` says so.

    Raises:
        UserError: No module has one of the names, or one is trained whole beside.
    """
    from peft import LoraConfig, get_peft_model

    ends = _ends(model) if lora.embeddings else {}
    config = LoraConfig(
        r=lora.r,
        lora_alpha=2 * lora.r if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
        modules_to_save=list(ends) or None,
        ensure_weight_tying=len({id(layer.weight) for layer in ends.values()}) < len(ends),  # one copy for both
    )
    if not isinstance(lora.target_modules, str):
        there = [f".{name}" for name, _ in model.named_modules()]
        missing = [t for t in lora.target_modules if not any(name.endswith(f".{t}") for name in there)]
        if missing:
            raise UserError(f"--model.lora.target_modules: no module is named {', '.join(missing)}")
        twice = [t for t in lora.target_modules if any(f".{name}".endswith(f".{t}") for name in ends)]
        if twice:
            raise UserError(
                f"--model.lora.target_modules: {', '.join(twice)} is trained whole, by --model.lora.embeddings true"
                " or since tokens are added; leave it out here"
            )
    try:
        with warnings.catch_warnings():
            # peft cannot merge into a tied head; untie_adapted_head can.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True.*")
            return get_peft_model(model, config)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--model.lora.target_modules {lora.target_modules}: {reason}") from None


def _ends(model: CausalLM) -> dict[str, nn.Module]:
    """Names of the embedding and of the head within a model, and they themselves."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: module for name, module in model.named_modules() if any(module is end for end in both)}


def lora_of(model: CausalLM) -> LoRA | None:
    """Return the adapters that a model has of its own, None without any, as a checkpoint describes them.

    Those that it cannot describe are None too, with a warning: DoRA, several adapters, ranks by layer.
    """
    from peft import LoraConfig, PeftModel

    if not isinstance(model, PeftModel):
        return None
    config = model.active_peft_config
    if isinstance(config, LoraConfig) and len(model.peft_config) == 1:
        lora = plain_lora(config, list(_ends(model.get_base_model())))
        if lora is not None:
            return lora
    rank_zero_warn(
        "the adapters of the model are no plain LoRA: checkpoints of this run cannot be exported or loaded; export the"
        " module itself once it is trained, trainer.export(module, output=...)"
    )
    return None


def plain_lora(config: Any, ends: list[str]) -> LoRA | None:
    """Return what a peft ``LoraConfig`` asks for, None where :class:`LoRA` cannot say it.

    Args:
        config: Of peft.
        ends: Names of the model's embedding and head; ``modules_to_save`` is both of them or nothing.
    """
    from peft import LoraConfig

    modules = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
    saved = set(config.modules_to_save or ())
    names = [{name for name in saved if f".{end}".endswith(f".{name}")} for end in ends]
    if saved and not (all(names) and set.union(*names) == saved):
        return None
    usual, own = LoraConfig().to_dict(), config.to_dict()
    if any(own[name] != value for name, value in usual.items() if name not in DESCRIBED):
        return None
    return LoRA(config.r, config.lora_alpha, config.lora_dropout, modules, bool(saved))


def untie_adapted_head(model: CausalLM) -> None:
    """Give a tied head a weight of its own where it or the embedding has adapters: merging into one leaves the other.

    Args:
        model: A peft model; changed in place. A model that is not tied, or without such adapters, is left alone.
    """
    causal = model.get_base_model()
    head, embedding = causal.get_output_embeddings(), causal.get_input_embeddings()
    adapted = any(hasattr(layer, "base_layer") for layer in (head, embedding))
    if not adapted or head.weight is not embedding.weight:
        return
    base = getattr(head, "base_layer", head)
    base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    causal.config.tie_word_embeddings = causal.config.get_text_config().tie_word_embeddings = False
