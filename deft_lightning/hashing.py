"""Draws that depend on their key alone: the same on every machine, in every process and order."""

from __future__ import annotations

import hashlib

import numpy as np


def key(*parts: object) -> int:
    """Return a 128-bit key of the parts."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(), "little")


def uniform(*parts: object) -> float:
    """Return a number in ``[0, 1)``, a multiple of ``2^-53``, drawn by hashing the parts."""
    return (key(*parts) >> 75) / 2**53


def stream(*parts: object) -> np.random.Generator:
    """Return a counter-based generator keyed by the parts."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))
