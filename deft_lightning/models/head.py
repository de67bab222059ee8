"""The seam to a model's head: what turns the last hidden states into logits, or a refusal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deft_lightning.errors import UserError

DENSE = "; use --model.head dense"


@dataclass(frozen=True)
class HeadSeam:
    """Body and head of a causal language model.

    Attributes:
        body: Gives ``last_hidden_state`` of shape ``(B, T, D)``.
        linear: The output projection; its weight is looked up at each use, so that tying and casting are honoured.
        softcap: Final soft-capping, or None.
        logit_scale: Factor on the logits.
    """

    body: nn.Module
    linear: nn.Linear
    softcap: float | None
    logit_scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states the way the fused head computes them."""
        z = self.linear(hidden) * self.logit_scale
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z


def base_causal_lm(model: Any) -> Any:
    """Return the transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_head(model: Any) -> HeadSeam:
    """Find what the fused head needs in a causal language model.

    Raises:
        UserError: The head does more than is known here; the message names the option that turns the fused head off.
    """
    causal = base_causal_lm(model)
    linear = causal.get_output_embeddings()
    name = type(causal).__name__
    if type(linear) is not nn.Linear:
        raise UserError(f"{name}: its head is a {type(linear).__name__}, which the fused head cannot read{DENSE}")
    body = causal.base_model
    if body is causal:
        raise UserError(f"{name}: its body cannot be told from its head{DENSE}")
    config = causal.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return HeadSeam(
        body=body,
        linear=linear,
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=float(scale) if scale else 1 / float(divisor) if divisor else 1.0,
    )


@torch.no_grad()
def check_causal(model: Any, input_ids: Tensor) -> None:
    """Refuse a model whose prediction changes with the tokens it is to predict.

    Args:
        model: The model as trained.
        input_ids: Shape ``(B, T)``; the first tokens of the first row are used.

    Raises:
        UserError: Changing the last token changes the logits of an earlier one.
    """
    few = input_ids[:1, :16]
    if few.shape[1] < 2:
        return
    other = few.clone()
    other[0, -1] = (few[0, -1] + 1) % model.get_input_embeddings().weight.shape[0]
    was_training = model.training
    model.eval()
    both = model(input_ids=torch.cat([few, other]), use_cache=False).logits[:, :-1].float()
    model.train(was_training)
    if float((both[0] - both[1]).abs().max()) > 1e-4 * float(both.abs().max()):
        raise UserError(
            f"{type(base_causal_lm(model)).__name__} sees the tokens it is to predict: it is not a causal model"
            " (--model.pretrained, --model.architecture.model_type)"
        )


@torch.no_grad()
def check_head(model: Any, seam: HeadSeam, input_ids: Tensor) -> None:
    """Compare the fused head's logits with the model's own on a few tokens.

    Any transform of the logits that :func:`find_head` does not know of shows here, before it trains anything.

    Args:
        model: The model as trained.
        seam: What :func:`find_head` found.
        input_ids: Shape ``(B, T)``; the first tokens of the first row are used.

    Raises:
        UserError: They differ by more than rounding.
    """
    few = input_ids[:1, :16]
    was_training = model.training
    model.eval()
    own = model(input_ids=few, use_cache=False).logits
    ours = seam.logits(seam.body(input_ids=few, use_cache=False).last_hidden_state)
    model.train(was_training)
    low = own.dtype in (torch.bfloat16, torch.float16) or ours.dtype in (torch.bfloat16, torch.float16)
    tolerance = 2e-2 if low else 1e-3  # a few roundings of either
    worst = float((own - ours).float().abs().max() / own.float().abs().max().clamp_min(1e-30))
    if not worst <= tolerance:
        raise UserError(
            f"{type(base_causal_lm(model)).__name__}: the fused head does not reproduce the model's logits (they differ"
            f" by {worst:.1%}){DENSE}"
        )
