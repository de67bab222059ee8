"""What a run refuses of its model: before it is loaded, where it is placed, and with another tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deft_lightning.annotations import CausalLM, Tokenizer
from deft_lightning.errors import UserError
from deft_lightning.models import base_causal_lm, vocabulary_digest
from deft_lightning.models.quantized_shape import settle_products
from deft_lightning.training.protocols import shards

# Of the products with a 4-bit base, which autocast does not reach.
PRODUCTS = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}


def check_precision(quantization: str | None, strategy: Any) -> None:
    """Refuse strategies and precisions that cannot hold a quantised base.

    Raises:
        UserError: Names the option to change.
    """
    if quantization is None:
        return
    if shards(strategy):
        raise UserError(
            f"--model.quantization {quantization}: fsdp2 shards floating-point weights alone; use --trainer.strategy"
            " ddp, in which each device holds the quantised base"
        )
    precision = str(getattr(getattr(strategy, "precision_plugin", None), "precision", "32-true"))
    if precision not in ("32-true", *PRODUCTS):
        raise UserError(
            f"--model.quantization {quantization}: not with --trainer.precision {precision}; use 32-true, bf16-mixed or"
            " bf16-true"
        )


def compute_as(model: CausalLM, strategy: Any, asked: str | None) -> None:
    """Let the products with a 4-bit base be made in the dtype of a run's precision, unless another one is asked for."""
    products = PRODUCTS.get(str(getattr(getattr(strategy, "precision_plugin", None), "precision", "")))
    if products is not None and asked is None:
        settle_products(model, products)


def check_causal_lm(model: CausalLM) -> None:
    """Refuse an object that is no causal language model of transformers, with adapters or without.

    Raises:
        UserError: It is something else.
    """
    from transformers import PreTrainedModel

    causal = base_causal_lm(model)
    if not isinstance(causal, PreTrainedModel) or causal.get_output_embeddings() is None:
        raise UserError(
            f"pretrained: {type(model).__name__} is neither the name of a model nor a causal language model of"
            " transformers"
        )


def check_base(pretrained: str, base: str, use: Callable[[str], Any]) -> Any:
    """Return what is made of a model's name; of a base that adapters name, an error says whose base it is.

    Raises:
        UserError: It cannot be used.
    """
    try:
        return use(base)
    except UserError as error:
        if base == pretrained:
            raise
        raise UserError(f"{pretrained}: holds adapters of {base!r}, which cannot be loaded: {error}") from None


def check_tokens(tokens: object) -> None:
    """Refuse tokens to add that are no list of spellings.

    Raises:
        UserError: Names the option.
    """
    fine = isinstance(tokens, list | tuple) and all(isinstance(token, str) and token.strip() for token in tokens)
    if tokens is not None and not fine:
        raise UserError(f"--model.add_tokens must be a list of texts, such as '[<tool>, </tool>]', not {tokens!r}")


def check_vocabulary(tokenizer: Tokenizer | None, digest: str | None) -> None:
    """Refuse another tokenizer than the one a checkpoint was trained with.

    Args:
        tokenizer: Of the data, None without any.
        digest: Of the checkpoint's, None where it is not known.

    Raises:
        UserError: They differ.
    """
    if tokenizer is not None and digest is not None and digest != vocabulary_digest(tokenizer):
        raise UserError(
            "the tokenizer is not the one the checkpoint was trained with: a tokenizer built from the data changes"
            " with --data.source and its split; name one with --data.tokenizer, for example the run's export folder"
        )
