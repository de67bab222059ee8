"""Comparison of methods, with every seed in sight."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from deft_lightning.errors import UserError
from deft_lightning.figures.style import Output, bar, dress, legend_beside, panels, save, styled

Table = Mapping[str, Mapping[str, Sequence[float]]]
ROOM = 0.82  # of the distance of two groups, for their bars


@styled
def comparison_bars(table: Table, output: Output, *, value: str = "value", title: str = "") -> list[Path]:
    """Draw the mean of every method in every group, its standard error, and every single value as a point.

    The standard error of the mean, ``s / sqrt(n)`` with ``n - 1`` in ``s``, is drawn from two values on.

    Args:
        table: ``{group: {method: [values]}}``, one value per seed; a method may be missing from a group.
        output: File or files.
        value: What the values are, beside the axis.
        title: Of the figure.

    Returns:
        The files.

    Raises:
        UserError: There is nothing to draw, or a value is not a number.
    """
    methods = list(dict.fromkeys(method for of_group in table.values() for method in of_group))
    for group, of_group in table.items():
        for method, values in of_group.items():
            if not len(values):
                raise UserError(f"bars: {method} of {group} has no values")
            if not all(math.isfinite(number) for number in values):
                raise UserError(f"bars: {method} of {group} has a value that is not a number: {list(values)}")
    if not methods:
        raise UserError("bars: there are no values to draw")
    slot = ROOM / len(methods)
    inches = max(3.4, 0.36 * len(methods) * len(table) + 0.4 * len(table) + 1.0)
    figure, (axes,) = panels(1, inches, 3.4)
    named = set()
    for at, of_group in enumerate(table.values()):
        # A method that is missing from a group leaves no gap in it.
        for nth, method in enumerate(sorted(of_group, key=methods.index)):
            values = of_group[method]
            place = at + slot * (nth - (len(of_group) - 1) / 2)
            label = "_" if method in named else method
            axes.bar(place, fmean(values), 0.92 * slot, label=label, **bar(methods.index(method)))
            named.add(method)
            if len(values) > 1:
                error = stdev(values) / math.sqrt(len(values))
                axes.errorbar(place, fmean(values), error, ecolor="black", elinewidth=1.2, capsize=3, zorder=3)
            # Side by side in the order given: seeds of equal value are seen.
            spread = [0.5 * slot * ((i + 0.5) / len(values) - 0.5) for i in range(len(values))]
            axes.plot(
                [place + shift for shift in spread], values, "o", color="white", markeredgecolor="black",
                markersize=3.6, markeredgewidth=0.8, zorder=4, clip_on=False,
            )  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(table)), list(table))
    axes.set_xlim(-0.55, len(table) - 0.45)
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    dress(axes, title, "", value)
    if len(methods) > 1:
        handles, texts = axes.get_legend_handles_labels()
        order = sorted(range(len(texts)), key=lambda i: methods.index(texts[i]))
        legend_beside(figure, axes, handles=[handles[i] for i in order], handleheight=1.4, handlelength=2)
    return save(figure, output)


def read_table(path: str | Path) -> dict[str, dict[str, list[float]]]:
    """Read a table for :func:`comparison_bars` from JSON; a single number stands for a list of one.

    Raises:
        UserError: The file is not there, or not of that form.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(f"{path}: cannot be read as JSON ({reason})") from None
    wanted = 'must be {"group": {"method": [values]}}'
    if not isinstance(content, dict) or not all(isinstance(of_group, dict) for of_group in content.values()):
        raise UserError(f"{path}: {wanted}")
    table: dict[str, dict[str, list[float]]] = {}
    for group, of_group in content.items():
        table[group] = {}
        for method, values in of_group.items():
            numbers = values if isinstance(values, list) else [values]
            if any(isinstance(number, bool) or not isinstance(number, (int, float)) for number in numbers):
                raise UserError(f"{path}: {wanted}, but {method} of {group} is {json.dumps(values)}")
            table[group][method] = [float(number) for number in numbers]
    return table
