"""Batches by transformers' own `generate`: for models whose rows cannot come and go one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from deft_lightning.annotations import CausalLM
from deft_lightning.evaluation.completions import Ask, Row
from deft_lightning.evaluation.continuous import causal_lm
from deft_lightning.evaluation.sampling import KeyedGumbel
from deft_lightning.evaluation.slots import left_padded

# What a model's own generation config may ask for and a measurement must not: Qwen2.5-Instruct penalises repetition.
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}


class Batchwise:
    """Completes prompts batch by batch: a row that has ended waits for the longest of its batch.

    Args:
        model: Anything with transformers' ``generate``.
        warpers: Logits processors that shape the scores before the noise.
        sampled: Whether noise is added.
        seed: Of all draws.
        stops: Tokens that end a completion.
        limit: Longest completion in tokens.
        samples: Completions per prompt.
        places: Prompts at a time.
        pad: Token that fills rows up.
        together: Go on until every rank is done: sharded weights are gathered by all ranks at once.
        device: Where the model computes; default: where its weights are.
    """

    def __init__(
        self, model: CausalLM, warpers: Sequence[Any], sampled: bool, seed: int, stops: Iterable[int], limit: int,
        samples: int, places: int, pad: int, together: bool = False, device: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.model, self.warpers, self.sampled, self.seed = model, warpers, sampled, seed
        self.stops, self.limit, self.samples, self.places = list(stops), limit, samples, places
        self.pad, self.together, self.device = pad, together, device or causal_lm(model).device

    def step(self, waiting: deque[Ask]) -> list[Row]:
        """Complete the next batch of ``waiting``."""
        asks = [waiting.popleft() for _ in range(min(self.places, len(waiting)))]
        ids, mask, _ = left_padded([ask.input_ids for ask in asks], self.pad, self.device)
        out: Tensor = self.model.generate(
            input_ids=ids.repeat_interleave(self.samples, 0),
            attention_mask=mask.repeat_interleave(self.samples, 0),
            max_new_tokens=self.limit,
            do_sample=False,  # sampling is an arg-max of noisy scores
            logits_processor=self._processors(asks, ids),
            eos_token_id=self.stops,
            pad_token_id=self.pad,
            use_cache=True,
            synced_gpus=self.together,
            **NEUTRAL,
        )
        made = out[:, ids.shape[1] :].tolist()
        numbers = range(self.samples)
        return [Row(ask, n, made[i * self.samples + n]) for i, ask in enumerate(asks) for n in numbers]

    def _processors(self, asks: Sequence[Ask], ids: Tensor) -> list[Any]:
        """Return what turns the scores of a greedy search into draws; nothing at a temperature of 0."""
        if not self.sampled:
            return list(self.warpers)
        numbers = range(self.samples)
        rows, samples = [ask.id for ask in asks for _ in numbers], [n for _ in asks for n in numbers]
        return [*self.warpers, KeyedGumbel(rows, samples, self.seed, ids.shape[1], ids.device)]
