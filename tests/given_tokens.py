"""Tokens for monitors to watch that depend on nothing but their example's id, and what numpy finds in them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from deft_lightning.functional import TokenStats, token_stats

VOCABULARY = 24  # of the predictions; the model that is trained beside them has 262


def statistics_of(id: str, count: int) -> tuple[TokenStats, Tensor, Tensor]:
    """What a model might say of the tokens of an example: statistics, noise codes, clean labels; by its id alone."""
    # From 1100 on no token lies at the edge of a bin, where float32 and float64 may disagree.
    generator = torch.Generator().manual_seed(1100 + int(id[1:]))
    logits = 8 * torch.rand(count, 1, generator=generator) * torch.randn(count, VOCABULARY, generator=generator)
    other = torch.randint(VOCABULARY, (2, count), generator=generator)
    first = logits.argmax(-1)
    labels = torch.where(torch.rand(count, generator=generator) < 0.6, first, other[0])
    noise = (torch.rand(count, generator=generator) < 0.3).long()
    clean = torch.where(torch.rand(count, generator=generator) < 0.5, first, other[1])
    # Through float64, whose formula no kernel changes.
    stats = token_stats(logits.double(), labels).map(
        lambda field: field.float() if field.is_floating_point() else field
    )
    return stats, noise, torch.where(noise > 0, clean, labels)


class Tokens:
    """All tokens of a step in float64, from the same statistics as the monitors saw, by formula."""

    def __init__(self, step: list[tuple[str, int]]) -> None:
        rows = [statistics_of(id, count) for id, count in step]
        log_p, self.c, self.h = (np.concatenate([r[0][i].double().numpy() for r in rows]) for i in range(3))
        correct, arg = (np.concatenate([r[0][i].numpy() for r in rows]) for i in (3, 5))
        self.noisy = np.concatenate([r[1].numpy() for r in rows]) > 0
        clean = np.concatenate([r[2].numpy() for r in rows])
        self.log_p, self.p, self.gate = log_p, np.exp(log_p), np.exp(self.c * log_p)  # of DEFT
        self.memorised, self.recovered = correct, arg == clean

    def quantities(self) -> dict[str, tuple[np.ndarray, float]]:
        """Values and largest value of each histogram."""
        top = math.log(262)
        return {
            "gate/hist": (self.gate, 1.0), "prob/hist": (self.p, 1.0), "focus/hist": (self.c, 1.0),
            "entropy/hist": (self.h, top), "entropy/renyi2_hist": (-np.log(self.c), top), "collision/hist": (self.c, 1),
        }  # fmt: skip

    def scalars(self) -> dict[str, float]:
        noisy, mass = self.noisy, self.gate * (1 - self.p)
        values = {
            "gate/mean": self.gate.mean(), "gate/ess": effective(self.gate), "prob/mean": self.p.mean(),
            "focus/mean": self.c.mean(), "collision/mean": self.c.mean(), "entropy/shannon": self.h.mean(),
            "entropy/renyi2": -np.log(self.c).mean(),
            "counterfactual/NLL/gate": 1.0, "counterfactual/NLL/ess": 1.0,
            "counterfactual/Tsallis_q_0.5/gate": np.sqrt(self.p).mean(),
            "counterfactual/Tsallis_q_0.5/ess": effective(np.sqrt(self.p)),
            "noise/memorised": self.memorised[noisy].mean(), "noise/recovered": self.recovered[noisy].mean(),
            "noise/gradient_share": mass[noisy].sum() / mass.sum(),
            "noise/auroc_gate": auroc(self.c * self.log_p, noisy), "noise/auroc_prob": auroc(self.log_p, noisy),
        }  # fmt: skip
        for kind, part in (("clean", ~noisy), ("noisy", noisy)):
            values |= {f"gate/{kind}": self.gate[part].mean(), f"nll/{kind}": -self.log_p[part].mean()}
        columns = {
            "gate": self.gate, "prob": self.p, "focus": self.c, "entropy": self.h, "renyi2": -np.log(self.c),
            "collision": self.c,
        }  # fmt: skip
        for name, column in columns.items():
            for percent in (10, 50, 90):
                values[f"{name}/q{percent}"] = np.quantile(column, percent / 100, method="inverted_cdf")
        for low, high in ((0, 10), (10, 50), (50, 90), (90, 100)):
            inside = (self.p >= low / 100) & (self.p < high / 100 + (high == 100))
            values[f"gradient/p{low}_{high}"] = mass[inside].sum() / mass.sum()
        return {tag: float(value) for tag, value in values.items()}


def effective(gate: np.ndarray) -> float:
    return float(gate.sum() ** 2 / (len(gate) * np.square(gate).sum()))


def auroc(log_value: np.ndarray, noisy: np.ndarray) -> float:
    """Share of pairs in which the noisy token has the smaller value, equals one half; equal is within a bin of 1024."""
    place = np.floor(1024 * -log_value / (1 - log_value))
    difference = place[noisy][:, None] - place[~noisy][None]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())
