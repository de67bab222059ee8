"""Keys and values of many rows in tensors that are written in place: rows come and go, and nothing else is copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

AHEAD = 128  # columns made beyond those in use, at least: a move of all rows each so many tokens costs little


class Store(DynamicLayer):
    """Keys and values of one layer: tensors ``(rows, heads, room, size)``, of which a window is in use.

    To a model it is a layer that holds the window: what it adds is written behind it. The mask of a sliding window is
    the model's; the layer keeps what lies before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Tensor] = []  # keys and values, whole
        self.rows, self.start, self.end = 0, 0, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one token of each row behind the window; return keys and values of window and token."""
        for whole, new in zip(self.held, (key_states, value_states), strict=True):
            whole[: self.rows, :, self.end] = new[:, :, 0]
        keys, values = (whole[: self.rows, :, self.start : self.end + 1] for whole in self.held)
        return keys, values

    def get_seq_length(self) -> int:
        """Return the columns of the window."""
        return self.end - self.start


class Slots:
    """Cache of rows that all end at the same column, each with its tokens right before it: left padding.

    Args:
        rows: Most rows at a time.

    Attributes:
        lengths: Tokens of each row that is held.
        cache: What a model is given as its cache, of as many rows.
    """

    def __init__(self, rows: int) -> None:
        self.capacity = rows
        self.lengths: list[int] = []
        self.cache = Cache(layers=[])
        self._end = self._room = 0

    @property
    def width(self) -> int:
        """Return the tokens of the longest row."""
        return max(self.lengths, default=0)

    def add(self, prefilled: Cache, lengths: Sequence[int], repeats: int) -> None:
        """Add rows that a model has read as a left-padded batch.

        Args:
            prefilled: Keys and values of the batch, all columns of it.
            lengths: Tokens of each of its rows.
            repeats: How often each is added.
        """
        sources = [(layer.keys, layer.values) for layer in prefilled.layers]
        if not self.cache.layers:
            self.cache.layers.extend(Store() for _ in sources)
        self._make_room(max(max(lengths), self.width))
        for layer, pair in zip(self.cache.layers, sources, strict=True):
            if not layer.held:
                layer.held = [new.new_zeros(self.capacity, new.shape[1], self._room, new.shape[3]) for new in pair]
                layer.is_initialized = True
            for whole, new in zip(layer.held, pair, strict=True):
                at = len(self.lengths)
                for i, length in enumerate(lengths):
                    whole[at : at + repeats, :, : self._end - length] = 0  # masked, and 0 times NaN is NaN
                    whole[at : at + repeats, :, self._end - length : self._end] = new[i, :, new.shape[2] - length :]
                    at += repeats
        self.lengths += [length for length in lengths for _ in range(repeats)]

    def drop(self, row: int) -> None:
        """Drop a row; the last one takes its number."""
        last, length = len(self.lengths) - 1, self.lengths[-1]
        if row != last:
            for layer in self.cache.layers:
                for whole in layer.held:
                    whole[row, :, : self._end - length] = 0
                    whole[row, :, self._end - length : self._end] = whole[last, :, self._end - length : self._end]
            self.lengths[row] = length
        self.lengths.pop()

    def open(self) -> None:
        """Ready the cache for one more token of each row."""
        if self._end == self._room:
            self._make_room(self.width, more=1)
        for layer in self.cache.layers:
            layer.rows, layer.start, layer.end = len(self.lengths), self._end - self.width, self._end

    def close(self) -> None:
        """Count the token that the model has added to each row."""
        self._end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def _make_room(self, end: int, more: int = 0) -> None:
        """Let rows end at a column that is at least ``end``, with ``more`` behind it; what is in use moves along."""
        if self._end >= end and self._end + more <= self._room:
            return
        width, old = self.width, self._end
        needed = end + max(more, AHEAD)
        grown = needed > self._room
        if grown:
            self._room = max(needed, self._room * 3 // 2)
        for layer in self.cache.layers:
            for i, whole in enumerate(layer.held):
                window = whole[: len(self.lengths), :, old - width : old]
                window = window if grown else window.clone()  # it may lie over where it goes
                if grown:
                    layer.held[i] = whole = whole.new_zeros(*whole.shape[:2], self._room, whole.shape[3])
                whole[: len(self.lengths), :, end - width : end] = window
        self._end = end


def empty_cache() -> Cache:
    """Return a cache that keeps all columns of every layer, those of sliding windows included."""
    return Cache(layer_class_to_replicate=DynamicLayer)


def left_padded(rows: Sequence[Sequence[int]], fill: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids, attention mask and positions of rows, int64, shape ``(rows, longest)`` each."""
    width = max(map(len, rows))
    ids = torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = mask_of(lengths, width)
    return ids, mask, (mask.cumsum(1) - 1).clamp_(min=0)


def mask_of(lengths: Tensor, width: int) -> Tensor:
    """Return the attention mask of left-padded rows, int64, shape ``(rows, width)``."""
    columns = torch.arange(width, device=lengths.device)
    return (columns >= width - lengths.unsqueeze(1)).to(torch.int64)
