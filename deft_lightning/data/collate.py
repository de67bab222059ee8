"""Batches: right-padded for training, left-padded prompts for generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deft_lightning.data.template import Ints

IGNORE = -100


@dataclass(frozen=True, eq=False)
class Prepared:
    """One example ready to train on; every array has shape ``(T,)``.

    Attributes:
        id: Example id.
        input_ids: Tokens.
        labels: What is learnt at each token (aligned with ``input_ids``, not shifted), -100 where nothing is.
        noise_code: 0 where the label is clean, else the place of the corrupting operation, from 1.
    """

    id: str
    input_ids: Ints
    labels: Ints
    noise_code: Ints

    def truncate(self, length: int) -> Prepared:
        """Return the first ``length`` tokens."""
        return Prepared(self.id, self.input_ids[:length], self.labels[:length], self.noise_code[:length])


@dataclass(frozen=True)
class Prompt:
    """One example to generate for: the tokens before the last assistant turn, and that turn if it is known."""

    id: str
    input_ids: list[int]
    text: str
    gold: str | None


def _pad(rows: Sequence[Ints], length: int, value: int, dtype: torch.dtype) -> torch.Tensor:
    out = np.full((len(rows), length), value, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out).to(dtype)


@dataclass(frozen=True)
class TrainCollator:
    """Right-pad to the longest example of the batch.

    The batch has ``input_ids``, ``attention_mask``, ``labels`` (int64), ``noise_code`` (int8), all ``(B, T)``,
    ``example_id`` (list of str) and ``num_tokens`` (int: tokens that are not padding).
    """

    pad_id: int

    def __call__(self, examples: Sequence[Prepared]) -> dict[str, Any]:
        """Collate examples."""
        lengths = torch.tensor([len(example.input_ids) for example in examples])
        longest = int(lengths.max())
        return {
            "input_ids": _pad([e.input_ids for e in examples], longest, self.pad_id, torch.int64),
            "attention_mask": (torch.arange(longest) < lengths.unsqueeze(1)).to(torch.int64),
            "labels": _pad([e.labels for e in examples], longest, IGNORE, torch.int64),
            "noise_code": _pad([e.noise_code for e in examples], longest, 0, torch.int8),
            "example_id": [e.id for e in examples],
            "num_tokens": int(lengths.sum()),
        }


@dataclass(frozen=True)
class PromptCollator:
    """Left-pad prompts, so that generation continues each one at the same place.

    The batch has ``input_ids``, ``attention_mask`` ``(B, T)``, and the lists ``example_id``, ``prompt``, ``gold``.
    """

    pad_id: int

    def __call__(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Collate prompts."""
        longest = max(len(prompt.input_ids) for prompt in prompts)
        flipped = [np.array(prompt.input_ids[::-1], dtype=np.int64) for prompt in prompts]
        mask = [np.ones(len(prompt.input_ids), dtype=np.int64) for prompt in prompts]
        return {
            "input_ids": _pad(flipped, longest, self.pad_id, torch.int64).flip(1),
            "attention_mask": _pad(mask, longest, 0, torch.int64).flip(1),
            "example_id": [prompt.id for prompt in prompts],
            "prompt": [prompt.text for prompt in prompts],
            "gold": [prompt.gold for prompt in prompts],
        }
