"""What a probe says: a table for the terminal, and where the run lies between weak and strong prior."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from deft_lightning.annotations import JsonObject, Record
from deft_lightning.terminal import visible

WEAK, STRONG = 1 / 3, 2 / 3


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
    """Return a report as text of at most 120 columns, texts of the data aside."""
    means = report["means"]
    weights = f"checkpoint {report['checkpoint']}" if report["checkpoint"] else report["model"]
    lines = [
        f"{report['data']}: {report['examples']} of {report['examples_total']} training examples,"
        f" {report['tokens']} supervised tokens; {weights}",
        "",
        f"mean p {means['p']:.4f}   H {means['entropy']:.4f}   H2 {means['renyi2']:.4f}   C {means['collision']:.4f}  "
        f" NLL {means['nll']:.4f}   accuracy {means['accuracy']:.4f}",
        textwrap.fill(report["prior"]["text"], 118),
        "",
    ]
    noisy = any("gate_noisy" in row for row in report["objectives"])
    width = max(len(row["name"]) for row in report["objectives"]) + 2
    head = ("mean gate", "ess", "shrinkage", "lr factor") + (("clean", "noisy") if noisy else ())
    lines.append(f"{'objective':<{width}}" + "".join(f"{word:>11}" for word in head))
    keys = ("gate", "ess", "shrinkage", "lr_factor") + (("gate_clean", "gate_noisy") if noisy else ())
    for row in report["objectives"]:
        name = f"{'*' if row['chosen'] else ' '} {row['name']}"
        lines.append(f"{name:<{width}}" + "".join(f"{_number(row.get(key)):>11}" for key in keys))
    lines.append("* chosen; shrinkage: gradient mass relative to NLL; lr factor: its inverse")
    lines += [f"  left out {name}: {why}" for name, why in report["left_out"].items()]
    if report["noise"]:
        lines += ["", "AUROC against clean tokens (examples: against clean examples)"]
        head = ("tokens", "1 - gate", "1 - p", "conflict", "examples")
        lines.append(f"{'noise':<{width}}" + "".join(f"{word:>11}" for word in head))
        keys = ("tokens", "auroc_gate", "auroc_prob", "auroc_conflict", "auroc_example")
        for row in report["noise"]:
            lines.append(f"{row['operation']:<{width}}" + "".join(f"{_number(row.get(key)):>11}" for key in keys))
    if report.get("truth"):
        truth = report["truth"]
        lines += ["", f"{truth['field']}: {truth['wrong']} of {truth['known']} wrong, AUROC {_number(truth['auroc'])}"]
    if report["suspicious"]:
        lines += ["", "most suspicious examples (confident conflict in nats; what is learnt where the model objects)"]
    for record in report["suspicious"]:
        worst = max(record["spans"], key=lambda span: span["score"] or 0.0, default=None)
        shown = "" if worst is None else f": {_short(worst['text'])!r} at {worst['start']}"
        known = "" if record["is_noisy"] is None else " [noisy]" if record["is_noisy"] else " [clean]"
        lines += [f"{record['rank']}. {_short(record['id'], 80)}{known} {_number(record['score'])}{shown}"]
        lines += [f"   {_short(record['text'], 100)}"]
    return visible("\n".join(lines))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _short(text: str, letters: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= letters else f"{line[:letters]} …"
