"""What the objective lets through: gate, focus index and target probability, and what other objectives would."""

from __future__ import annotations

import re
from itertools import pairwise

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from deft_lightning.callbacks.locked import LockWatch
from deft_lightning.callbacks.monitor import TokenMonitor
from deft_lightning.callbacks.occupancy import occupancy
from deft_lightning.callbacks.watched import WatchedModule, is_watched, watched
from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.metrics import Histogram, PackedHistogram
from deft_lightning.objectives import Objective
from deft_lightning.objectives.locked import locked

BANDS = 10  # of alpha, in the occupancy
FIXED = 6  # rows before those of other objectives
RANGES = (0, 10, 50, 90, 100)  # in percent, ranges of p whose share of the gradient is told


class GateMonitor(TokenMonitor):
    """Logs the gate, the target probability p and the focus index alpha of the tokens of a step.

    Means: `gate/mean`, `prob/mean`, `focus/mean`. The gate is the factor on a token's error; `gate/ess` is the
    effective sample size `(sum g)^2 / (n sum g^2)`, in (0, 1]. Focus is written for the deformed-log family, which has
    one.

    Quantiles `gate/q10`, `gate/q50`, `gate/q90`, and `prob/` and `focus/` likewise, are exact, as means are. In
    histograms, values above 1, which only some objectives reach, count in the last bin.

    `gradient/p0_10`, `gradient/p10_50`, `gradient/p50_90`, `gradient/p90_100` are the shares of the summed
    `gate * (1 - p)` that tokens with p in [0, 0.1), [0.1, 0.5), [0.5, 0.9), [0.9, 1] have; exact when `bins` is a
    multiple of 10, otherwise as if the tokens of a bin were spread evenly over it. Where tokens have weights each is
    multiplied by its own here, and in `gradient/hist`; everything else counts tokens alike.

    `gate/locked` is the share of tokens that are locked: the model is concentrated (collision probability of at least
    0.5) and wrong (the label is not its first choice), and the gate is nearly shut (below 0.1), so that the token
    hardly trains the model that misses it. A wrong label should meet that; where labels are right it keeps a model on
    a plateau. Where labels were corrupted on purpose, `gate/locked_clean` is the share among the others. What may be a
    plateau is warned of once: :class:`~deft_lightning.callbacks.locked.LockWatch`.

    `counterfactual/NAME/gate` and `counterfactual/NAME/ess` are mean gate and effective sample size that another
    objective would have on the same tokens, from the same statistics: no forward pass is added. One that looks at the
    batch, `Cayley(floor=...)`, sees one micro-batch of one rank, as it would in training.

    With several sources of data, `gate/SOURCE/mean` is the mean gate of the tokens of each.

    Histograms: `gate/hist`, `prob/hist`, `focus/hist`, and `gradient/hist`, over p, each token counted by its
    `gate * (1 - p)`. `occupancy/p_alpha` shows how many tokens lie where in p and alpha.

    Args:
        histograms: Write histograms and occupancy too.
        bins: Bins of a histogram over [0, 1].
        others: Objectives to compare with, for example `[NLL, Likelihood]`; an objective that
            changes during training is used as it ends.

    Raises:
        UserError: Two of `others` are the same, or one needs statistics that the objective in use does not ask for.
    """

    def __init__(self, histograms: bool = True, bins: int = 50, others: list[Objective] | None = None) -> None:
        super().__init__(bins)
        self.histograms, self.bins = histograms, bins
        self.lock = LockWatch()
        self.others: dict[str, Objective] = {}
        for other in others or []:
            name = tag_of(other)
            if name in self.others:
                raise UserError(f"gate_monitor.others: {other!r} is listed twice")
            self.others[name] = other

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse objectives that cannot be computed, before anything is trained."""
        self.lock = LockWatch()
        if not is_watched(pl_module):
            return
        own = watched(pl_module).objective
        for other in self.others.values():
            if other.topk not in (0, own.topk):
                raise UserError(
                    f"gate_monitor.others: {other!r} needs the entropy of the {other.topk} largest probabilities, which"
                    f" is not computed for {own!r}; leave it out, or train with it"
                )

    def open(self, trainer: Trainer, module: WatchedModule) -> PackedHistogram:
        """Return rows for gate, p, gradient, locked; locked and p of clean tokens; others; focus, p in bands of it."""
        # Whether there is a focus may change in a run; rows that stay empty cost nothing.
        return PackedHistogram([(0.0, 1.0)] * (FIXED + len(self.others) + 1 + BANDS), self.bins)

    def observe(
        self,
        packed: PackedHistogram,
        module: WatchedModule,
        stats: TokenStats,
        noise_code: Tensor | None,
        clean_labels: Tensor | None,
    ) -> None:
        """Add gate, probability, gradient and focus of each token."""
        current_objective: Objective = module.current_objective
        gate, prob = current_objective.gate(stats), stats.log_prob.exp()
        packed.update(0, gate)
        packed.update(1, prob)
        # A gate of Focal can be below 0 by rounding alone; mass is not.
        mass = (gate * -torch.expm1(stats.log_prob)).clamp_min(0)
        packed.update(2, prob, weight=mass if stats.weight is None else mass * stats.weight)
        shut = locked(stats, gate)
        clean = torch.ones_like(shut) if noise_code is None else noise_code == 0
        packed.update(3, shut)
        packed.update(4, shut[clean])
        packed.update(5, prob[clean])
        for row, other in enumerate(self.others.values(), start=FIXED):
            packed.update(row, other.gate(stats))
        if current_objective.deformed is not None:
            row = FIXED + len(self.others)
            with torch.no_grad():
                focus = current_objective.deformed.focus(stats)
            packed.update(row, focus)
            packed.update_bands(row + 1, BANDS, prob, by=focus)
            self.quantiles.update(gate, prob, focus)
        else:
            self.quantiles.update(gate, prob)

    def figures_by_source(
        self, module: WatchedModule, stats: TokenStats, noise_code: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return the gate of each token, and 1 to count it."""
        gate = module.current_objective.gate(stats)
        return gate, torch.ones_like(gate)

    def report_by_source(self, sums: dict[str, list[float]]) -> dict[str, float]:
        """Return the mean gate of every source that has tokens."""
        return {f"gate/{name}/mean": gate / tokens for name, (gate, tokens) in sums.items() if tokens}

    def report(self, trainer: Trainer, module: WatchedModule, rows: list[Histogram]) -> None:
        """Write means, quantiles, shares and histograms."""
        gate, prob, gradient, shut, shut_clean, prob_clean = rows[:FIXED]
        others = rows[FIXED : FIXED + len(self.others)]
        focus = [] if module.current_objective.deformed is None else rows[FIXED + len(self.others) :]
        module.log("gate/mean", gate.mean)
        module.log("gate/ess", gate.effective_sample_size)
        module.log("gate/locked", shut.mean)
        module.log("prob/mean", prob.mean)
        if focus:
            module.log("focus/mean", focus[0].mean)
        self.write_quantiles(trainer, "gate", "prob", *(["focus"] if focus else []))
        values = {}
        if 0 < shut_clean.total < shut.total:
            values["gate/locked_clean"] = shut_clean.mean
        if shut_clean.total:
            self.lock.see(shut_clean.mean, prob_clean.mean, repr(module.objective))
        if gradient.total:
            for low, high in pairwise(RANGES):
                values[f"gradient/p{low}_{high}"] = gradient.share_below(high / 100) - gradient.share_below(low / 100)
        for name, row in zip(self.others, others, strict=True):
            values[f"counterfactual/{name}/gate"] = row.mean
            values[f"counterfactual/{name}/ess"] = row.effective_sample_size
        self.write_scalars(trainer, values)
        if not self.histograms:
            return
        for name, row in {"gate": gate, "prob": prob, "gradient": gradient}.items():
            self.write_histogram(trainer, f"{name}/hist", row)
        if focus:
            self.write_histogram(trainer, "focus/hist", focus[0])
            counts = [row.counts for row in focus[1:]]
            self.write_figure(trainer, "occupancy/p_alpha", lambda: occupancy(counts))


def tag_of(objective: Objective) -> str:
    """Return an objective's repr in characters that tags may have: `NLL`, `Tsallis_q_0.5`."""
    return re.sub(r"[^\w.-]+", "_", repr(objective)).strip("_")
