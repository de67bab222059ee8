"""The figure of a probe: what the model believes, and what each objective would make of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deft_lightning.annotations import Record
from deft_lightning.figures.style import bar, dress, line, panels, save, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 2.0  # gates above are cut off, lest one objective flatten the others


@styled
def probe_figure(report: Record, *outputs: Path) -> None:
    """Draw a report: distributions of p and C, then mean gate and effective sample size of every objective.

    Args:
        report: As in ``probe.json``.
        outputs: Files; the suffix is the format.
    """
    save(drawing(report), outputs)


def drawing(report: Record) -> Figure:
    """Return the figure of a report."""
    rows, shapes = report["objectives"][::-1], report["histograms"]
    height = max(3.2, 0.32 * len(rows) + 1.4)
    figure, (left, right) = panels(2, 5, height)
    noisy = sum(shapes["p_noisy"]) > 0
    curves = [("p_clean", "p, clean labels" if noisy else "target probability p"), ("collision_clean", "C")]
    curves[1] = ("collision_clean", "C, clean labels" if noisy else "collision probability C")
    curves += [("p_noisy", "p, noisy labels"), ("collision_noisy", "C, noisy labels")] if noisy else []
    for i, (key, label) in enumerate(curves):
        total = sum(shapes[key]) or 1.0
        share = [count / total for count in shapes[key]]
        left.stairs(share, shapes["edges"], linewidth=1.4, baseline=None, label=label, **line(i))
    dress(left, f"What the model believes: {report['prior']['kind']} prior", "probability", "share of the tokens")
    left.set_ylim(bottom=0)
    left.legend()

    places = range(len(rows))
    pair = [("gate_clean", "mean gate, clean"), ("gate_noisy", "mean gate, noisy")]
    if "gate_noisy" not in rows[0]:
        pair = [("gate", "mean gate"), ("ess", "effective sample size")]
    limit = min(max(1.0, *(_capped(row[key], MOST) for row in rows for key, _ in pair)), MOST)
    for i, (key, label) in enumerate(pair):
        heights = [_capped(row[key], limit) for row in rows]
        right.barh([place + 0.19 - 0.38 * i for place in places], heights, height=0.36, label=label, **bar(i + 1))
    for place, row in zip(places, rows, strict=True):
        factor = "-" if row["lr_factor"] is None else f"lr x {row['lr_factor']:.3g}"
        at = max(_capped(row[key], limit) for key, _ in pair)
        right.annotate(factor, (at, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    right.set_yticks(list(places), [("* " if row["chosen"] else "") + row["name"] for row in rows])
    dress(right, "What each objective would let through (* chosen)")
    right.tick_params(axis="y", length=0)
    right.grid(False, axis="y")
    right.set_xlim(0, 1.16 * limit)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    return figure


def _capped(gate: float, limit: float) -> float:
    return gate if gate < limit else limit
