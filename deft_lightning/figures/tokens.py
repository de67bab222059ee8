"""A sample of tokens as the verb ``probe`` leaves it: ``tokens.npz``."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deft_lightning.atomic import whole_file
from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats

NAME = "tokens.npz"


@dataclass(frozen=True, eq=False)
class TokenSample:
    """Statistics of N tokens, in the order of examples and of the text.

    Attributes:
        log_prob: ``log p`` in nats, shape ``(N,)``.
        entropy: Shannon entropy ``H`` in nats, shape ``(N,)``.
        collision: ``C``, shape ``(N,)``.
        correct: Whether the target is the arg-max, shape ``(N,)``.
        noise_code: 0 for a clean token, otherwise which noise operation hit it, from 1; shape ``(N,)``.
        topk: How many of the largest probabilities each row of ``topk_entropy`` covers, shape ``(K,)``.
        topk_entropy: Their entropy in nats, shape ``(K, N)``; K is 0 where no objective asked for it.
        example: Position of the example in its split, shape ``(N,)``.
        token: Position in the example, shape ``(N,)``.
        operations: Names of the noise operations in the order of their codes, shape ``(O,)``.
        seen: How many tokens the sample was drawn from, shape ``()``.
    """

    log_prob: NDArray[np.float32]
    entropy: NDArray[np.float32]
    collision: NDArray[np.float32]
    correct: NDArray[np.bool_]
    noise_code: NDArray[np.int64]
    topk: NDArray[np.int64]
    topk_entropy: NDArray[np.float32]
    example: NDArray[np.int64]
    token: NDArray[np.int64]
    operations: NDArray[np.str_]
    seen: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.log_prob)

    def stats(self, topk: int = 0) -> TokenStats:
        """Return the statistics for an objective, in float64.

        Args:
            topk: How many probabilities its ``topk_entropy`` covers; 0 for none.

        Raises:
            UserError: The sample does not have that.
        """
        entropy = None
        if topk:
            if topk not in self.topk:
                has = ", ".join(map(str, self.topk.tolist())) or "none"
                raise UserError(
                    f"tokens: the entropy of the {topk} largest probabilities was not computed (there is: {has});"
                    f" probe with --model.objective EAFT --model.objective.k {topk}"
                )
            entropy = torch.from_numpy(self.topk_entropy[self.topk.tolist().index(topk)]).double()
        log_prob, collision, shannon = (
            torch.from_numpy(part).double() for part in (self.log_prob, self.collision, self.entropy)
        )
        return TokenStats(log_prob, collision, shannon, torch.from_numpy(self.correct), entropy)

    def save(self, path: str | Path) -> None:
        """Write the sample; the file appears under its name once it is complete."""
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        with whole_file(Path(path)) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> TokenSample:
        """Read a sample.

        Args:
            path: The file, or the folder of a probe.

        Raises:
            UserError: There is none, or the file is something else.
        """
        file = Path(path) / NAME if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise UserError(f"{file}: there is no sample of tokens; the verb probe writes one into its --output")
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except (ValueError, OSError, KeyError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{file}: is not a sample of tokens as probe writes it ({reason})") from None
