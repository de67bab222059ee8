"""Continuous batching: a row that has ended leaves its place to the next prompt, and no row waits for another.

A completion depends on the prompt, the seed and the number of the sample: scores are those of transformers' greedy
search, in float32, draws those of :mod:`~deft_lightning.evaluation.sampling`. The rows beside it change rounding alone.

transformers has continuous batching too (``generate_batch``). It knows no stream of draws per row, and on a CPU it
took 1.4 times as long as one prompt at a time: 8 prompts of GSM8K, 32 tokens each, SmolLM2-135M in float32.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from deft_lightning.annotations import CausalLM
from deft_lightning.evaluation.completions import Ask, Row
from deft_lightning.evaluation.sampling import gumbel, stream_key
from deft_lightning.evaluation.slots import Slots, empty_cache, left_padded, mask_of

READ = 2048  # tokens read at a time, padding included: enough for a product, few enough that prompts are alike
REFILL = 8  # places are filled once an eighth of them is free: prompts are read together, and few places are idle

# Of a model's generation config: what leaves a greedy search as it is, or is overruled in each call.
HARMLESS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample", "temperature", "top_k",
    "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "num_beams", "repetition_penalty",
    "early_stopping", "no_repeat_ngram_size", "min_length", "max_length", "max_new_tokens", "length_penalty",
    "num_beam_groups", "use_cache", "transformers_version", "cache_implementation", "return_dict_in_generate",
    "num_return_sequences", "diversity_penalty", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits",
}  # fmt: skip


def causal_lm(model: CausalLM) -> Any:
    """Return the model that adapters are laid around, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def why_not(model: CausalLM) -> str:
    """Return why rows of a model cannot come and go, in a few words; empty where they can."""
    from transformers import GenerationMixin

    base = causal_lm(model)
    if getattr(base, "_is_stateful", False):
        return "it keeps a recurrent state"
    if not type(base).__module__.startswith("transformers.models."):
        return "its code is from outside transformers"
    own = type(base).prepare_inputs_for_generation
    if own is not GenerationMixin.prepare_inputs_for_generation or "attention_mask" not in _takes(base):
        return "it prepares its own inputs"
    layers: set[Any] = {type(layer) for layer in DynamicCache(config=base.config).layers}
    strange = layers - {DynamicLayer, DynamicSlidingWindowLayer}
    if strange or "chunked_attention" in (getattr(base.config.get_text_config(), "layer_types", None) or ()):
        return f"its cache holds {', '.join(sorted(layer.__name__ for layer in strange)) or 'chunks'}"
    if {"dynamic", "longrope"} & _rope_types(base.config.get_text_config()):
        return "the longest row changes the positions of all"
    asked = {name for name, value in base.generation_config.to_diff_dict().items() if value not in (None, False)}
    if strange := {name for name in asked - HARMLESS if not name.startswith("_")}:
        return f"its generation config sets {', '.join(sorted(strange))}"
    return ""


def _rope_types(config: Any) -> set[str]:
    """Return the kinds of rotary positions, of all layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(one.get("rope_type")) for one in each}


def _takes(base: Any) -> Iterable[str]:
    return inspect.signature(base.forward).parameters


class Chooser:
    """Chooses tokens: the arg-max of scores, or of scores with the noise of each row's stream.

    Args:
        warpers: Logits processors that shape the scores before the noise.
        sampled: Whether noise is added.
        seed: Of all draws.
    """

    def __init__(self, warpers: Sequence[Any], sampled: bool, seed: int) -> None:
        self.warpers, self.sampled, self.seed = warpers, sampled, seed

    def key_of(self, id: str, sample: int) -> int:
        """Return the key of a sample's stream."""
        return stream_key(self.seed, id, sample)

    def __call__(self, scores: Tensor, rows: Sequence[Row]) -> Tensor:
        """Return the next token of each row, int64, shape ``(rows,)``."""
        for warper in self.warpers:
            scores = warper(None, scores)
        if self.sampled:
            keys = torch.tensor([row.key for row in rows], device=scores.device)
            places = torch.tensor([len(row.tokens) for row in rows], device=scores.device)
            scores = gumbel(keys, places, scores.shape[1]).add_(scores)
        return scores.argmax(-1)


