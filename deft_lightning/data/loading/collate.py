"""Batches: right-padded for training, left-padded prompts for generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deft_lightning.data.examples import Floats, Ints, Prepared, Prompt, Unprompted, weight_of
from deft_lightning.functional import IGNORE_INDEX

# From this length on rows are copied one by one: a slice of numpy is faster than its mask then.
LONG = 512


class _Places:
    """Where the tokens of rows stand in a right-padded batch.

    Args:
        lengths: Of the rows, shape ``(B,)``.
        longest: T, of the batch.

    Attributes:
        there: Whether a token stands there, shape ``(B, T)``.
    """

    def __init__(self, lengths: NDArray[np.int64], longest: int) -> None:
        self._ends = np.cumsum(lengths).tolist()
        self.there = np.arange(longest) < lengths[:, np.newaxis]

    def fill(self, values: Ints | Floats, value: int, dtype: type[np.generic] = np.int64) -> torch.Tensor:
        """Return a tensor with these values where tokens stand, in order, and ``value`` elsewhere."""
        out: NDArray[Any] = np.full(self.there.shape, value, dtype=dtype)
        if out.shape[1] < LONG:
            out[self.there] = values
        else:
            start = 0
            for row, end in zip(out, self._ends, strict=True):
                row[: end - start] = values[start:end]
                start = end
        return torch.from_numpy(out)


def _pad(rows: Sequence[Ints], longest: int, value: int) -> torch.Tensor:
    return _Places(np.array([len(row) for row in rows]), longest).fill(np.concatenate(rows), value)


Segments = Prepared | Sequence[Prepared]


@dataclass(frozen=True)
class TrainCollator:
    """Right-pad to the longest row of the batch; a row is an example, or several packed ones.

    The batch has, of shape ``(B, T)``: ``input_ids``, ``attention_mask``, ``labels``, ``clean_labels`` (int64),
    ``noise_code`` (int8) and ``segment`` (int32: place in ``example_id``, -1 for padding); ``supervised_at`` (int64,
    ``(N,)``: the places of the N labels that count, among all ``B * T``, in order); the lists ``example_id`` (str) and
    ``is_noisy`` (bool tensor) of its examples in order, and ``num_tokens`` (int, without padding). Packed
    rows have ``position_ids`` that start again with each example in place of the attention mask; padding counts as an
    example of its own. With ``weighted``, ``token_weight`` (float32) is the factor on the loss of each label, 1 for
    those of examples without weights, 0 where nothing is learnt and for padding. With ``sources``, ``source`` (int64,
    shape ``(examples,)``) is the place of each example of ``example_id`` in ``source_names``. Where somebody asks
    what a model says of answers without their prompts, there is also what :func:`unprompted_fields` gives, and
    ``unprompted_at`` (bool, ``(B, T)``), the places of its labels among those of the batch.

    Args:
        pad_id: Token that fills rows up.
        packed: Whether rows are packed.
        flatten: Put all rows one after the other into a single one (flash attention knows lengths from positions).
        weighted: Whether any example of the data has weights, in this batch or another.
        sources: Names of the sources of the data, if figures are told apart by them.
    """

    pad_id: int
    packed: bool = False
    flatten: bool = False
    weighted: bool = False
    sources: tuple[str, ...] = ()

    def __call__(self, rows: Sequence[Segments]) -> dict[str, Any]:
        """Collate rows."""
        parts = [[row] if isinstance(row, Prepared) else list(row) for row in rows]
        if self.flatten:
            parts = [[example for row in parts for example in row]]
        lengths = np.array([sum(len(e.input_ids) for e in row) for row in parts])
        longest, examples = int(lengths.max()), [example for row in parts for example in row]
        # Examples stand in rows one after another: what all of them have, end to end, fills the places that are there.
        places = _Places(lengths, longest)

        def field(name: str, fill: int) -> torch.Tensor:
            return places.fill(np.concatenate([getattr(e, name) for e in examples]), fill)

        segments = np.repeat(np.arange(len(examples)), [len(e.input_ids) for e in examples])
        codes = np.concatenate([e.noise_code for e in examples])
        batch: dict[str, Any] = {
            "input_ids": field("input_ids", self.pad_id),
            "labels": field("labels", IGNORE_INDEX),
            "clean_labels": field("clean", IGNORE_INDEX),
            "noise_code": places.fill(codes, 0, np.int8),
            "segment": places.fill(segments, -1, np.int32),
            "example_id": [e.id for e in examples],
            "is_noisy": torch.from_numpy(np.bincount(segments, codes != 0, len(examples)) > 0),
            "num_tokens": int(lengths.sum()),
        }
        batch["supervised_at"] = supervised_at(batch["labels"])
        if self.weighted:
            weights = np.concatenate([weight_of(e.labels, e.weight) for e in examples])
            batch["token_weight"] = places.fill(weights, 0, np.float32)
        answers = [e.unprompted for e in examples if e.unprompted is not None]
        if answers:
            batch |= unprompted_fields(answers, self.pad_id)
            batch["unprompted_at"] = places.fill(np.concatenate([_read(e) for e in examples]), 0, np.bool_)
        if self.sources:
            batch |= {"source": torch.tensor([e.source for e in examples]), "source_names": self.sources}
        if self.packed:
            counts = [[len(e.input_ids) for e in row] for row in parts]
            positions = [
                np.concatenate([*map(np.arange, row), np.arange(longest - sum(row))]).astype(np.int64) for row in counts
            ]
            batch["position_ids"] = torch.from_numpy(np.stack(positions))
        else:
            batch["attention_mask"] = torch.from_numpy(places.there.astype(np.int64))
        return batch


def supervised_at(labels: torch.Tensor) -> torch.Tensor:
    """Return where labels count, shape ``(N,)``, among all ``B * T``: the first of a row has nothing before it.

    Found with the batch: a device that looked for them in its step would be waited for.

    Args:
        labels: Shape ``(B, T)``.
    """
    rows, columns = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return rows * labels.shape[1] + columns + 1


def _read(example: Prepared) -> Ints:
    """Return 1 where the label of an example is one of its answer without the prompt; shape ``(T,)``."""
    learnt = example.labels != IGNORE_INDEX
    count = 0 if example.unprompted is None else int((example.unprompted.labels != IGNORE_INDEX).sum())
    return (learnt & (np.cumsum(learnt) <= count)).astype(np.int64)


def unprompted_fields(answers: Sequence[Unprompted], pad_id: int) -> dict[str, Any]:
    """Return what a model needs to read the answers of a batch without their prompts.

    Args:
        answers: Of all its examples, in order.
        pad_id: Token that fills rows up.

    Returns:
        ``unprompted_ids`` and ``unprompted_labels`` (int64, ``(examples, S)``), right-padded;
        ``unprompted_supervised_at`` (int64), the places of the labels that count among all of them, in order;
        ``ahead_ids`` (int64, ``(K, P)``), the rows in front of them, of which the first ``frame`` (int) tokens are the
        frame of all prompts; ``ahead`` (int64, ``(examples,)``), which of these stands in front of each; ``has_prompt``
        (bool, ``(examples,)``), whether an example has one that could be left out.
    """
    longest = max(2, *(len(answer.input_ids) for answer in answers))
    rows = {answer.key: answer.ahead for answer in answers}
    places = {key: place for place, key in enumerate(rows)}
    labels = _pad([answer.labels for answer in answers], longest, IGNORE_INDEX)
    return {
        "unprompted_ids": _pad([answer.input_ids for answer in answers], longest, pad_id),
        "unprompted_labels": labels,
        "unprompted_supervised_at": supervised_at(labels),
        "ahead_ids": torch.from_numpy(np.stack(list(rows.values()))),
        "ahead": torch.tensor([places[answer.key] for answer in answers]),
        "has_prompt": torch.tensor([len(answer.input_ids) > 0 for answer in answers]),
        "frame": answers[0].frame,
    }


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
            "input_ids": _pad(flipped, longest, self.pad_id).flip(1),
            "attention_mask": _pad(mask, longest, 0).flip(1),
            "example_id": [prompt.id for prompt in prompts],
            "prompt": [prompt.text for prompt in prompts],
            "gold": [prompt.gold for prompt in prompts],
            "record": [prompt.record for prompt in prompts],
        }
