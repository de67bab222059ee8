"""Where in p and H the gradient of an objective comes from, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.figures.style import SHADES, Output, dress, panels, save, styled
from deft_lightning.figures.tokens import TokenSample
from deft_lightning.functional import TokenStats
from deft_lightning.objectives import Objective
from deft_lightning.objectives.parse import label

MOST = 2000  # points of a panel: beyond, they cover each other
KINDS = (("o", 9, "clean label"), ("^", 16, "noisy label"))


def gradient_norm(stats: TokenStats, objective: Objective) -> Tensor:
    r"""Return the norm of the gradient at the logits, ``||g (pi - onehot)||_2 = |g| sqrt(C - 2 p + 1)``.

    Computed as ``|g| sqrt((1 - p)^2 + (C - p^2))``. Where the model is sure the second term is the rounding of ``C``,
    which makes the norm exact to the root of that: 3e-4 with statistics in float32.

    Args:
        stats: Statistics of N tokens.
        objective: One that looks at the batch sees the N tokens as one.

    Returns:
        Shape ``(N,)``, in ``[0, sqrt(2) max |g|]``.
    """
    p, error = stats.log_prob.exp(), -torch.expm1(stats.log_prob)
    rest = (stats.collision - p.square()).clamp_min(0)
    return objective.gate(stats).abs() * (error.square() + rest).sqrt()


@styled
def gradient_scatter(
    tokens: TokenSample | str | Path, objectives: Sequence[Objective], output: Output, *, most: int = MOST
) -> list[Path]:
    """Draw tokens by p (to the right) and entropy H (up), the darker the larger their gradient at the logits.

    A panel per objective, the same tokens and the same scale of shades in all; the scale ends at the 99.5th percentile
    where a few tokens are far above it. Tokens with a corrupted label are triangles, drawn last.

    Args:
        tokens: A sample, or the folder of a probe.
        objectives: One panel each; one that looks at the batch sees the sample as one.
        output: File or files.
        most: Points of a panel; of a larger sample, every n-th.

    Returns:
        The files.
    """
    from matplotlib.colors import Normalize
    from matplotlib.lines import Line2D

    if not objectives:
        raise UserError("a scatter needs at least one objective")
    if most < 1:
        raise UserError(f"a scatter needs at least one token per panel, got {most}")
    sample = tokens if isinstance(tokens, TokenSample) else TokenSample.load(tokens)
    if not len(sample):
        raise UserError("a scatter needs at least one token, the sample is empty")
    norms = [gradient_norm(sample.stats(objective.topk), objective).numpy() for objective in objectives]
    indices = np.unique(np.linspace(0, len(sample) - 1, min(most, len(sample))).round().astype(int))
    p, entropy = np.exp(sample.log_prob[indices]), sample.entropy[indices]
    noisy = sample.noise_code[indices] > 0
    shades = np.stack([norm[indices] for norm in norms])
    top, usual = float(shades.max()), float(np.quantile(shades, 0.995))
    cut = top > 1.5 * usual > 0
    scale = Normalize(0, usual if cut else top or 1.0)
    figure, axes = panels(len(objectives), 2.7, 2.7, sharex=True, sharey=True)
    for panel, objective, values in zip(axes, objectives, shades, strict=True):
        for which, (marker, size, _) in zip((~noisy, noisy), KINDS, strict=True):
            if not which.any():
                continue
            points = panel.scatter(
                p[which], entropy[which], c=values[which], s=size, marker=marker, norm=scale, cmap=SHADES,
                linewidths=0.25, edgecolors="#555555", rasterized=True, clip_on=False, zorder=3,
            )  # fmt: skip
        dress(panel, label(objective), "target probability p", "entropy H (nats)")
        panel.label_outer()
    axes[0].set_xlim(0, 1)
    axes[0].set_ylim(bottom=0)
    extend = "max" if cut else "neither"
    figure.colorbar(points, ax=axes, label="gradient at the logits (norm)", extend=extend, pad=0.02)
    if noisy.any() and not noisy.all():
        # Of no shade: that of their first point would seem to mean something.
        keys = [
            Line2D([], [], marker=marker, linestyle="", color="#888888", markersize=5, label=name)
            for marker, _, name in KINDS
        ]
        figure.legend(handles=keys, loc="outside lower center", ncols=2, handlelength=1)
    return save(figure, output)


__all__ = ["gradient_norm", "gradient_scatter"]
