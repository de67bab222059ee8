"""Gate and loss of objectives against the target probability."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.figures.style import Output, dress, legend_beside, line, panels, save, styled
from deft_lightning.functional import TokenContext, TokenStats
from deft_lightning.objectives import Objective
from deft_lightning.objectives.parse import label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLLISIONS = (0.1, 0.5, 0.9)
CHANCES = (0.01,)  # of a label, for objectives that compare p with it
HIGHEST = 5.0  # what is above, such as the loss of NLL near p = 0, leaves the figure


def possible(p: Tensor, collision: float) -> Tensor:
    """Return whether some prediction has a target probability of p and this collision probability.

    The rest of the mass, ``1 - p``, adds between nothing (spread over a large vocabulary) and ``(1 - p)^2`` (one other
    token): ``p^2 < C <= p^2 + (1 - p)^2``.

    Args:
        p: Target probabilities, any shape.
        collision: ``C``.
    """
    return (p.square() < collision) & (collision <= p.square() + (1 - p).square() + 1e-12)


def curve_figure(
    objectives: Sequence[Objective],
    quantity: str,
    collisions: Sequence[float],
    title: str,
    chances: Sequence[float] = CHANCES,
) -> Figure:
    """Draw one line per objective, or one per collision probability or chance where the objective depends on it.

    Args:
        objectives: Those that look at the batch see each curve as one.
        quantity: ``gate`` or ``loss``.
        collisions: Collision probabilities of the predictions, in (0, 1].
        title: Of the figure.
        chances: Chances of the label, in (0, 1).
    """
    if not objectives:
        raise UserError("a figure of curves needs at least one objective")
    if not collisions or any(not 0 < collision <= 1 for collision in collisions):
        raise UserError(f"collision probabilities must be in (0, 1], got {', '.join(map(str, collisions)) or 'none'}")
    if not chances or any(not 0 < chance < 1 for chance in chances):
        raise UserError(f"chances must be in (0, 1), got {', '.join(map(str, chances)) or 'none'}")
    p = torch.linspace(1e-4, 1 - 1e-6, 600, dtype=torch.float64)
    figure, (axes,) = panels(1, 4.4, 3.4)
    top, index, thin = 1.0, 0, False
    for objective in objectives:
        for chance in chances if objective.needs.chance is not None else chances[:1]:
            name = label(objective) if objective.needs.chance is None else f"{label(objective)}, u = {chance:g}"
            # Whether it depends on the prediction is asked of all three, however few are drawn.
            wanted = dict.fromkeys([*collisions, *COLLISIONS])
            by_collision = {c: _values(objective, quantity, p, c, chance) for c in wanted}
            same = all(torch.allclose(values, by_collision[collisions[0]]) for values in by_collision.values())
            for collision in collisions[:1] if same else collisions:
                values = by_collision[collision]
                solid = torch.ones_like(p, dtype=torch.bool) if same else possible(p, collision)
                shown = torch.where(solid, values, torch.nan)
                named = name if same else f"{name}, C = {collision:g}"
                axes.plot(p.numpy(), shown.numpy(), label=named, **line(index))
                if not same:
                    rest = torch.where(solid, torch.nan, values)
                    axes.plot(p.numpy(), rest.numpy(), **line(index) | {"linewidth": 0.7})
                    thin = True
                top, index = max(top, float(values.max())), index + 1
    dress(axes, title, "target probability p", quantity)
    if thin:
        axes.plot([], [], color="#555555", linewidth=0.7, label="thin: no prediction\nhas this p and C")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, min(1.03 * top, HIGHEST))
    if index > 1:
        legend_beside(figure, axes)
    return figure


def _values(objective: Objective, quantity: str, p: Tensor, collision: float, chance: float) -> Tensor:
    flat = torch.full_like(p, collision)
    # Every p is a token of its own, an answer of its own, and of no source that is named.
    known = TokenContext(
        chance=torch.full_like(p, chance).log(), example=torch.arange(len(p)),
        source=torch.full(p.shape, -1, dtype=torch.long),
    )  # fmt: skip
    # A prediction with this collision probability has about the entropy of 1 / C equal alternatives.
    stats = TokenStats(p.log(), flat, -flat.log(), p > 0.5, -flat.log()).within(known)
    stats = stats._replace(reference_kl=torch.zeros_like(p))  # of a model that has not moved
    return objective.gate(stats) if quantity == "gate" else objective(stats).detach()


def _several(values: float | Sequence[float]) -> Sequence[float]:
    return values if isinstance(values, Sequence) else (values,)


@styled
def gate_curves(
    objectives: Sequence[Objective], output: Output, *, collision: float | Sequence[float] = COLLISIONS,
    chance: float | Sequence[float] = CHANCES,
) -> list[Path]:  # fmt: skip
    """Draw the gate ``-dl/d(log p)`` against the target probability, up to 5.

    Args:
        objectives: One line each, and one for each collision probability where the objective depends on it, as DEFT
            does; thin where no prediction has that ``p`` and ``C`` (:func:`possible`).
        output: File or files.
        collision: Collision probability ``C`` of the predictions, in (0, 1], one or several.
        chance: Chance ``u`` of the label, in (0, 1), one or several: of objectives that compare ``p`` with it.

    Returns:
        The files.
    """
    return save(curve_figure(objectives, "gate", _several(collision), "Gate of a token", _several(chance)), output)


@styled
def loss_curves(
    objectives: Sequence[Objective], output: Output, *, collision: float | Sequence[float] = COLLISIONS,
    chance: float | Sequence[float] = CHANCES,
) -> list[Path]:  # fmt: skip
    """Draw the loss of a token against its target probability, up to 5.

    Args:
        objectives: As in :func:`gate_curves`.
        output: File or files.
        collision: As in :func:`gate_curves`.
        chance: As in :func:`gate_curves`.

    Returns:
        The files.
    """
    return save(curve_figure(objectives, "loss", _several(collision), "Loss of a token", _several(chance)), output)


__all__ = ["curve_figure", "gate_curves", "label", "loss_curves", "possible"]
