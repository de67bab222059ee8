"""How well scores tell noisy rows from clean ones, where that is known: injected noise, or a column of the data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from deft_lightning.annotations import JsonObject
from deft_lightning.metrics import exact_auroc
from deft_lightning.probe.rate import LEVEL

FIRST = (20, 100)  # rows at the top of which the share of noisy ones is told
HALVINGS = 60
Numbers = NDArray[np.float64]
Flags = NDArray[np.bool_]


def auroc_interval(auroc: float, positive: int, negative: int) -> tuple[float, float]:
    """Return the ends of an interval of level :data:`~deft_lightning.probe.rate.LEVEL` for an area under the ROC curve.

    Newcombe's score method (Statistics in Medicine 25, 2006, method 5): the areas from which the measured one is no
    farther than chance explains. It stays within [0, 1] and has a width at 0 and 1 too.

    Args:
        auroc: As measured.
        positive: Rows that are to be found.
        negative: The others.
    """
    half, z = (positive + negative) / 2 - 1, NormalDist().inv_cdf((1 + LEVEL) / 2)

    def near(area: float) -> bool:
        spread = area * (1 - area) * (1 + half * ((1 - area) / (2 - area) + area / (1 + area)))
        return abs(auroc - area) <= z * math.sqrt(max(spread, 0.0) / (positive * negative))

    ends = []
    for end in (0.0, 1.0):
        inside, outside = auroc, end
        if not near(end):
            for _ in range(HALVINGS):
                middle = (inside + outside) / 2
                inside, outside = (middle, outside) if near(middle) else (inside, middle)
        else:
            inside = end
        ends.append(inside)
    return ends[0], ends[1]


def truth_record(field: str | None, scores: Mapping[str, Numbers], noisy: Sequence[bool | None]) -> JsonObject:
    """Return how well each score ranks noisy rows first.

    Args:
        field: Column that says which rows are noisy; None where noise was injected.
        scores: Of n rows, by name, the one that ranks the audit first.
        noisy: Whether each row is, None where that is not known.

    Returns:
        ``field``; ``known`` rows, ``noisy`` ones among them, ``base`` their share; ``scores``: by name ``auroc`` with
        ``low`` and ``high``, empty without both kinds; ``auroc``: the first one's, or None; ``first``: the share of
        noisy rows among the first 20, 100 and as many as there are noisy ones, by that number, where there are so many.
    """
    known = np.array([value is not None for value in noisy], bool)
    truth = np.array([bool(value) for value in noisy], bool)[known]
    hit, clean = int(truth.sum()), int((~truth).sum())
    record: JsonObject = {
        "field": field, "known": len(truth), "noisy": hit, "base": hit / len(truth) if len(truth) else None,
        "auroc": None, "scores": {}, "first": {},
    }  # fmt: skip
    if not hit or not clean:
        return record
    for name, values in scores.items():
        own = values[known]
        auroc = exact_auroc(own[truth].tolist(), own[~truth].tolist())
        low, high = auroc_interval(auroc, hit, clean)
        record["scores"][name] = {"auroc": auroc, "low": low, "high": high}
    name = next(iter(scores))
    order = np.argsort(-scores[name][known], kind="stable")
    record["auroc"] = record["scores"][name]["auroc"]
    record["first"] = {
        str(count): float(truth[order[:count]].mean()) for count in sorted({*FIRST, hit}) if count <= len(truth)
    }
    return record


def truth_text(record: JsonObject) -> list[str]:
    """Return what a report says of it, a line or a paragraph each."""
    about = "injected noise" if record["field"] is None else record["field"]
    lines = [f"truth ({about}): {record['noisy']} of {record['known']} rows noisy"]
    if not record["scores"]:
        return lines
    lines[0] += f"; AUROC of every score with its {LEVEL:.0%} interval"
    width = max(map(len, record["scores"]))
    for name, row in record["scores"].items():
        lines.append(f"  {name:<{width}} {row['auroc']:.3f} ({row['low']:.3f} to {row['high']:.3f})")
    shares = ", ".join(f"{share:.0%} of the first {count}" for count, share in record["first"].items())
    lines.append(f"  noisy rows: {shares}; of all {record['base']:.0%}")
    name, best = next(iter(record["scores"].items()))
    if best["auroc"] < 0.5:
        lines.append(
            f"  Warning: {name} ranks these rows worse than chance (AUROC {best['auroc']:.3f}): its first rows are"
            " noisy less often than rows drawn at random. Do not use this audit."
        )
    elif best["low"] <= 0.5:
        lines.append(f"  Warning: {name} cannot be separated from chance on these rows: 0.5 is within its interval.")
    return lines
