"""The tables of a study as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from deft_lightning.annotations import Record
from deft_lightning.objectives.parse import readable
from deft_lightning.study.advice import EXAMPLES, NEAR, served
from deft_lightning.study.report import ENDS

JUDGED = {
    "exact_match": "exact match",
    "nll": "plain NLL of held-out answers in nats per token (less is better)",
}
SIGN = {"exact_match": 1, "nll": -1}  # a report keeps minus the NLL: larger is better


def text(report: Record) -> str:
    """Return a report as Markdown."""
    parts = []
    for kind, about in (("shared", "one learning rate for all"), ("tuned", "a learning rate tuned for each")):
        if rows := report[f"ranking_{kind}"]:
            parts.append(_ranking(report, rows, about))
            parts.append(_margins(report["margins_of"], report[f"margins_{kind}"]))
    places = dict.fromkeys((row["regime"], row["noise"]) for row in report["grid"])
    for regime in dict.fromkeys(place[0] for place in places):
        parts.append(_table(report, regime, [noise for name, noise in places if name == regime]))
    parts.append(_before(report))
    parts += [_ends(report, regime, noise) for regime, noise in report["headline"]]
    parts += [_rounding(report), _advice(report), _rates(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _ranking(report: Record, rows: Sequence[Record], about: str) -> str:
    places = [f"{regime}, noise {noise:g}" for regime, noise in report["headline"]]
    lines = [
        f"### Worst regime, {about}", "", f"{judged(report)}, median over seeds.", "",
        f"| objective | {' | '.join(places)} | worst | 90 % | regret | 90 % | worst, seed by seed |",
        "|---" * (len(places) + 6) + "|",
    ]  # fmt: skip
    sign = SIGN[report["judge"]]
    for row in rows:
        medians = " | ".join(f"{sign * value:.3f}" for value in row["medians"])
        seeds = " ".join(f"{sign * value:.2f}" for value in row["worst_seeds"])
        star = " (remedy)" if row["objective"] in report["remedies"] else ""
        worst, regret = _interval(row["worst_interval"], sign), _interval(row["regret_interval"], 1)
        lines.append(
            f"| {readable(row['objective'])}{star} | {medians} | {sign * row['worst']:.3f} | {worst} |"
            f" {row['regret']:.3f} | {regret} | {seeds} |"
        )
    return "\n".join(lines)


def _interval(ends: Sequence[float], sign: int) -> str:
    return " to ".join(f"{sign * end:.2f}" for end in ends)


def _rounding(report: Record) -> str:
    if not report["rounding"]:
        return ""
    lines = [
        "### A second rounding", "",
        "Medians with the fused head and with the dense head, whose gradients agree to rounding. A cell where "
        "they differ by more than 0.05 is unstable.", "",
        "| regime | objective | fused | dense | difference |", "|---|---|---|---|---|",
    ]  # fmt: skip
    sign = SIGN[report["judge"]]
    for row in report["rounding"]:
        one, other = (sign * value for value in row["medians"])
        lines.append(
            f"| {row['regime']}, noise {row['noise']:g} | {readable(row['objective'])} | {one:.3f} | {other:.3f} |"
            f" {other - one:+.3f} |"
        )
    return "\n".join(lines)


def _before(report: Record) -> str:
    starts: dict[str, list[float]] = {}
    for row in report.get("bases", ()):
        if report["judge"] in row:
            starts.setdefault(row["regime"], []).append(row[report["judge"]])
    if not starts:
        return ""
    lines = [
        "### Before training", "",
        f"{judged(report)}, of the models that runs start from, against right answers: a base on rows like those that"
        " it was trained on, a pretrained model on the test rows.", "", "| regime | seed by seed |", "|---|---|",
    ]  # fmt: skip
    lines += [f"| {regime} | {' '.join(f'{value:.3f}' for value in values)} |" for regime, values in starts.items()]
    return "\n".join(lines)


def _margins(of: str, rows: Sequence[Record]) -> str:
    if not rows:
        return ""
    lines = [
        f"How much better the worst regime of {readable(of)} is than another's: by medians; seed by seed, "
        f"median and range.",
        "",
        "| against | margin | seed by seed |", "|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        seeds = f"{row['median']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
        lines.append(f"| {readable(row['against'])} | {row['margin']:+.3f} | {seeds} |")
    return "\n".join(lines)


def _table(report: Record, regime: str, noises: Sequence[float]) -> str:
    lines = [
        f"### {regime}: all noise rates, one learning rate", "",
        f"{judged(report)}, mean ± standard error over seeds.", "",
        "| objective | " + " | ".join(f"noise {noise:g}" for noise in noises) + " |", "|---" * (len(noises) + 1) + "|",
    ]  # fmt: skip
    rows = {(row["objective"], row["noise"]): row for row in report["grid"] if row["regime"] == regime}
    sign = SIGN[report["judge"]]
    for name in [*report["objectives"], *report["remedies"]]:
        cells = [rows.get((name, noise)) for noise in noises]
        if any(cells):
            lines.append(f"| {readable(name)} | " + " | ".join(_cell(cell, sign) for cell in cells) + " |")
    return "\n".join(lines)


def _ends(report: Record, regime: str, noise: float) -> str:
    rows = [row for row in report["ends"] if (row["regime"], row["noise"]) == (regime, noise)]
    tags = [tag for tag in ENDS if any(tag in row for row in rows)]
    if not tags:
        return ""
    lines = [
        f"### {regime}, noise {noise:g}: where the curves end, one learning rate", "",
        "Means over seeds. NLL: plain, of clean held-out rows; memorised: corrupted labels that are the first choice.",
        "", f"| objective | {' | '.join(ENDS[tag] for tag in tags)} |", "|---" * (len(tags) + 1) + "|",
    ]  # fmt: skip
    for row in rows:
        cells = (f"{row[tag]:.3f}" if tag in row else "-" for tag in tags)
        lines.append(f"| {readable(row['objective'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _advice(report: Record) -> str:
    rows = report.get("advice", ())
    if not rows:
        return ""
    lines = [
        "### What the probe recommends", "",
        f"From {EXAMPLES} training rows before the first step; in brackets the number of seeds. Behind: how far the"
        " median of its most frequent recommendation is below the best median. It is within"
        f" {NEAR:g}, or says that it cannot tell, in {served(rows)} of {len(rows)}.", "",
        "| regime | recommended | best | behind |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        named = ", ".join(
            f"{readable(name) if name else 'cannot tell'} ({count})" for name, count in row["recommended"].items()
        )
        behind = "-" if row["behind"] is None else f"{row['behind']:.3f}"
        lines.append(f"| {row['regime']}, noise {row['noise']:g} | {named} | {readable(row['best'])} | {behind} |")
    return "\n".join(lines)


def _rates(report: Record) -> str:
    if not report["ranking_tuned"]:
        return ""
    places = [tuple(place) for place in report["headline"]]
    lines = [
        "### Learning rates chosen on the validation split", "",
        "| objective | " + " | ".join(f"{regime}, noise {noise:g}" for regime, noise in places) + " |",
        "|---" * (len(places) + 1) + "|",
    ]  # fmt: skip
    rates = {(row["objective"], row["regime"], row["noise"]): row["rate"] for row in report["tuned"]}
    for name in report["objectives"]:
        lines.append(f"| {readable(name)} | " + " | ".join(f"{rates[name, *place]:g}" for place in places) + " |")
    return "\n".join(lines)


def judged(report: Record) -> str:
    """Return what the values of a report are, as the start of a sentence."""
    return JUDGED[report["judge"]][0].upper() + JUDGED[report["judge"]][1:]


def _cell(row: Record | None, sign: int) -> str:
    if row is None:
        return "-"
    return f"{sign * row['mean']:.3f}" + ("" if row["se"] is None else f" ± {row['se']:.3f}")
