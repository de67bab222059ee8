"""The numbers of a page: columns of tokens, packed so that they compress well, and the words models would say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from deft_lightning.annotations import JsonObject
from deft_lightning.objectives import Contaminated, NoiseRates
from deft_lightning.probe.audit import Suspect
from deft_lightning.probe.page.codes import NATS, Bytes, planes, shares, whole
from deft_lightning.probe.page.posterior import contaminated_gate
from deft_lightning.probe.page.spool import GATE, RIGHT, SUSPECT, TokenSpool
from deft_lightning.terminal import visible

OF_DATA = ("noise", "weight", "chance")  # the same whatever the model
WORDS = 65_535  # first choices that have a number


class Look(NamedTuple):
    """What one model says of the rows.

    Attributes:
        report: Of the probe.
        suspects: Every example, the most suspicious first.
        spool: The numbers of its tokens.
    """

    report: JsonObject
    suspects: Sequence[Suspect]
    spool: TokenSpool


class Numbers:
    """Columns of tokens one after another; two that are the same are there once.

    Args:
        positions: The examples whose tokens they are, in order.

    Attributes:
        words: Tokens that models would say, by number from 1.
        shared: Columns of the data, whatever the model.
    """

    def __init__(self, positions: Sequence[int]) -> None:
        self.positions = positions
        self.words: list[int] = []
        self.shared: dict[str, JsonObject] = {}
        self._number: dict[int, int] = {}
        self._parts: list[bytes] = []
        self._places: dict[bytes, int] = {}
        self._size = 0

    def add(self, kind: str, codes: Bytes, order: NDArray[np.int64] | None = None) -> JsonObject:
        """Add a column and return where it is, and what its codes mean.

        Args:
            kind: ``share``, ``nats``, or another word for whole numbers.
            codes: Shape ``(bytes, N)``.
            order: In which the tokens are written, shape ``(N,)``; that of the text by default.
        """
        content = (codes if order is None else codes[:, order]).tobytes()
        if content not in self._places:
            self._places[content] = self._size
            self._parts.append(content)
            self._size += len(content)
        return {"at": self._places[content], "kind": kind, "width": len(codes), "sorted": order is not None}

    def content(self) -> bytes:
        """Return all columns."""
        return b"".join(self._parts)

    def model(self, look: Look) -> JsonObject:
        """Add the columns of a model, and return its name and where they are, the chosen objective first."""
        report, columns = look.report, look.spool.read(self.positions)
        flags = next(column for column in columns if column.name == "flags")
        columns[flags] = self._with_suspicious(look, columns[flags])
        named = {column.name: codes for column, codes in columns.items()}
        gates = {column.name.removeprefix(GATE): codes for column, codes in columns.items() if column.name[:5] == GATE}
        chosen, about = next(row["name"] for row in report["objectives"] if row["chosen"]), look.spool.legends
        if (estimated := _contaminated(look, self.positions, named, gates)) is not None:
            gates["Contaminated"], about["Contaminated"] = estimated
        order = alike(named)
        for name in OF_DATA:
            if name in named and name not in self.shared:
                self.shared[name] = self.add(
                    "nats" if name == "chance" else "share" if name == "weight" else "", named[name]
                )
        own = {
            column.name: self.add(column.kind, codes, None if column.name in ("log_prob", "collision") else order)
            for column, codes in columns.items()
            if column.name not in (*OF_DATA, "arg_max") and column.name[:5] != GATE
        }
        if "arg_max" in named:
            said = self._said(whole(named["arg_max"]), named["flags"][0] & RIGHT == 0)
            own["said"] = self.add("word", said, order)
        path = str(report["checkpoint"] or report["model"])
        return {
            "name": visible(f"checkpoint {_short(path)}" if report["checkpoint"] else path), "path": visible(path),
            "chosen": visible(chosen), "columns": own,
            "objectives": [
                {"name": visible(name), "about": visible(about[name]), **self.add("share", gates[name], order)}
                for name in sorted(gates, key=lambda name: (name != chosen, name))
            ],
        }  # fmt: skip

    def _with_suspicious(self, look: Look, flags: Bytes) -> Bytes:
        """Return flags with a bit for the tokens that the audit finds suspicious: its score has seen the whole file."""
        flags, by_position, start = flags.copy(), {suspect.at: suspect for suspect in look.suspects}, 0
        for at, count in zip(self.positions, look.spool.tokens(self.positions), strict=True):
            flags[0, start + by_position[at].learnt] |= SUSPECT
            start += count
        return flags

    def _said(self, arg_max: NDArray[np.int64], other: NDArray[np.bool_]) -> Bytes:
        """Return the numbers of first choices where they are another token than the label, 0 elsewhere."""
        numbers = np.zeros(len(arg_max), np.int64)
        distinct, inverse = np.unique(arg_max[other], return_inverse=True)
        for token in distinct.tolist():
            if token not in self._number and len(self.words) < WORDS:
                self.words.append(token)
                self._number[token] = len(self.words)
        table = np.array([self._number.get(token, 0) for token in distinct.tolist()], np.int64)
        if len(distinct):
            numbers[other] = table[inverse]
        return planes(numbers, 2)


def _short(path: str) -> str:
    """Return run and step of a checkpoint: ``version_0/step=100.ckpt``."""
    return "/".join([part for part in Path(path).parts if part != "checkpoints"][-2:])


def alike(named: Mapping[str, Bytes]) -> NDArray[np.int64]:
    """Return the tokens in an order that puts those of like p and C together, shape ``(N,)``.

    Most gates are functions of these two: in this order they hardly change from token to token, and take half the room
    when compressed. The script of the page has the two in the order of the text, and finds the order again.
    """
    return np.argsort(
        np.sqrt(whole(named["log_prob"])).astype(np.int64) << 8 | whole(named["collision"]), kind="stable"
    )


def _contaminated(
    look: Look, positions: Sequence[int], named: Mapping[str, Bytes], gates: Mapping[str, Any]
) -> tuple[Bytes, str] | None:
    """Return the gate of Contaminated and its rates; None where it is chosen already, or nothing is known of chance."""
    estimate = look.report.get("noise_estimate")
    if estimate is None or "chance" not in named or any(name.startswith("Contaminated") for name in gates):
        return None
    if estimate["reliable"]:
        rates, about = NoiseRates(estimate["answers"], estimate["tokens"]), "noise rates estimated by the probe"
    else:
        rates, about = Contaminated().rates, "the noise rates it starts with, since none could be estimated"
    log_prob, chance, unprompted = (
        torch.from_numpy(whole(named[name]) / -NATS) for name in ("log_prob", "chance", "unprompted")
    )
    example = torch.arange(len(positions)).repeat_interleave(torch.tensor(look.spool.tokens(positions)))
    gate = contaminated_gate(log_prob, chance, unprompted, example, rates)
    return shares(gate.numpy()), f"{about}: {rates.answers:.2g} of answers, {rates.tokens:.2g} of tokens"
