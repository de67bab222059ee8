"""Completions of prompts: greedy or sampled, cut at the end of the turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from deft_lightning.annotations import Batch, CausalLM, Tokenizer
from deft_lightning.errors import UserError
from deft_lightning.evaluation.sampling import KeyedGumbel


@dataclass(frozen=True)
class Generation:
    """How `test` and `predict` generate.

    Args:
        max_new_tokens: Longest completion in tokens.
        temperature: 0 is greedy; above, tokens are sampled.
        top_p: Sample from the smallest set of tokens with this probability mass, in (0, 1].
        samples: Completions per prompt; more than one needs a temperature.
        seed: Seed of the sampling. What is drawn depends on it, the example id, the number of the sample and the place
            of the token alone: not on the batch, its order, or the ranks.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1 or self.samples < 1:
            raise UserError(
                "--model.generation needs temperature >= 0, 0 < top_p <= 1, max_new_tokens and samples >= 1"
            )
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
    model: CausalLM,
    tokenizer: Tokenizer,
    batch: Batch,
    settings: Generation,
    stops: Sequence[int],
    *,
    longest: int = 0,
    together: bool = False,
) -> list[list[Completion]]:
    """Complete left-padded prompts with a Hugging Face model in eval mode.

    Args:
        model: Anything with transformers' ``generate``.
        tokenizer: Decodes; gives the padding token.
        batch: ``input_ids``, ``attention_mask`` of shape ``(B, T)``, left-padded, and ``example_id``.
        settings: Length, temperature and number of samples.
        stops: Tokens that end a completion.
        longest: Tokens of the longest prompt of all batches. Where the model runs out of positions, completions of all
            of them end where that one's has to: no text depends on what shares its batch.
        together: Go on until every rank is done: sharded weights are gathered by all ranks at once.

    Returns:
        For each of the B prompts its samples.
    """
    input_ids, mask, n = batch["input_ids"], batch["attention_mask"], settings.samples
    prompt = input_ids.shape[1]
    left = position_limit(model, max(prompt, longest)) - max(prompt, longest)
    out = model.generate(
        input_ids=input_ids.repeat_interleave(n, 0),
        attention_mask=mask.repeat_interleave(n, 0),
        # Past its positions a model has no embedding; what is cut there counts as truncated.
        max_new_tokens=min(settings.max_new_tokens, left),
        do_sample=False,  # sampling is an arg-max of noisy scores
        logits_processor=_sampling(batch["example_id"], settings, prompt, input_ids.device),
        eos_token_id=list(stops),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        synced_gpus=together,
        **NEUTRAL,
    )
    done: list[Completion] = []
    for row in out[:, prompt:].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), None)
        done.append(Completion(tokenizer.decode(row[:end], skip_special_tokens=True), end is None))
    return [done[i : i + n] for i in range(0, len(done), n)]


def positions(model: CausalLM) -> int | None:
    """Return how many positions a Hugging Face model has; None where nothing limits them."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def position_limit(model: CausalLM, prompt: int, named: str = "") -> int:
    """Return how many tokens the model has positions for.

    Args:
        model: A Hugging Face model.
        prompt: Tokens of the longest prompt.
        named: Benchmark it belongs to, for the message.

    Raises:
        UserError: The prompt leaves no position to write at.
    """
    limit = positions(model)
    if limit is None:
        return prompt + 2**31
    if prompt >= limit:
        option = f"the rows of {named} in --data.benchmarks" if named else "--data.test_source"
        raise UserError(f"a prompt of {prompt} tokens fills the model's {limit} positions ({option})")
    return limit


def _sampling(ids: Sequence[str], settings: Generation, prompt: int, device: Any) -> list[Any]:
    """Return what turns the scores of a greedy search into draws; nothing at a temperature of 0."""
    if not settings.temperature:
        return []
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    numbers = range(settings.samples)
    rows, samples = [id for id in ids for _ in numbers], [n for _ in ids for n in numbers]
    warpers = [TemperatureLogitsWarper(float(settings.temperature))]
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    return [*warpers, KeyedGumbel(rows, samples, settings.seed, prompt, device)]
