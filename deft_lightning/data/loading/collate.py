"""Batches: right-padded for training, left-padded prompts for generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from deft_lightning.data.encoding.template import Ints

IGNORE = -100


@dataclass(frozen=True, eq=False)
class Prepared:
    """One example ready to train on; every array has shape ``(T,)``.

    Attributes:
        id: Example id.
        input_ids: Tokens.
        labels: What is learnt at each token (aligned with ``input_ids``, not shifted), -100 where nothing is.
        noise_code: 0 where the label is clean, else the place of the corrupting operation, from 1.
        clean_labels: What the labels were before token noise, -100 where the text itself was corrupted; None where no
            token noise was applied.
        skipped: Supervised tokens that truncation cut off before the first of these.
    """

    id: str
    input_ids: Ints
    labels: Ints
    noise_code: Ints
    clean_labels: Ints | None = None
    skipped: int = 0

    def truncate(self, length: int, keep: str = "start") -> Prepared:
        """Return the first ``length`` tokens, or the last; nothing predicts the first token that is left."""
        if len(self.input_ids) <= length:
            return self
        part = slice(0, length) if keep == "start" else slice(len(self.input_ids) - length, None)
        labels = self.labels[part].copy()
        labels[:1] = IGNORE
        codes = np.where(labels == IGNORE, 0, self.noise_code[part])
        skipped = int((self.labels != IGNORE).sum() - (self.labels[part][1:] != IGNORE).sum()) if part.start else 0
        return Prepared(self.id, self.input_ids[part], labels, codes, skipped=skipped)

    @property
    def clean(self) -> Ints:
        """The labels that are right, -100 where none is known."""
        if self.clean_labels is not None:
            return self.clean_labels
        return np.where(self.noise_code == 0, self.labels, IGNORE)


@dataclass(frozen=True)
class Prompt:
    """One example to generate for: the tokens before the last assistant turn, and that turn if it is known.

    Attributes:
        id: Example id.
        input_ids: Tokens.
        text: The same as text.
        gold: The right answer.
        record: What else a benchmark's grader needs, such as options.
    """

    id: str
    input_ids: list[int]
    text: str
    gold: str | None
    record: Mapping[str, Any] = field(default_factory=dict)


def _pad(rows: Sequence[Ints], length: int, value: int, dtype: torch.dtype) -> torch.Tensor:
    out = np.full((len(rows), length), value, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out).to(dtype)


Segments = Prepared | Sequence[Prepared]


@dataclass(frozen=True)
class TrainCollator:
    """Right-pad to the longest row of the batch; a row is an example, or several packed ones.

    The batch has, of shape ``(B, T)``: ``input_ids``, ``attention_mask``, ``labels``, ``clean_labels`` (int64),
    ``noise_code`` (int8) and ``segment`` (int32: place in ``example_id``, -1 for padding); the lists ``example_id``
    (str) and ``is_noisy`` (bool tensor) of its examples in order, and ``num_tokens`` (int, without padding). Packed
    rows have ``position_ids`` that start again with each example in place of the attention mask; padding counts as an
    example of its own.

    Args:
        pad_id: Token that fills rows up.
        packed: Whether rows are packed.
        flatten: Put all rows one after the other into a single one (flash attention knows lengths from positions).
    """

    pad_id: int
    packed: bool = False
    flatten: bool = False

    def __call__(self, rows: Sequence[Segments]) -> dict[str, Any]:
        """Collate rows."""
        parts = [[row] if isinstance(row, Prepared) else list(row) for row in rows]
        if self.flatten:
            parts = [[example for row in parts for example in row]]
        lengths = torch.tensor([sum(len(e.input_ids) for e in row) for row in parts])
        longest, examples = int(lengths.max()), [example for row in parts for example in row]

        def field(name: str, fill: int, dtype: torch.dtype) -> torch.Tensor:
            return _pad([np.concatenate([getattr(e, name) for e in row]) for row in parts], longest, fill, dtype)

        starts = np.cumsum([0, *(len(row) for row in parts)]).tolist()
        segments = [
            np.repeat(np.arange(start, start + len(row)), [len(e.input_ids) for e in row])
            for start, row in zip(starts, parts, strict=False)
        ]
        batch: dict[str, Any] = {
            "input_ids": field("input_ids", self.pad_id, torch.int64),
            "labels": field("labels", IGNORE, torch.int64),
            "clean_labels": field("clean", IGNORE, torch.int64),
            "noise_code": field("noise_code", 0, torch.int8),
            "segment": _pad(segments, longest, -1, torch.int32),
            "example_id": [e.id for e in examples],
            "is_noisy": torch.tensor([bool(e.noise_code.any()) for e in examples]),
            "num_tokens": int(lengths.sum()),
        }
        if self.packed:
            counts = [[len(e.input_ids) for e in row] for row in parts]
            positions = [
                np.concatenate([*map(np.arange, row), np.arange(longest - sum(row))]).astype(np.int64) for row in counts
            ]
            batch["position_ids"] = torch.from_numpy(np.stack(positions))
        else:
            batch["attention_mask"] = (torch.arange(longest) < lengths.unsqueeze(1)).to(torch.int64)
        return batch


@dataclass(frozen=True)
class PromptCollator:
    """Left-pad prompts, so that generation continues each one at the same place.

    The batch has ``input_ids``, ``attention_mask`` ``(B, T)``, and the lists ``example_id``, ``prompt``, ``gold``,
    ``record``.
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
            "record": [prompt.record for prompt in prompts],
        }
