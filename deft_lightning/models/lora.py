"""Low-rank adapters through peft."""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import get_default_device, nn

from deft_lightning.annotations import CausalLM, Settings
from deft_lightning.errors import UserError

# What LoRA says of an adapter, or what changes nothing of its arithmetic.
DESCRIBED = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "peft_version", "base_model_name_or_path",
    "revision", "auto_mapping", "inference_mode", "init_lora_weights", "ensure_weight_tying",
    "modules_to_save", "fan_in_fan_out", "use_rslora", "use_dora", "target_parameters",
}  # fmt: skip
# How adapters begin: at zero, or so that the weights below them change.
INITS = re.compile(r"gaussian|orthogonal|olora|pissa|pissa_niter_\d{1,3}")


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (arXiv 2106.09685): ``W + alpha / r * B A``, only A and B are trained.

    Args:
        r: Rank, at least 1.
        alpha: Scale; None is ``2 r``.
        dropout: Dropout on the adapter's input, in [0, 1).
        target_modules: Names of the linear modules to adapt; `all-linear` is every one but the head.
        embeddings: Train the embedding and the head too, in full; added tokens need it and switch it on.
        use_rslora: Scale by ``alpha / sqrt(r)`` (arXiv 2312.03732).
        use_dora: Train magnitude and direction of weights apart (arXiv 2402.09353); not on a fused head.
        init_lora_weights: Initialisation, as in peft: true (no change at the start), gaussian, orthogonal, olora,
            pissa, pissa_niter_16. olora and pissa change the weights below the adapters, so that checkpoints hold all
            of them.
        modules_to_save: Names of modules to train in full, besides the adapters.
        target_parameters: Names of weights to adapt that are not linear modules, such as a mixture's experts.
    """

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    embeddings: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None

    def __post_init__(self) -> None:
        """Refuse ranks and dropouts that mean nothing, and beginnings that need more than the model."""
        if self.r < 1:
            raise UserError(f"--model.lora.r must be at least 1, got {self.r}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"--model.lora.dropout {self.dropout} is outside [0, 1)")
        if isinstance(init := self.init_lora_weights, str) and not INITS.fullmatch(init):
            raise UserError(
                f"--model.lora.init_lora_weights {init}: use true, false, gaussian, orthogonal, olora, pissa or"
                " pissa_niter_N; others of peft need data or a config of their own"
            )

    @property
    def changes_base(self) -> bool:
        """Return whether the weights below the adapters are others than the base's from the start."""
        return changes_base(self.init_lora_weights)

    def settings(self) -> Settings:
        """Return the fields as plain values, for a checkpoint."""
        return asdict(self)


def changes_base(init: object) -> bool:
    """Return whether adapters that begin so change the weights below them."""
    return isinstance(init, str) and init.startswith(("olora", "pissa"))


def add_adapters(model: CausalLM, lora: LoRA) -> CausalLM:
    """Wrap a model so that only its adapters train, and copies of embedding and head if ``lora`` says so.

    Raises:
        UserError: No module has one of the names, or one is trained whole beside.
    """
    from peft import LoraConfig, get_peft_model

    ends = _ends(model) if lora.embeddings else {}
    on_meta = get_default_device().type == "meta"  # nothing to decompose
    config = LoraConfig(
        r=lora.r,
        lora_alpha=2 * lora.r if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
        modules_to_save=[*ends, *(lora.modules_to_save or [])] or None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=True if on_meta else lora.init_lora_weights,
        target_parameters=lora.target_parameters,
        ensure_weight_tying=len({id(layer.weight) for layer in ends.values()}) < len(ends),  # one copy for both
    )
    _check_names("modules_to_save", lora.modules_to_save, [name for name, _ in model.named_modules()])
    _check_names("target_parameters", lora.target_parameters, [name for name, _ in model.named_parameters()])
    if not isinstance(lora.target_modules, str):
        there = [f".{name}" for name, _ in model.named_modules()]
        missing = [t for t in lora.target_modules if not any(name.endswith(f".{t}") for name in there)]
        if missing:
            raise UserError(f"--model.lora.target_modules: no module is named {', '.join(missing)}")
        twice = [t for t in lora.target_modules if any(f".{name}".endswith(f".{t}") for name in ends)]
        if twice:
            raise UserError(
                f"--model.lora.target_modules: {', '.join(twice)} is trained in full, by "
                "--model.lora.embeddings true or because tokens are added; leave it out here"
            )
    try:
        with warnings.catch_warnings():
            # peft cannot merge into a tied head; untie_adapted_head can.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True.*")
            return get_peft_model(model, config)
    except ValueError as error:
        reason = " ".join(str(error).split())
        what = "target_parameters" if lora.target_parameters else "target_modules"
        raise UserError(f"--model.lora.{what} {getattr(lora, what)}: {reason}") from None


def _check_names(option: str, asked: list[str] | None, there: list[str]) -> None:
    """Refuse a name that is of nothing: peft would leave it out in silence."""
    missing = [name for name in asked or () if not any(f".{one}".endswith(f".{name}") for one in there)]
    if missing:
        raise UserError(f"--model.lora.{option}: nothing in the model is named {', '.join(missing)}")


def _ends(model: CausalLM) -> dict[str, nn.Module]:
    """Return names of the embedding and of the head within a model, and they themselves."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: module for name, module in model.named_modules() if any(module is end for end in both)}


def lora_of(model: CausalLM) -> LoRA | None:
    """Return the adapters that a model has of its own, None without any, as a checkpoint describes them.

    Those that it cannot describe are None too, with a warning: several adapters, ranks by layer.
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
        "the model's adapters are not plain LoRA: checkpoints of this run cannot be exported or loaded; after "
        "training, export the module itself with trainer.export(module, output=...)"
    )
    return None


def plain_lora(config: Any, ends: list[str]) -> LoRA | None:
    """Return what a peft ``LoraConfig`` asks for, None where :class:`LoRA` cannot say it.

    Args:
        config: Of peft.
        ends: Names of the model's embedding and head; both of them in ``modules_to_save`` are ``embeddings``.
    """
    from peft import LoraConfig

    modules = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
    saved = set(config.modules_to_save or ())
    names = [{name for name in saved if f".{end}".endswith(f".{name}")} for end in ends]
    both = set.union(*names) if names and all(names) else set()
    init = config.init_lora_weights
    if not isinstance(init, bool) and not (isinstance(init, str) and INITS.fullmatch(init)):
        return None
    usual, own = LoraConfig().to_dict(), config.to_dict()
    if any(own[name] != value for name, value in usual.items() if name not in DESCRIBED):
        return None
    return LoRA(
        config.r, config.lora_alpha, config.lora_dropout, modules, bool(both), config.use_rslora, config.use_dora, init,
        sorted(saved - both) or None, sorted(config.target_parameters or ()) or None,
    )  # fmt: skip


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