class Decoder:
    """Completes prompts with a fixed number of places.

    Args:
        model: A causal language model of transformers in eval mode, for which :func:`why_not` has no reason.
        choose: Chooses tokens.
        stops: Tokens that end a completion.
        limit: Longest completion in tokens.
        samples: Completions per prompt.
        places: Prompts at a time.
        pad: Token that fills rows up.
        device: Where the model computes; default: where its weights are.
    """

    def __init__(
        self, model: CausalLM, choose: Chooser, stops: Iterable[int], limit: int, samples: int, places: int, pad: int,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.model, self.choose, self.stops, self.limit, self.pad = model, choose, frozenset(stops), limit, pad
        self.samples = samples
        self.slots, self.rows = Slots(places * samples), list[Row]()
        self.device = device or causal_lm(model).device
        takes = set(_takes(causal_lm(model)))
        self._cache = "cache" if "cache" in takes else "past_key_values"  # the name before transformers 5.24
        self._positions, self._last = "position_ids" in takes, "logits_to_keep" in takes

    def step(self, waiting: deque[Ask]) -> list[Row]:
        """Fill free places from ``waiting``, write one token of each row; return the rows that have ended."""
        ended = []
        free = self.slots.capacity - len(self.rows)
        if not self.rows or free >= max(self.samples, self.slots.capacity // REFILL):
            while waiting and free >= self.samples:
                asks = [waiting.popleft()]
                width = len(asks[0].input_ids)
                while waiting and free >= self.samples * (len(asks) + 1):
                    width = max(width, len(waiting[0].input_ids))
                    if width * (len(asks) + 1) > READ:
                        break
                    asks.append(waiting.popleft())
                free -= self.samples * len(asks)
                ended += self._read(asks)
        return ended + self._write() if self.rows else ended

    def _read(self, asks: Sequence[Ask]) -> list[Row]:
        """Read prompts, and give each sample its first token and a place; return the rows that ended with it."""
        ids, mask, positions = left_padded([ask.input_ids for ask in asks], self.pad, self.device)
        cache = empty_cache()
        scores = self._scores(ids, mask, positions, cache).repeat_interleave(self.samples, 0)
        key = self.choose.key_of
        rows = [Row(ask, n, key=key(ask.id, n)) for ask in asks for n in range(self.samples)]
        self.slots.add(cache, [len(ask.input_ids) for ask in asks], self.samples)
        self.rows += rows
        return self._append(len(self.rows) - len(rows), scores)

    def _write(self) -> list[Row]:
        """Write the next token of each row; return the rows that have ended."""
        slots = self.slots
        lengths = torch.tensor(slots.lengths, device=self.device)
        ids = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.device)
        mask = mask_of(lengths + 1, slots.width + 1)
        slots.open()
        scores = self._scores(ids, mask, lengths.unsqueeze(1), slots.cache)
        slots.close()
        return self._append(0, scores)

    def _scores(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Return the scores of the token behind the last one of each row, float32, shape ``(rows, V)``."""
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, self._cache: cache, "use_cache": True}
        if self._positions:
            given["position_ids"] = positions
        if self._last:
            given["logits_to_keep"] = 1
        return self.model(**given, return_dict=True).logits[:, -1].float()

    def _append(self, first: int, scores: Tensor) -> list[Row]:
        """Choose a token for each row from ``first`` on; free the places of those that end with it."""
        for row, token in zip(self.rows[first:], self.choose(scores, self.rows[first:]).tolist(), strict=True):
            row.tokens.append(token)
        ended = [
            i
            for i, row in enumerate(self.rows)
            if i >= first and (row.tokens[-1] in self.stops or len(row.tokens) >= self.limit)
        ]
        done = [self.rows[i] for i in ended]
        for i in reversed(ended):
            self.slots.drop(i)
            self.rows[i] = self.rows[-1]
            self.rows.pop()
        return done
