"""Numbers of tokens as the page holds them: one byte for a gate or a probability, two for nats."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deft_lightning.objectives.locked import SHUT

Bytes = NDArray[np.uint8]

# Codes 0 to 230 lie in [0, 1], closest at its ends: a gate of 1e-4 is not 0, and one of 0.999 is not 1. Those above
# are up to 100, each a fifth larger than the one before: gates of Rescaled and weights.
UNIT, LARGEST = 230, 100.0
NATS = 1000  # codes for a nat
WIDTH = {"share": 1, "nats": 2, "flags": 1, "token": 3}  # bytes of a code


def _levels() -> NDArray[np.float64]:
    inside = np.arange(UNIT + 1) / UNIT
    above = LARGEST ** (np.arange(1, 256 - UNIT) / (255 - UNIT))
    levels = np.concatenate([inside**2 * (3 - 2 * inside), above])
    levels[np.searchsorted(levels, SHUT)] = 0.1  # where Floored is as shut as it gets
    return levels


LEVELS = _levels()  # what a code means, shape (256,)
SHUT_CODE = int(np.searchsorted(LEVELS, SHUT))  # a gate is nearly shut exactly where its code is below
_EDGES = (LEVELS[1:] + LEVELS[:-1]) / 2
_EDGES[SHUT_CODE - 1] = SHUT


def shares(values: NDArray[np.floating]) -> Bytes:
    """Return the codes of gates, probabilities or weights.

    Args:
        values: Shape ``(N,)``, from 0; what is below counts as 0, above 100 as 100, and what is not a number as 0.

    Returns:
        Shape ``(1, N)``; in [0, 1] a code is off by at most 0.0042.
    """
    finite = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=LARGEST, neginf=0.0)
    return np.searchsorted(_EDGES, finite, side="right").astype(np.uint8)[None]


def nats(values: NDArray[np.floating]) -> Bytes:
    """Return the codes of amounts in nats, in thousandths.

    Args:
        values: Shape ``(N,)``, clipped to [0, 65.535]; what is not a number counts as 65.535.

    Returns:
        Shape ``(2, N)``, the low byte first.
    """
    capped = np.nan_to_num(values.astype(np.float64), nan=65.535, posinf=65.535).clip(0, 65.535)
    return planes(np.rint(capped * NATS).astype(np.int64), 2)


def planes(numbers: NDArray[np.int64], width: int) -> Bytes:
    """Return whole numbers from 0 as bytes, the lowest first, each in a plane of its own: they compress better so.

    Args:
        numbers: Shape ``(N,)``, below ``256^width``.
        width: Bytes of a number.

    Returns:
        Shape ``(width, N)``.
    """
    return np.stack([(numbers >> 8 * place & 255).astype(np.uint8) for place in range(width)])


def whole(codes: Bytes) -> NDArray[np.int64]:
    """Return the numbers of planes, shape ``(N,)``; the inverse of :func:`planes`."""
    numbers = np.zeros(codes.shape[1], np.int64)
    for place, plane in enumerate(codes):
        numbers |= plane.astype(np.int64) << 8 * place
    return numbers
