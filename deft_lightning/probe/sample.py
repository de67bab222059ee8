"""A sample of the tokens of a pass, small and always the same, for figures of single tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deft_lightning.figures.tokens import TokenSample
from deft_lightning.functional import TokenStats

SIZE = 4096


class Sampler:
    """Keeps the tokens whose positions hash lowest: every token has the same chance.

    Which they are depends neither on batches nor on their order. Memory is that of the sample and one batch.

    Args:
        topk: How many probabilities each ``topk_entropy`` of the pass covers; 0 is left out.
        size: Tokens to keep at most.
    """

    def __init__(self, topk: Sequence[int], size: int = SIZE) -> None:
        self.topk, self.size, self.seen = [k for k in topk if k], size, 0
        self._hashes = np.zeros(0, np.uint64)
        self._columns: list[NDArray[Any]] = []

    def update(self, by_topk: Mapping[int, TokenStats], keep: Tensor, positions: Sequence[int], codes: Tensor) -> None:
        """Add a batch with one example a row.

        Args:
            by_topk: Statistics of its N supervised tokens on the host, row by row, by what ``topk_entropy`` covers.
            keep: Shape ``(B, T - 1)``: whether the token after each position is supervised.
            positions: Position of each row's example in its split.
            codes: Shape ``(N,)``: noise code of each token.
        """
        rows, columns = (part.numpy() for part in keep.nonzero(as_tuple=True))
        example, token = np.asarray(positions, np.int64)[rows], columns.astype(np.int64) + 1
        stats = next(iter(by_topk.values()))
        fields = [stats.log_prob, stats.entropy, stats.collision, *(by_topk[k].topk_entropy for k in self.topk)]
        arrays: list[NDArray[Any]] = [field.float().numpy() for field in fields if field is not None]
        arrays += [stats.correct.numpy(), codes.numpy().astype(np.int64), example, token]
        self.seen += len(token)
        hashes = mixed(example.astype(np.uint64) << np.uint64(32) | token.astype(np.uint64))
        if not self._columns:
            self._columns = [array[:0] for array in arrays]
        hashes = np.concatenate([self._hashes, hashes])
        lowest = np.argsort(hashes, kind="stable")[: self.size]
        self._hashes = hashes[lowest]
        self._columns = [np.concatenate(pair)[lowest] for pair in zip(self._columns, arrays, strict=True)]

    def sample(self, operations: Sequence[str]) -> TokenSample:
        """Return what was kept, in the order of examples and of the text.

        Args:
            operations: Names of the noise operations, in the order of their codes.
        """
        *_, example, token = self._columns
        order = np.lexsort((token, example))
        log_prob, entropy, collision, *largest, correct, codes, example, token = (c[order] for c in self._columns)
        return TokenSample(
            log_prob=log_prob, entropy=entropy, collision=collision, correct=correct, noise_code=codes,
            topk=np.asarray(self.topk, np.int64), example=example, token=token,
            topk_entropy=np.stack(largest) if largest else np.zeros((0, len(token)), np.float32),
            operations=np.asarray(operations, np.str_), seen=np.asarray(self.seen),
        )  # fmt: skip


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit numbers one to one, so that neighbours end far apart (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
