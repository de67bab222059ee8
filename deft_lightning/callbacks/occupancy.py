"""How many tokens lie where in p and alpha, as pixels: drawn many times in a run, so without matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deft_lightning.callbacks.sinks import Pixels

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

HEIGHT, WIDTH = 340, 500
LEFT, TOP, RIGHT, BOTTOM = 60, 38, 400, 290  # of the cells
BAR = (415, 430)  # left and right of the scale, which is as high as the cells
PALE = 225  # of a cell with one token: one without any is white
TICKS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
BLACK, TEXT, TITLE = (0, 0, 0), 12, 14  # in pixels


def occupancy(counts: list[list[float]]) -> Pixels:
    """Draw how many tokens lie where in p (to the right) and alpha (up), on a logarithmic scale of grey.

    Args:
        counts: Tokens in bins of p over [0, 1], for each band of alpha over [0, 1] from below.
    """
    from PIL import Image, ImageDraw

    table = np.asarray(counts, dtype=float)[::-1]
    most = max(2.0, float(table.max()))
    canvas = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    rows = np.arange(BOTTOM - TOP) * table.shape[0] // (BOTTOM - TOP)
    columns = np.arange(RIGHT - LEFT) * table.shape[1] // (RIGHT - LEFT)
    canvas[TOP:BOTTOM, LEFT:RIGHT] = _grey(table, most)[np.ix_(rows, columns)]
    canvas[TOP:BOTTOM, slice(*BAR)] = _grey(most ** np.linspace(1, 0, BOTTOM - TOP), most)[:, None]
    picture = Image.fromarray(np.repeat(canvas[..., None], 3, axis=2))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((LEFT - 1, TOP - 1, RIGHT, BOTTOM), outline=BLACK)
    draw.rectangle((BAR[0] - 1, TOP - 1, BAR[1], BOTTOM), outline=BLACK)
    _label(draw, picture, most)
    return np.asarray(picture)


def _grey(tokens: NDArray[np.float64], most: float) -> NDArray[np.uint8]:
    """Return the grey of cells: white without tokens, then from pale to black."""
    level = np.log(np.maximum(tokens, 1)) / math.log(most)
    return np.where(tokens > 0, PALE * (1 - level), 255).round().astype(np.uint8)


def _label(draw: ImageDraw, picture: Any, most: float) -> None:
    """Write title, axes and scale."""
    from PIL import Image, ImageDraw, ImageFont

    small, large = ImageFont.load_default(TEXT), ImageFont.load_default(TITLE)
    draw.text((LEFT, TOP - 12), "Tokens by probability and focus", BLACK, large, anchor="ls")
    draw.text((BAR[0], TOP - 12), "tokens", BLACK, small, anchor="ls")
    draw.text(((LEFT + RIGHT) / 2, HEIGHT - 8), "target probability p", BLACK, small, anchor="ms")
    aside = Image.new("RGB", (BOTTOM - TOP, 20), "white")
    ImageDraw.Draw(aside).text((aside.width / 2, 14), "focus alpha", BLACK, small, anchor="ms")
    picture.paste(aside.rotate(90, expand=True), (6, TOP))
    for tick in TICKS:
        x, y = LEFT + tick * (RIGHT - LEFT), BOTTOM - tick * (BOTTOM - TOP)
        draw.line((x, BOTTOM, x, BOTTOM + 4), BLACK)
        draw.line((LEFT - 5, y, LEFT - 1, y), BLACK)
        draw.text((x, BOTTOM + 7), f"{tick:.1f}", BLACK, small, anchor="mt")
        draw.text((LEFT - 8, y), f"{tick:.1f}", BLACK, small, anchor="rm")
    for power in range(int(math.log10(most)) + 1):
        y = BOTTOM - power * math.log(10) / math.log(most) * (BOTTOM - TOP)
        draw.line((BAR[1], y, BAR[1] + 4, y), BLACK)
        draw.text((BAR[1] + 8, y), f"{10**power:,}", BLACK, small, anchor="lm")
