"""Completions of prompts: greedy or sampled, cut at the end of the turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from deft_lightning.annotations import Batch, CausalLM, Tokenizer
from deft_lightning.errors import UserError
from deft_lightning.evaluation.batchwise import Batchwise
from deft_lightning.evaluation.completions import Ask, Completion, Completions, Steps, asks_of
from deft_lightning.evaluation.continuous import Chooser, Decoder, why_not
from deft_lightning.evaluation.vllm import VLLM, Engine


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
        backend: `transformers`, or `vllm` on one GPU, whose samples differ.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    backend: Literal["transformers", "vllm"] = "transformers"

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1 or self.samples < 1:
            raise UserError(
                "--model.generation needs temperature >= 0, 0 < top_p <= 1, max_new_tokens and samples >= 1"
            )
        if self.backend not in ("transformers", "vllm"):
            raise UserError(f"--model.generation.backend must be transformers or vllm, not {self.backend!r}")
        if self.samples > 1 and not self.temperature:
            raise UserError("--model.generation.samples above 1 needs --model.generation.temperature above 0")


def completions_of(
    model: CausalLM,
    tokenizer: Tokenizer,
    asks: Sequence[Ask],
    settings: Generation,
    stops: Sequence[int],
    *,
    places: int,
    longest: int = 0,
    together: bool = False,
    engine: Engine | None = None,
    device: torch.device | None = None,
) -> Completions:
    """Return the completions of prompts: batch by batch where rows of the model cannot come and go, or ranks share it.

    Args:
        model: A Hugging Face model in eval mode.
        tokenizer: Decodes; gives the padding token.
        asks: The prompts, in the order in which they will be asked for.
        settings: Length, temperature and number of samples.
        stops: Tokens that end a completion.
        places: Prompts at a time.
        longest: As for :func:`complete`.
        together: As for :func:`complete`.
        engine: Of vLLM, where that completes them.
        device: Where the model computes; default: where its weights are, which may wait in host memory.
    """
    longest = max(longest, *(len(ask.input_ids) for ask in asks))
    # Past its positions a model has no embedding; what is cut there counts as truncated.
    limit = min(settings.max_new_tokens, position_limit(model, longest) - longest)
    warpers, sampled, pad = warpers_of(settings), settings.temperature > 0, tokenizer.pad_token_id or 0
    steps: Steps
    if engine is not None:
        drawn = (settings.temperature, settings.top_p, settings.seed)
        steps = VLLM(engine, *drawn, stops, limit, settings.samples)
    elif together or why_not(model):
        given = (warpers, sampled, settings.seed, stops, limit, settings.samples, places, pad, together)
        steps = Batchwise(model, *given, device=device)
    else:
        choose = Chooser(warpers, sampled, settings.seed)
        steps = Decoder(model, choose, stops, limit, settings.samples, places, pad, device)
    return Completions(asks, steps, tokenizer, stops, settings.samples, places)


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
    asks = asks_of(batch)
    how: dict[str, Any] = {"places": len(asks), "longest": longest, "together": together}
    return completions_of(model, tokenizer, asks, settings, stops, **how).take(range(len(asks)))


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


def warpers_of(settings: Generation) -> list[Any]:
    """Return what shapes the scores before the noise; nothing at a temperature of 0."""
    if not settings.temperature:
        return []
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    warpers = [TemperatureLogitsWarper(float(settings.temperature))]
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    return warpers
