"""Sums over the tokens of a pass: what every objective would do to them, and how noise shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deft_lightning.annotations import JsonObject
from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.metrics import Histogram, PackedHistogram, binned_auroc
from deft_lightning.objectives import BySource, Objective, known_objectives
from deft_lightning.probe.audit import conflict

FINE, COARSE = 65536, 40  # bins for ranks, bins to be drawn


def candidates(current: Objective) -> tuple[dict[str, Objective], str, dict[str, str]]:
    """Return every known objective to compare, without those that depend on the course of training.

    Returns:
        Objectives by name: with the defaults the name of the class, the chosen one its legend if it departs from them.
        The name of the chosen one. Why some are left out, by name.
    """
    objectives: dict[str, Objective] = {}
    skipped: dict[str, str] = {}
    for name, cls in known_objectives().items():
        try:
            objective = cls()
        except (TypeError, ValueError) as error:  # a user's own may need arguments
            skipped[name] = " ".join(str(error).split())
        else:
            # Without a run those that depend on it are one of the others, and without sources BySource is.
            if objective.scheduled or objective.tracks is not None or isinstance(objective, BySource):
                continue
            objectives[name] = objective
    kind = type(current).__name__
    name = kind if objectives.get(kind) == current else repr(current)
    objectives[name] = current
    return objectives, name, skipped


class Tally:
    """Sums of what each objective does to the tokens of a pass, in float64.

    Args:
        objectives: By name, the chosen one among them.
        current: Name of the chosen one.
        operations: Names of the noise operations, in the order of their codes.
    """

    def __init__(self, objectives: Mapping[str, Objective], current: str, operations: Sequence[str]) -> None:
        self.objectives, self.current, self.operations = dict(objectives), current, list(operations)
        self.failed: dict[str, str] = {}
        self._means = torch.zeros(7, dtype=torch.float64)
        self._mass = 0.0
        # Of each objective: gate, its square, gate * (1 - p), gate of clean tokens, gate of noisy ones. The gradient
        # mass, (1 - p) with the gate or without, is times the weight where tokens have one.
        self._gates = {name: torch.zeros(5, dtype=torch.float64) for name in objectives}
        self._noisy = 0
        groups = 1 + len(self.operations)
        self._ranks = PackedHistogram([(-1.0, 1.0)] * (3 * groups), FINE)
        self._gate_of = torch.zeros(groups, dtype=torch.float64)
        self._shapes = PackedHistogram([(0.0, 1.0)] * 4, COARSE)

    @property
    def topks(self) -> list[int]:
        """Return how many of the largest probabilities the objectives ask for, each number once; [0] if none does."""
        return sorted({objective.topk for objective in self.objectives.values()} - {0}) or [0]

    @property
    def tokens(self) -> int:
        """Return the number of tokens seen."""
        return int(self._means[0])

    def update(self, by_topk: Mapping[int, TokenStats], codes: Tensor) -> None:
        """Add a batch.

        Args:
            by_topk: Statistics of its N tokens on the host, by how many probabilities their ``topk_entropy`` covers.
            codes: Shape ``(N,)``, noise code of each token.
        """
        wide = {k: stats.map(lambda x: x.double() if x.is_floating_point() else x) for k, stats in by_topk.items()}
        stats = next(iter(wide.values()))
        if not len(stats.log_prob):
            return
        p, error, noisy = stats.log_prob.exp(), -torch.expm1(stats.log_prob), codes > 0
        mass = error if stats.weight is None else error * stats.weight
        self._mass += float(mass.sum())
        parts = (torch.ones_like(p), p, stats.entropy, -stats.collision.log(), stats.collision, -stats.log_prob)
        self._means += torch.stack([*(part.sum() for part in parts), stats.correct.double().sum()])
        self._noisy += int(noisy.sum())
        for row, values in enumerate((p[~noisy], p[noisy], stats.collision[~noisy], stats.collision[noisy])):
            self._shapes.update(row, values)
        for name, objective in list(self.objectives.items()):
            try:
                gate = objective.gate(wide[objective.topk] if objective.topk else stats)
            except Exception as problem:
                if name == self.current:
                    raise
                # A class that is merely loaded must not stop the pass.
                self.failed[name] = " ".join(str(problem).split())
                del self.objectives[name]
                continue
            self._gates[name] += torch.stack(
                [gate.sum(), gate.square().sum(), (gate * mass).sum(), gate[~noisy].sum(), gate[noisy].sum()]
            )
            if name == self.current and self.operations:
                self._rank(codes, -gate.log(), -stats.log_prob, conflict(stats), gate)

    def _rank(self, codes: Tensor, low_gate: Tensor, low_prob: Tensor, disputed: Tensor, gate: Tensor) -> None:
        for code in range(1 + len(self.operations)):
            of = codes == code
            self._gate_of[code] += gate[of].sum()
            for row, values in enumerate((low_gate, low_prob, disputed), start=3 * code):
                self._ranks.update(row, squashed(values[of]))

    def means(self) -> dict[str, float]:
        """Return means over all tokens: p, entropies in nats, collision probability, NLL, accuracy."""
        names = ("p", "entropy", "renyi2", "collision", "nll", "accuracy")
        return dict(zip(names, (self._means[1:] / self._means[0]).tolist(), strict=True))

    def table(self) -> list[JsonObject]:
        """Return what each objective would do, the chosen one first.

        ``gate``: its mean. ``ess``: effective sample size ``(sum g)^2 / (n sum g^2)`` in (0, 1], 1 when all tokens
        weigh the same. ``shrinkage``: ``sum g (1 - p) / sum (1 - p)``, its gradient mass in units of NLL's, each token
        times its weight where it has one.
        ``lr_factor``: the inverse, by which NLL's learning rate would have to grow for steps of the same mass; None
        where nothing is left. ``gate_clean``, ``gate_noisy``: means apart, where there is noise.
        """
        count, mass = float(self._means[0]), self._mass
        rows = []
        for name in sorted(self.objectives, key=lambda name: (name != self.current, name)):
            total, squares, spent, clean, noisy = self._gates[name].tolist()
            shrinkage = spent / mass if mass else None
            row = {
                "name": name, "chosen": name == self.current, "gate": total / count,
                "ess": total**2 / (count * squares) if squares else 0.0, "shrinkage": shrinkage,
                "lr_factor": 1 / shrinkage if shrinkage else None,
            }  # fmt: skip
            if self._noisy and self._noisy < count:
                row |= {"gate_clean": clean / (count - self._noisy), "gate_noisy": noisy / self._noisy}
            rows.append(row)
        return rows

    def noise(self) -> list[JsonObject]:
        """Return, for each noise operation that hit a token: tokens, gates, and AUROC against the clean tokens.

        ``auroc_gate``, ``auroc_prob``, ``auroc_conflict``: how well 1 - gate of the chosen objective, 1 - p and
        :func:`conflict` tell its tokens from the clean ones; 0.5 is chance. Tokens within one of 65536 bins count as
        equal.
        """
        if not self.operations:
            return []
        rows, result = self._ranks.rows(), []
        clean = rows[:3]
        for code, name in enumerate(self.operations, start=1):
            own: list[Histogram] = rows[3 * code : 3 * code + 3]
            if not own[0].total or not clean[0].total:
                continue
            values = [binned_auroc(a.counts, b.counts) for a, b in zip(own, clean, strict=True)]
            result.append({
                "operation": name, "tokens": int(own[0].total), "gate": float(self._gate_of[code]) / own[0].total,
                "gate_clean": float(self._gate_of[0]) / clean[0].total,
                **dict(zip(("auroc_gate", "auroc_prob", "auroc_conflict"), values, strict=True)),
            })  # fmt: skip
        return result

    def histograms(self) -> JsonObject:
        """Return counts of p and C over [0, 1], clean and noisy tokens apart."""
        rows = self._shapes.rows()
        names = ("p_clean", "p_noisy", "collision_clean", "collision_noisy")
        return {"edges": rows[0].edges, **{name: row.counts for name, row in zip(names, rows, strict=True)}}


def squashed(values: Tensor) -> Tensor:
    """Map the line to [-1, 1] in order, so that bins of equal width resolve what is small and what is large."""
    return torch.where(torch.isinf(values), values.sign(), values / (1 + values.abs()))


def check_seen(tally: Tally) -> None:
    """Refuse a pass that saw nothing, or numbers that mean nothing.

    Raises:
        UserError: No token was supervised, or the model's probabilities are not numbers.
    """
    if not tally.tokens:
        raise UserError("probe: none of the examples has a supervised token (--data.source, --data.supervise)")
    if math.isnan(tally.means()["p"]):
        raise UserError(
            "probe: the model gives probabilities that are not numbers (--model.dtype, --trainer.precision)"
        )
