"""Tables of a study: means, standard errors, every objective's worst regime, and its regret to the best."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from deft_lightning.annotations import JsonObject, Record
from deft_lightning.objectives import DEFT, Contaminated
from deft_lightning.study.plan import Cell, Study

Place = tuple[str, float]  # regime and noise
RESAMPLES = 2000
Grid = dict[Place, dict[str, dict[int, float]]]  # value by place, objective and seed
Results = Mapping[str, Mapping[str, Any]]


def value_of(cell: Cell, result: Mapping[str, Any]) -> float:
    """Return what a cell is judged by, larger is better: exact match in [0, 1], or minus the NLL in nats per token."""
    scores = result[cell.split]
    return float(scores["exact_match"] if "exact_match" in scores else -scores["nll"])


def grid(cells: Iterable[Cell], results: Results) -> Grid:
    """Return the values of cells by place, objective and seed."""
    values: Grid = defaultdict(lambda: defaultdict(dict))
    for cell in cells:
        values[cell.regime, cell.noise][repr(cell.objective)][cell.seed] = value_of(cell, results[cell.id])
    return {place: dict(row) for place, row in values.items()}


def chosen_rates(study: Study, results: Results) -> dict[tuple[str, float, str], float]:
    """Return the learning rate with the best exact match on the validation split, means over the tuning seeds.

    Of equals the one nearest to the shared rate, then the smaller.
    """
    scores: dict[tuple[str, float, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in study.tuning():
        value = value_of(cell, results[cell.id])
        scores[cell.regime, cell.noise, repr(cell.objective)][cell.rate].append(value)
    return {
        key: min(
            of_key,
            key=lambda rate: (
                -fmean(of_key[rate]), abs(math.log(rate / study.regimes[key[0]].rate)), rate,
            ),
        )
        for key, of_key in scores.items()
    }  # fmt: skip


def worst_regime(values: Grid, headline: Sequence[Place], names: Sequence[str]) -> list[JsonObject]:
    """Return, best first, each objective's headline medians, the lowest of them, and its regret.

    ``worst`` is the lowest of the medians over seeds, ``where`` its place. ``regret`` is the largest distance of a
    median to the best objective's in the same place. ``worst_seeds`` is the lowest value over the places for each seed
    apart: what a run of that seed would have met.
    """
    best = {place: max(median(values[place][name].values()) for name in names) for place in headline}
    rows = []
    for name in names:
        medians = {place: median(values[place][name].values()) for place in headline}
        seeds = set.intersection(*(set(values[place][name]) for place in headline))
        where = min(medians, key=lambda place: medians[place])
        rows.append({
            "objective": name, "medians": [medians[place] for place in headline], "worst": medians[where],
            "where": where[0], "regret": max(best[place] - medians[place] for place in headline),
            "worst_seeds": [min(values[place][name][seed] for place in headline) for seed in sorted(seeds)],
        })  # fmt: skip
    for row, spread in zip(rows, intervals(values, headline, names), strict=True):
        row |= spread
    return sorted(rows, key=lambda row: (-row["worst"], row["regret"]))


def intervals(values: Grid, headline: Sequence[Place], names: Sequence[str]) -> list[JsonObject]:
    """Return between what worst median and regret of each objective lie in 90 % of resamples of the seeds.

    The seeds that all cells share are drawn with replacement, the same for every objective and place, since a seed is
    one of weights, order, noise and start. With few seeds this is a rough measure.
    """
    seeds = sorted(set.intersection(*(set(values[place][name]) for place in headline for name in names)))
    draw = random.Random(0)
    worst: dict[str, list[float]] = {name: [] for name in names}
    regret: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(RESAMPLES if seeds else 0):
        drawn = draw.choices(seeds, k=len(seeds))
        medians = {name: [median(values[place][name][seed] for seed in drawn) for place in headline] for name in names}
        best = [max(row) for row in zip(*medians.values(), strict=True)]
        for name, row in medians.items():
            worst[name].append(min(row))
            regret[name].append(max(top - value for top, value in zip(best, row, strict=True)))
    return [{"worst_interval": _middle(worst[name]), "regret_interval": _middle(regret[name])} for name in names]


def _middle(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered[round(share * (len(ordered) - 1))] for share in (0.05, 0.95)] if ordered else []


def rounding(study: Study, results: Results) -> list[JsonObject]:
    """Return the medians of the headline cells under either head, where a second rounding was run."""
    first, second = (grid(cells, results) for cells in (study.shared(), study.rounded()))
    return [
        {"regime": place[0], "noise": place[1], "objective": name,
         "medians": [median(first[place][name].values()), median(by_seed.values())]}
        for place, row in second.items() for name, by_seed in row.items()
    ]  # fmt: skip


def margins(rows: Sequence[Record], of: str) -> list[JsonObject]:
    """Return by how much the worst regime of one objective is above every other's: of the medians, and seed by seed."""
    own = next((row for row in rows if row["objective"] == of), None)
    if own is None:
        return []
    result = []
    for row in rows:
        if row is own:
            continue
        pairs = [a - b for a, b in zip(own["worst_seeds"], row["worst_seeds"], strict=True)]
        result.append({
            "against": row["objective"], "margin": own["worst"] - row["worst"], "median": median(pairs),
            "low": min(pairs), "high": max(pairs),
        })  # fmt: skip
    return result


