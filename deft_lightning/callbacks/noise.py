"""Clean against noisy: what the objective does to labels known to be wrong."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from deft_lightning.callbacks.monitor import TokenMonitor
from deft_lightning.callbacks.watched import WatchedModule
from deft_lightning.functional import IGNORE_INDEX, TokenStats
from deft_lightning.metrics import Histogram, PackedHistogram, binned_auroc, spread

BINS = 1024
RECOVERED = 12  # row of whether the first choice of a noisy token is its clean label


class NoiseMonitor(TokenMonitor):
    """Logs clean and noisy tokens apart, on steps that have both; without synthetic noise it is silent.

    `gate/clean`, `gate/noisy`, `nll/clean`, `nll/noisy` are means; `noise/auroc_gate` and `noise/auroc_prob` how well
    1 - gate and 1 - p detect noise (0.5 is chance; tokens within one of 1024 bins count as equal);
    `noise/gradient_share` the noisy tokens' share of the summed gate * (1 - p), each times its weight where tokens have
    weights; `noise/memorised` the share of noisy tokens whose corrupted label is the model's first choice,
    `noise/recovered` of those whose clean label is: among the ones whose clean label is known, as it is where single
    tokens were replaced (`TokenReplace`).

    With several sources of data, also for each: `noise/SOURCE/share`, the share of its tokens that are noisy, and
    `gate/SOURCE/clean`, `gate/SOURCE/noisy`, where it has such tokens.
    """

    def open(self, trainer: Trainer, module: WatchedModule) -> PackedHistogram:
        """Return rows of gate, probability, NLL, gradient and arg-max, each for clean and noisy, and of recovery."""
        # Ranges of nll and gradient do not matter: only their sums are read.
        return PackedHistogram([(0.0, 1.0)] * 13, BINS)

    def observe(
        self,
        packed: PackedHistogram,
        module: WatchedModule,
        stats: TokenStats,
        noise_code: Tensor | None,
        clean_labels: Tensor | None,
    ) -> None:
        """Add each token to its class."""
        if noise_code is None:
            return
        gate = module.current_objective.gate(stats)
        error = -torch.expm1(stats.log_prob)
        error = error if stats.weight is None else error * stats.weight
        for offset, chosen in ((0, noise_code == 0), (6, noise_code != 0)):
            log_prob, kept = stats.log_prob[chosen], gate[chosen]
            parts = (spread(kept.log()), spread(log_prob), kept, -log_prob, kept * error[chosen], stats.correct[chosen])
            for row, values in enumerate(parts, start=offset):
                packed.update(row, values)
        if clean_labels is not None and stats.arg_max is not None:
            known = (noise_code != 0) & (clean_labels != IGNORE_INDEX)
            packed.update(RECOVERED, (stats.arg_max == clean_labels)[known])

    def figures_by_source(
        self, module: WatchedModule, stats: TokenStats, noise_code: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return gate and number of clean tokens, and of noisy ones."""
        if noise_code is None:
            return ()
        gate, noisy = module.current_objective.gate(stats), noise_code != 0
        return torch.where(noisy, 0, gate), ~noisy, torch.where(noisy, gate, 0), noisy

    def report_by_source(self, sums: dict[str, list[float]]) -> dict[str, float]:
        """Return share of the noisy tokens and mean gates, of steps that have noisy tokens."""
        if not any(noisy for *_, noisy in sums.values()):
            return {}
        values = {}
        for name, (gate_clean, clean, gate_noisy, noisy) in sums.items():
            if clean + noisy:
                values[f"noise/{name}/share"] = noisy / (clean + noisy)
            if clean:
                values[f"gate/{name}/clean"] = gate_clean / clean
            if noisy:
                values[f"gate/{name}/noisy"] = gate_noisy / noisy
        return values

    def report(self, trainer: Trainer, module: WatchedModule, rows: list[Histogram]) -> None:
        """Write the comparison once both classes were seen."""
        clean, noisy, recovered = rows[:6], rows[6:RECOVERED], rows[RECOVERED]
        if not (clean[0].total and noisy[0].total):
            return
        values: dict[str, float] = {}
        for name, kind in (("clean", clean), ("noisy", noisy)):
            values[f"gate/{name}"] = kind[2].mean
            values[f"nll/{name}"] = kind[3].mean
        values["noise/auroc_gate"] = binned_auroc(noisy[0].counts, clean[0].counts)
        values["noise/auroc_prob"] = binned_auroc(noisy[1].counts, clean[1].counts)
        spent = clean[4].sum + noisy[4].sum
        values["noise/gradient_share"] = noisy[4].sum / spent if spent else 0.0
        values["noise/memorised"] = noisy[5].mean
        if recovered.total:
            values["noise/recovered"] = recovered.mean
        self.write_scalars(trainer, values)
