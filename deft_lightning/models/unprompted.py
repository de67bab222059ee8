"""What a model says of answers without their prompts, behind a few other answers that it reads once for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from deft_lightning.annotations import Batch, CausalLM
from deft_lightning.functional import IGNORE_INDEX, TokenStats, supervised_stats
from deft_lightning.models.checks import evaluating
from deft_lightning.models.fused import fused_forward, hidden_states
from deft_lightning.models.head import HeadSeam, base_causal_lm

CACHES = ("cache", "past_key_values")  # how a forward calls its keys and values: it changed within transformers 5


class UnpromptedReader:
    """Reads answers without their prompts, as a model is now: without gradient and without dropout.

    It calls the model as often on every rank, whatever the batch.

    Args:
        model: The model, as trained.
        seam: Its head, where that is fused; None for the model's own.

    Attributes:
        alone: Whether the frame of all prompts alone stands in front of each answer; None until that is settled.
        once: Whether what stands in front is read once a batch, and its keys and values are kept; else it is read
            again before every answer. None until that is settled.
    """

    def __init__(self, model: CausalLM, seam: HeadSeam | None) -> None:
        self.model, self.seam = model, seam
        self.alone: bool | None = None
        self.once: bool | None = None

    def settle(self, batches: Sequence[Batch], agreed: Callable[[bool], bool] = bool) -> None:
        """Find out how to read, unless it is known.

        Reading once has to give what reading everything anew gives. Others stand in front unless the model finds the
        answers more probable without: one from scratch has seen single rows alone, and makes nothing of others.

        Args:
            batches: Some answers, as :meth:`read` takes them.
            agreed: Makes one verdict of those of all ranks.
        """
        batches = [batch for batch in batches if batch["ahead_ids"].shape[1]]
        others = any(batch["ahead_ids"].shape[1] > batch["frame"] for batch in batches)
        if self.once is None:
            self.once = agreed(not batches or self._same(batches[0]))
        if self.alone is None:
            self.alone = agreed(not others or self._sum(batches, True) > self._sum(batches, False))

    def __call__(self, batch: Batch) -> Tensor:
        """Return ``log q`` of all labels of a batch's answers in order, shape ``(N,)``, in nats.

        Args:
            batch: Has what :func:`~deft_lightning.data.loading.collate.unprompted_fields` gives.
        """
        assert self.alone is not None and self.once is not None
        return self.read(batch, self.alone, self.once)

    @torch.no_grad()
    def read(self, batch: Batch, alone: bool, once: bool) -> Tensor:
        """Return the same, read in one of the ways."""
        ids, labels = batch["unprompted_ids"], batch["unprompted_labels"]
        places = batch.get("unprompted_supervised_at")
        ahead: Tensor = batch["ahead_ids"][:, : batch["frame"] if alone else None]
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        with _casts_of_its_own(ids.device), evaluating(self.model):
            if ahead.shape[1] and once:
                inputs |= self._in_front(ahead, batch["ahead"])
            elif ahead.shape[1]:
                inputs["input_ids"] = torch.cat([ahead[batch["ahead"]], ids], dim=1)
                labels = pad(labels, (ahead.shape[1], 0), value=IGNORE_INDEX)
                places = None if places is None else places + (places // ids.shape[1] + 1) * ahead.shape[1]
            targets = pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
            if self.seam is not None:
                index = None if places is None else places - 1
                return fused_forward(self.model, self.seam, inputs, targets, _nll, index=index).stats.log_prob
            return supervised_stats(self.model(**inputs).logits, targets).log_prob

    def _in_front(self, ahead: Tensor, places: Tensor) -> dict[str, Any]:
        """Return keywords that put rows in front of answers.

        Args:
            ahead: The rows, shape ``(K, P)``.
            places: Which of them stands in front of each answer, shape ``(E,)``.
        """
        from transformers import DynamicCache

        cache = DynamicCache(config=base_causal_lm(self.model).config)
        kept = {str(self._cache_name()): cache, "use_cache": True}
        inputs = {"input_ids": ahead, **kept}
        if self.seam is None:
            self.model(**inputs)
        else:
            hidden_states(self.model, self.seam, inputs)
        cache.batch_select_indices(places)
        return kept

    def _cache_name(self) -> str | None:
        """Return what the model calls its keys and values; None where it keeps something else.

        A recurrent model keeps a state. Compiled layers would be compiled anew for each length of what is kept.
        """
        causal = base_causal_lm(self.model)
        compiled = any(module._compiled_call_impl is not None for module in self.model.modules())
        if compiled or getattr(causal, "_is_stateful", False):
            return None
        known = inspect.signature(type(causal).forward).parameters
        return next((name for name in CACHES if name in known), None)

    def _same(self, batch: Batch) -> bool:
        """Return whether reading once gives what reading everything anew gives, up to rounding."""
        if self._cache_name() is None:
            return False
        kept, anew = (self.read(batch, False, once).double() for once in (True, False))
        low = self.model.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(anew.device.type)
        if not len(anew):
            return True
        return float((kept - anew).abs().mean()) <= (2e-2 if low else 1e-4) * max(1.0, float(anew.abs().mean()))

    def _sum(self, batches: Sequence[Batch], alone: bool) -> float:
        return sum(float(self.read(batch, alone, bool(self.once)).double().sum()) for batch in batches)


def _nll(stats: TokenStats) -> Tensor:
    return -stats.log_prob


@contextmanager
def _casts_of_its_own(device: torch.device) -> Iterator[None]:
    """Keep autocast from keeping weights that were cast without gradient for the training that follows."""
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    with torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False):
        yield
