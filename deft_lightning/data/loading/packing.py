"""Which examples share a row, and which rows share a batch: functions of their lengths alone."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack examples into rows of at most ``capacity`` tokens: the longest first, each where it leaves least room.

    Args:
        lengths: Tokens of each example, at most ``capacity``.
        capacity: Tokens of a row.

    Returns:
        Positions of the examples of each row; every example is in exactly one.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room that is left -> rows that have it
    rooms: list[int] = []  # the keys of open_rows, sorted
    for example in order:
        length = int(lengths[example])
        if length > capacity:
            raise ValueError(f"example {example} has {length} tokens, more than a row of {capacity}")
        at = bisect_left(rooms, length)
        if at == len(rooms):
            rows.append([example])
            row, room = len(rows) - 1, capacity
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            rows[row].append(example)
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        if left := room - length:
            if left not in open_rows:
                insort(rooms, left)
            open_rows.setdefault(left, []).append(row)
    return rows


def exact_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Fill one row after the other to the last token: the longest example that fits, until one or two fit exactly.

    Args:
        lengths: Tokens of each example, at most ``capacity``.
        capacity: Tokens of a row.

    Returns:
        Positions of the examples of each row; every example is in exactly one.
    """
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]
    for example in range(len(lengths) - 1, -1, -1):
        waiting[int(lengths[example])].append(example)
    there = np.array([len(examples) for examples in waiting])
    rows: list[list[int]] = []
    left, longest = len(lengths), capacity
    while left:
        row, room = [], capacity
        while room and left:
            for length in _next(there, room, longest):
                row.append(waiting[length].pop())
                there[length] -= 1
                left -= 1
                room -= length
            while longest and not there[longest]:
                longest -= 1
            if not there[: room + 1].any():
                break
        rows.append(row)
    return rows


def _next(there: Counts, room: int, longest: int) -> tuple[int, ...]:
    """Return lengths to put into a row: one or two that fill it, or the longest that fits."""
    if room <= longest and there[room]:
        return (room,)
    # Pairs a + b = room, a <= b; of two equal lengths there have to be two.
    half = room // 2
    low = max(1, room - longest)
    if low <= half:
        short, long = there[low : half + 1], there[room - half : room - low + 1][::-1]
        fits = (short > 0) & (long > 0)
        if room == 2 * half and there[half] < 2:
            fits[-1] = False
        at = int(fits.argmax())
        if fits[at]:
            return (room - low - at, low + at)
    top = min(room, longest)
    return (top - int((there[: top + 1][::-1] > 0).argmax()),)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the fewer rows of :func:`exact_fit` and :func:`best_fit_decreasing`."""
    one, other = exact_fit(lengths, capacity), best_fit_decreasing(lengths, capacity)
    return one if len(one) < len(other) else other


def bounded_batches(lengths: Sequence[int], max_tokens: int, seed: int) -> list[list[int]]:
    """Batch examples of like length, so that rows times the longest row is at most ``max_tokens``.

    Which examples of equal length meet is drawn from ``seed``. An example longer than ``max_tokens`` is a batch alone.

    Args:
        lengths: Tokens of each example.
        max_tokens: Tokens of a batch, padding included.
        seed: Seed of the ties.

    Returns:
        Positions of the examples of each batch; every example is in exactly one.
    """
    ties = np.random.default_rng([seed, len(lengths)]).permutation(len(lengths))
    order = np.lexsort((ties, -np.asarray(lengths, dtype=np.int64))).tolist()
    batches: list[list[int]] = []
    for example in order:
        # The first of a batch is its longest.
        if not batches or (len(batches[-1]) + 1) * int(lengths[batches[-1][0]]) > max_tokens:
            batches.append([])
        batches[-1].append(example)
    return batches


def grouped(order: np.ndarray, lengths: Sequence[int], group: int, seed: Sequence[int]) -> np.ndarray:
    """Rearrange an order so that neighbours are of like length: groups of ``group`` within windows of fifty groups.

    It stays a function of the order and the seed alone; ranks and batch size do not enter.
    """
    sizes = np.asarray(lengths)
    window = 50 * group
    groups: list[np.ndarray] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(-sizes[part], kind="stable")]
        groups += [part[i : i + group] for i in range(0, len(part), group)]
    shuffled = np.random.default_rng(list(seed)).permutation(len(groups))
    return np.concatenate([groups[i] for i in shuffled]) if groups else order
