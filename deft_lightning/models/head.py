"""The seam to a model's head: what turns the last hidden states into logits, or a refusal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from deft_lightning.annotations import CausalLM, Settings
from deft_lightning.errors import UserError
from deft_lightning.ops import ColumnSparsity

DENSE = "; use --model.head dense"


@dataclass(frozen=True)
class HeadSeam:
    """The head of a causal language model, and what the model does to its output.

    Attributes:
        causal: The transformers model, whose forward runs the head.
        linear: The output projection, or its LoRA; weights are looked up at each use, so that tying, casting and
            gathering are honoured.
        softcap: Final soft-capping, or None.
        logit_scale: Factor on the logits.
        backend: Row kernel of the fused head: ``auto``, ``torch`` or ``triton``.
        sparsity: How much of the gradient of the logits training may leave out, and what it left out; None: nothing.
    """

    causal: nn.Module
    linear: nn.Module
    softcap: float | None
    logit_scale: float
    backend: str = "auto"
    sparsity: ColumnSparsity | None = None

    @property
    def projection(self) -> nn.Linear:
        """Return the linear module itself, inside an adapter or not."""
        return _projection(self.linear)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight ``(V, D)`` and the bias ``(V,)`` as they are now.

        Raises:
            UserError: The weight is sharded here: the head does not run inside the forward that gathers it.
        """
        linear = self.projection
        if hasattr(linear.weight, "placements"):
            raise UserError(f"{type(self.causal).__name__}: the weight of its head is sharded where it is used{DENSE}")
        if getattr(self.linear, "disable_adapters", False) and getattr(self.linear, "merged", False):
            cast("Any", self.linear).unmerge()  # as the adapter's own forward does
        return linear.weight, linear.bias

    def adapter(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the low-rank update of the head for hidden states ``(N, D)``: ``(N, r)`` and ``(V, r)``, or None."""
        lora: Any = self.linear
        if not hasattr(lora, "lora_A") or lora.disable_adapters or lora.merged:
            return None
        low, up = [], []
        for name in lora.active_adapters:
            if name in lora.lora_A:
                down = lora.lora_A[name]
                dropped = lora.lora_dropout[name](hidden.to(down.weight.dtype))
                low.append(down(dropped) * lora.scaling[name])
                up.append(lora.lora_B[name].weight)
        return (torch.cat(low, dim=1), torch.cat(up, dim=1)) if low else None

    def options(self) -> Settings:
        """Return what the functions of :mod:`deft_lightning.ops` take beside weight and adapter."""
        return {"softcap": self.softcap, "logit_scale": self.logit_scale, "backend": self.backend}

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states the way the fused head computes them."""
        z = self.linear(hidden) * self.logit_scale
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z


def _projection(module: Any) -> Any:
    if hasattr(module, "modules_to_save"):  # peft trains a copy of the whole head
        copied = [name for name in module.active_adapters if name in module.modules_to_save]
        return module.original_module if module.disable_adapters or not copied else module.modules_to_save[copied[0]]
    return module.base_layer if hasattr(module, "base_layer") else module


def base_causal_lm(model: CausalLM) -> CausalLM:
    """Return the transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_head(model: CausalLM, backend: str = "auto") -> HeadSeam:
    """Find what the fused head needs in a causal language model.

    Args:
        model: A transformers causal language model, with or without adapters.
        backend: Row kernel of the fused head.

    Raises:
        UserError: The head does more than is known here; the message names the option that turns the fused head off.
    """
    causal = base_causal_lm(model)
    linear = causal.get_output_embeddings()
    name = type(causal).__name__
    projection = _projection(linear)
    if type(projection) is not nn.Linear:
        kind = type(projection).__name__
        raise UserError(f"{name}: its head is a {kind}, which the fused head cannot read{DENSE}")
    if hasattr(linear, "lora_A"):
        if linear.lora_variant or any(down.bias is not None for down in linear.lora_B.values()):
            raise UserError(f"{name}: the fused head supports plain LoRA on the head, not DoRA or LoRA biases{DENSE}")
    elif projection is not linear and not hasattr(linear, "modules_to_save"):
        raise UserError(f"{name}: the fused head cannot read the adapter {type(linear).__name__} on its head{DENSE}")
    config = causal.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return HeadSeam(
        causal=causal,
        linear=linear,
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=float(scale) if scale else 1 / float(divisor) if divisor else 1.0,
        backend=backend,
    )


def router_loss_factor(model: CausalLM) -> float | None:
    """Return the factor on the auxiliary loss of a mixture of experts, or None where the model has none.

    transformers computes that loss where the config says ``output_router_logits``.

    Raises:
        UserError: The config asks for that loss and names no factor.
    """
    causal = base_causal_lm(model)
    config = causal.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None
    for owner in (causal, config):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if hasattr(owner, name):
                return float(getattr(owner, name))
    raise UserError(
        f"{type(causal).__name__} returns no auxiliary loss, or an unknown factor for it, although its config "
        "sets output_router_logits; set it to false (--model.architecture.output_router_logits false)"
    )
