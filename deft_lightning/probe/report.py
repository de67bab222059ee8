"""What a probe says: a table for the terminal, and where the run lies between weak and strong prior."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from deft_lightning.annotations import JsonObject, Record
from deft_lightning.probe.crossfit import folds_text
from deft_lightning.probe.knowledge import knowledge_text
from deft_lightning.probe.rate import rate_text
from deft_lightning.probe.truth import truth_text
from deft_lightning.terminal import visible

WEAK, STRONG = 1 / 3, 2 / 3
WIDTH = 80


def prior(means: Mapping[str, float]) -> JsonObject:
    """Say where the model stands towards the data, by the mean target probability.

    ``position`` is mean p: below 1/3 the prior is called weak, from 2/3 strong, between them intermediate; the bounds
    are a convention of this package. ``concentration`` is mean C, the mean focus that DEFT would have.
    ``overconfidence`` is mean C / mean p. On targets drawn from the model itself it is 1, for then the expected p of a
    token is ``sum_v pi_v^2 = C``; above 1 the model is surer than it is right, be the labels noisy or the model wrong.

    Args:
        means: ``p`` and ``collision``.
    """
    p, focus = means["p"], means["collision"]
    kind = "weak" if p < WEAK else "intermediate" if p < STRONG else "strong"
    says = {
        "weak": "it has most of this still to learn: objectives near NLL (small focus) let it",
        "intermediate": "it knows some of this: a focus that adapts to each token (DEFT, Cayley) is made for it",
        "strong": "it knows most of this: objectives near Likelihood (large focus) guard it against wrong labels",
    }[kind]
    ratio = focus / p if p else None
    text = f"{kind} prior (mean p {p:.3g}; weak below 1/3, strong from 2/3): {says}."
    if ratio is not None:
        text += f" Mean C / mean p = {ratio:.3g}" + (
            ": it is surer than it is right." if ratio > 1.1 else ": it is about as sure as it is right."
            if ratio > 1 / 1.1 else ": it is right more often than it is sure."
        )  # fmt: skip
    return {"kind": kind, "position": p, "concentration": focus, "overconfidence": ratio, "text": text}


def table(report: Record) -> str:
    """Return a report as text of at most 80 columns, names and texts of the data aside."""
    means = report["means"]
    weights = f"checkpoint {report['checkpoint']}" if report["checkpoint"] else report["model"]
    lines = [
        f"{report['data']}: {report['examples']} of {report['examples_total']} training examples,",
        f"{report['tokens']} supervised tokens; {weights}",
        *_filled(folds_text(report["folds"]) if "folds" in report else ""),
        "",
        f"mean p {means['p']:.4f}   H {means['entropy']:.4f}   H2 {means['renyi2']:.4f}   C {means['collision']:.4f}",
        f"NLL {means['nll']:.4f}   accuracy {means['accuracy']:.4f}",
        *_filled(report["prior"]["text"]),
        "",
        *_objectives(report),
    ]
    if report["noise"]:
        keys = ("tokens", "auroc_gate", "auroc_prob", "auroc_conflict", "auroc_example")
        rows = [(row["operation"], [row.get(key) for key in keys]) for row in report["noise"]]
        lines += ["", "AUROC against clean tokens (examples: against clean examples)"]
        lines += _columns("noise", ("tokens", "1 - gate", "1 - p", "conflict", "examples"), rows)
    truth = report.get("truth")
    knows = knowledge_text(report["knowledge"])
    for paragraph in [""] * bool(knows) + knows:
        lines += _filled(paragraph) or [""]
    if truth:
        for paragraph in ["", *truth_text(truth)]:
            lines += _filled(paragraph) or [""]
    estimate = report.get("noise_estimate")
    if estimate:
        lines.append("")
        for paragraph in rate_text(estimate, report["noise"], truth):
            lines += _filled(paragraph)
    if report["suspicious"]:
        lines += [
            "",
            "most suspicious examples",
            "(score in nats, its largest part, and the labels at that place)",
        ]
    for record in report["suspicious"]:
        place = record["place"]
        shown = "" if place is None else f": {_short(place['text'], 24)!r} at {place['start']}"
        known = "" if record["noisy"] is None else " [noisy]" if record["noisy"] else " [clean]"
        row = "" if record["row"] is None else f" (row {record['row']})"
        score = f"{_number(record['score'])}, {record['part']}"
        lines += [f"{record['rank']}. {_short(record['id'], 60)}{row}{known} {score}{shown}"]
        lines += [f"   {_short(record['answer'], 74)}"]
    if "recommendation" in report:
        lines += ["", *_filled("objective: " + report["recommendation"]["text"] + ".")]
    return visible("\n".join(lines))


def _objectives(report: Record) -> list[str]:
    noisy = any("gate_noisy" in row for row in report["objectives"])
    head = ("mean gate", "ess", "shrinkage", "lr factor") + (("clean", "noisy") if noisy else ())
    keys = ("gate", "ess", "shrinkage", "lr_factor") + (("gate_clean", "gate_noisy") if noisy else ())
    rows = [
        (f"{'*' if row['chosen'] else ' '} {row['name']}", [row.get(key) for key in keys])
        for row in report["objectives"]
    ]
    lines = _columns("objective", head, rows)
    lines.append("* chosen; shrinkage: gradient mass relative to NLL; lr factor: its inverse")
    # The whole reason is in probe.json: that of a class of one's own may be a page.
    return lines + [textwrap.shorten(f"  left out {name}: {why}", 80) for name, why in report["left_out"].items()]


def _columns(title: str, head: Sequence[str], rows: Sequence[tuple[str, list[float | None]]]) -> list[str]:
    """Return a table. A name that is longer than those of this package pushes its numbers to the right."""
    width = min(max(len(name) for name in (title, *(name for name, _ in rows))), WIDTH - 10 * len(head))
    return [
        f"{name:<{width}}" + "".join(f"{value:>10}" for value in values)
        for name, values in [(title, list(head)), *((name, [_number(v) for v in values]) for name, values in rows)]
    ]


def _filled(text: str) -> list[str]:
    """Wrap a paragraph; what it is indented by stays."""
    margin = " " * (len(text) - len(text.lstrip()))
    return textwrap.wrap(
        text.strip(), WIDTH, initial_indent=margin, subsequent_indent=margin + "  " * bool(margin),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _short(text: str, letters: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= letters else f"{line[:letters]} …"