def summary(study: Study, results: Results) -> JsonObject:
    """Return everything a study found, as plain values."""
    shared = grid(study.shared(), results)
    headline = [(name, noise) for name, regime in study.regimes.items() for noise in regime.headline]
    names = [repr(objective) for objective in study.everything]
    plain = [repr(objective) for objective in study.objectives]
    rates = chosen_rates(study, results)
    tuned = grid(study.tuned(rates), results)
    for place in headline:  # a regime with one candidate has nothing to choose
        tuned.setdefault(place, shared[place])
    places = [(name, noise) for name, regime in study.regimes.items() for noise in regime.noise]
    report: JsonObject = {
        "judge": study.judge, "objectives": plain, "remedies": [name for name in names if name not in plain],
        "headline": [list(place) for place in headline],
        "grid": [
            {"regime": regime, "noise": noise, "objective": name, **_spread(list(by_seed.values()))}
            for regime, noise in places for name, by_seed in shared[regime, noise].items()
        ],
        "tuned": [
            {"regime": regime, "noise": noise, "objective": name,
             "rate": rates.get((regime, noise, name), study.regimes[regime].rate), **_spread(list(by_seed.values()))}
            for regime, noise in headline for name, by_seed in tuned[regime, noise].items()
        ],
    }  # fmt: skip
    # The package's own proposal where it is compared, the paper's elsewhere.
    report["margins_of"] = next((name for name in map(repr, (Contaminated(), DEFT())) if name in plain), "")
    report["ends"] = ends(study, results)
    report["rounding"] = rounding(study, results)
    for kind, values in (("shared", shared), ("tuned", tuned)):
        among = names if kind == "shared" else plain
        rows = worst_regime(values, headline, among) if headline and (rates or kind == "shared") else []
        report[f"ranking_{kind}"] = rows
        report[f"margins_{kind}"] = margins([row for row in rows if row["objective"] in plain], report["margins_of"])
    return report


ENDS = {
    "val/nll": "val NLL", "gate/clean": "gate, clean", "gate/noisy": "gate, noisy", "noise/memorised": "memorised",
    "noise/recovered": "recovered", "noise/gradient_share": "gradient of noise", "gate/locked": "locked",
    "gate/mean": "gate", "prob/mean": "p", "noise/estimated": "noise, estimated", "forgetting/kl": "forgetting, KL",
    "left_out/share": "left out", "left_out/noisy": "noise among them",
}  # fmt: skip
LAST = 3  # logged steps that make an end


def ends(study: Study, results: Results) -> list[JsonObject]:
    """Return where the curves of the headline cells end, means over seeds of their last logged steps."""
    last_values: dict[tuple[str, float, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in study.shared():
        if cell.noise in cell.setting.headline:
            row, result = last_values[cell.regime, cell.noise, repr(cell.objective)], results[cell.id]
            for tag, (_, values) in result.get("curves", {}).items():
                if tag in ENDS:
                    row[tag].append(fmean(values[-1 if tag.startswith("val/") else -LAST :]))
            for tag in ENDS.keys() & result[cell.split].keys():
                row[tag].append(result[cell.split][tag])
    return [
        {"regime": regime, "noise": noise, "objective": name, **{tag: fmean(values) for tag, values in row.items()}}
        for (regime, noise, name), row in last_values.items()
    ]


def _spread(values: Sequence[float]) -> JsonObject:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": fmean(values), "se": error, "median": median(values), "values": list(values)}
