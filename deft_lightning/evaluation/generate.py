"""Completions of prompts: greedy or sampled, cut at the end of the turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from deft_lightning.errors import UserError
from deft_lightning.hashing import key


@dataclass(frozen=True)
class Generation:
    """How `test` and `predict` generate.

    Args:
        max_new_tokens: Longest completion in tokens.
        temperature: 0 is greedy; above, tokens are sampled.
        top_p: Sample from the smallest set of tokens with this probability mass, in (0, 1].
        samples: Completions per prompt; more than one needs a temperature.
        seed: Seed of the sampling, together with the example ids of a batch.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1 or self.samples < 1:
            raise UserError("--model.generation: temperature >= 0, 0 < top_p <= 1, max_new_tokens and samples >= 1")
        if self.samples > 1 and not self.temperature:
            raise UserError("--model.generation.samples above 1 needs --model.generation.temperature above 0")


# What a model's own generation config may ask for and a measurement must not: Qwen2.5-Instruct penalises repetition.
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}


class Completion(NamedTuple):
    """One sample: its text without the end token, and whether a length limit cut it off."""

    text: str
    truncated: bool


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    batch: dict[str, Any],
    settings: Generation,
    stops: Sequence[int],
    *,
    together: bool = False,
) -> list[list[Completion]]:
    """Complete left-padded prompts with a Hugging Face model in eval mode.

    Args:
        model: Anything with transformers' ``generate``.
        tokenizer: Decodes; gives the padding token.
        batch: ``input_ids``, ``attention_mask`` of shape ``(B, T)``, left-padded, and ``example_id``.
        settings: Length, temperature and number of samples.
        stops: Tokens that end a completion.
        together: Go on until every rank is done: sharded weights are gathered by all ranks at once.

    Returns:
        For each of the B prompts its samples.
    """
    options: dict[str, Any] = {**NEUTRAL, "do_sample": False}
    if settings.temperature:
        options |= {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        torch.manual_seed(key(settings.seed, *batch["example_id"]) >> 65)
    prompt = batch["input_ids"].shape[1]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or prompt + 2**31
    if prompt >= positions:
        raise UserError(f"a prompt of {prompt} tokens fills the model's {positions} positions (--data.test_source)")
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        # Past its positions a model has no embedding; what is cut there counts as truncated.
        max_new_tokens=min(settings.max_new_tokens, positions - prompt),
        num_return_sequences=settings.samples,
        eos_token_id=list(stops),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        synced_gpus=together,
        **options,
    )
    done: list[Completion] = []
    for row in out[:, prompt:].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), None)
        done.append(Completion(tokenizer.decode(row[:end], skip_special_tokens=True), end is None))
    n = settings.samples
    return [done[i : i + n] for i in range(0, len(done), n)]
