"""Rows of a model for tokens that it has none for, or that have just been added to its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.annotations import CausalLM, Tokenizer
from deft_lightning.errors import UserError, reason_of


def fit_vocabulary(model: CausalLM, tokenizer: Tokenizer, added: Sequence[int] = ()) -> None:
    """Give the embedding and the head a row for every token; new rows are the mean of the old ones.

    Args:
        model: Without adapters; changed in place. Under the meta device its shapes alone.
        tokenizer: May have more tokens than the model has rows, or fewer: vocabularies are often padded.
        added: Ids of tokens that were added now; where the model has rows for them, these have never been trained.

    Raises:
        UserError: The model has adapters already, or cannot be resized.
    """
    if hasattr(model, "get_base_model"):
        raise UserError(
            "--model.add_tokens, --model.resize_vocabulary: the model has adapters; add tokens before adapters"
        )
    before = model.get_input_embeddings().weight.shape[0]
    rows = max(before, len(tokenizer), *(token + 1 for token in added)) if added else max(before, len(tokenizer))
    new = sorted({*added, *range(before, rows)})
    if not new:
        return
    if rows > before:
        try:
            model.resize_token_embeddings(rows, mean_resizing=False)  # its own mean is a random draw around it
        except Exception as error:  # models refuse in any way what they were not written for
            raise UserError(
                f"{type(model).__name__} cannot be resized from {before} to {rows} tokens: {reason_of(error)}"
                " (--model.add_tokens, --model.resize_vocabulary)"
            ) from None
        rank_zero_info(f"vocabulary: the model has {rows} rows in place of {before}")
    old = min(new)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tensors = [embedding.weight, getattr(head, "bias", None)]
    tensors += [head.weight] if head.weight is not embedding.weight else []
    with torch.no_grad():
        for tensor in tensors:
            if tensor is not None and not tensor.is_meta:
                tensor[new] = tensor[:old].float().mean(0).to(tensor.dtype)
