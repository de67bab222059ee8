"""What a pass says of every token, kept on disk until it is known which rows the page shows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deft_lightning.functional import TokenStats
from deft_lightning.objectives.locked import CONCENTRATED
from deft_lightning.probe.audit import conflict
from deft_lightning.probe.page.codes import WIDTH, Bytes, nats, planes, shares
from deft_lightning.probe.reading import Read
from deft_lightning.probe.tally import candidates

GATE = "gate:"  # begins the name of a column with the gate of an objective
RIGHT, SURE, SUSPECT = 1, 2, 4  # bits of the column `flags`; the last is known once the whole file is


class Column(NamedTuple):
    """A number that every token has.

    Attributes:
        name: ``gate:NAME`` of an objective, else the name of a statistic.
        kind: What its codes mean, a key of :data:`~deft_lightning.probe.page.codes.WIDTH`.
    """

    name: str
    kind: str


class _Place(NamedTuple):
    start: int
    tokens: int
    columns: tuple[Column, ...]


class TokenSpool:
    """Watches a pass; keeps about thirty bytes a token in a file without a name, which is gone with the process.

    Args:
        folder: Where that file is.
        module: SFTModule with its model built: the gate of its objective is kept, and of every other one that a probe
            compares.
    """

    def __init__(self, folder: Path, module: Any) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)
        self._objectives, self._current, _ = candidates(module.current_objective)
        unigram = module.batch_loss.context.unigram  # None where nothing is known of the training labels
        self._unigram = None if unigram is None else unigram.double().cpu()
        self._places: dict[int, _Place] = {}

    @property
    def legends(self) -> dict[str, str]:
        """Return what each objective is, with all its settings, by name."""
        return {name: repr(objective) for name, objective in self._objectives.items()}

    def update(self, read: Read) -> None:
        """Add a batch."""
        stats, counts = read.stats, read.counts
        columns: dict[Column, Bytes] = {
            Column("log_prob", "nats"): nats(_host(-stats.log_prob)),
            Column("conflict", "nats"): nats(_host(conflict(stats))),
            Column("entropy", "nats"): nats(_host(stats.entropy)),
            Column("collision", "share"): shares(_host(stats.collision)),
            Column("flags", "flags"): _flags(stats),
            Column("noise", "flags"): _host(read.codes).astype(np.uint8)[None],
        }
        if stats.arg_max is not None:
            columns[Column("arg_max", "token")] = planes(_host(stats.arg_max), WIDTH["token"])
        if stats.weight is not None:
            columns[Column("weight", "share")] = shares(_host(stats.weight))
        if self._unigram is not None:
            chance = self._unigram[read.labels]
            columns[Column("chance", "nats")] = nats(_host(-chance))
            columns[Column("unprompted", "nats")] = nats(_host(-_without_prompt(read, chance)))
        columns |= {Column(GATE + name, "share"): shares(_host(gate)) for name, gate in self._gates(read)}
        matrix, names, start = np.concatenate(list(columns.values())), tuple(columns), 0
        for at, count in zip(read.positions, counts, strict=True):
            self._places[at] = _Place(self._file.tell(), count, names)
            self._file.write(matrix[:, start : start + count].tobytes())
            start += count

    def _gates(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        wide = {
            k: stats.map(lambda field: field.double() if field.is_floating_point() else field)
            for k, stats in read.by_topk.items()
        }
        for name, objective in self._objectives.items():
            try:
                gate = objective.gate(wide[objective.topk] if objective.topk else next(iter(wide.values())))
            except Exception:
                if name == self._current:
                    raise
                continue  # the report says why: a class that is merely loaded does not stop the pass
            yield name, gate

    def read(self, positions: Sequence[int]) -> dict[Column, Bytes]:
        """Return the codes of the tokens of some examples, one after another.

        Args:
            positions: Of the examples, at least one.

        Returns:
            Of each column that all of them have the codes, shape ``(bytes, N)``.
        """
        places = [self._places[at] for at in positions]
        first, shared = places[0].columns, set.intersection(*(set(place.columns) for place in places))
        parts: dict[Column, list[Bytes]] = {column: [] for column in first if column in shared}
        for place in places:
            height = sum(WIDTH[column.kind] for column in place.columns)
            self._file.seek(place.start)
            content = np.frombuffer(self._file.read(height * place.tokens), np.uint8).reshape(height, place.tokens)
            row = 0
            for column in place.columns:
                if column in parts:
                    parts[column].append(content[row : row + WIDTH[column.kind]])
                row += WIDTH[column.kind]
        self._file.seek(0, 2)
        return {column: np.concatenate(own, axis=1) for column, own in parts.items()}

    def tokens(self, positions: Sequence[int]) -> list[int]:
        """Return how many supervised tokens each of some examples has."""
        return [self._places[at].tokens for at in positions]


def _host(values: Tensor) -> NDArray[Any]:
    return values.detach().cpu().numpy()


def _flags(stats: TokenStats) -> Bytes:
    sure = stats.collision >= CONCENTRATED
    return _host(RIGHT * stats.correct.long() + SURE * sure.long()).astype(np.uint8)[None]


def _without_prompt(read: Read, chance: Tensor) -> Tensor:
    """Return ``log q`` of the labels: what the model says without the prompt, ``log u`` where it has not been asked."""
    parts = []
    for at, frequent in zip(read.positions, chance.split(read.counts), strict=True):
        values = None if read.bare is None else read.bare.of(at)
        parts.append(frequent if values is None else torch.from_numpy(values).to(chance))
    return torch.cat(parts)
