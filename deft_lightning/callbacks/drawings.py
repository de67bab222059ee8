"""Figures drawn once in a while, in the look of those of :mod:`deft_lightning.figures`, by matplotlib."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np

from deft_lightning.callbacks.sinks import Pixels
from deft_lightning.figures.curves import COLLISIONS, curve_figure
from deft_lightning.figures.style import styled
from deft_lightning.objectives import Objective
from deft_lightning.objectives.parse import label

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def gate_curve(objective: Objective) -> Figure:
    """Draw the gate against p, for predictions with collision probability 0.1, 0.5 and 0.9 where that matters.

    Args:
        objective: One that looks at the batch sees each curve as one.
    """
    title = textwrap.fill(f"Gate of {label(objective)}", 60)  # legends of nested objectives are long
    return curve_figure([objective], "gate", COLLISIONS, title)


def pixels_of(figure: Figure) -> Pixels:
    """Draw a figure without pyplot, and forget it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
    # Figure and canvas are a cycle: until it is collected, the pixels would add to the peak of the steps that follow.
    del canvas.renderer
    return pixels
