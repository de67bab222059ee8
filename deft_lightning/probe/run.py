"""One pass without gradients over a sample of the training data, and one over its answers without their prompts."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from numpy.typing import NDArray

from deft_lightning._version import __version__
from deft_lightning.annotations import JsonObject
from deft_lightning.atomic import remove, whole_file
from deft_lightning.data.prepared.recipe import title
from deft_lightning.errors import UserError
from deft_lightning.figures.tokens import NAME, TokenSample
from deft_lightning.metrics import exact_auroc
from deft_lightning.models.fingerprint import fingerprint
from deft_lightning.probe.audit import AuditTally, Suspect, describe, finite, write_lines
from deft_lightning.probe.bare import Bare, bare_pass
from deft_lightning.probe.crossfit import COST, fold_record, joined, parts_of
from deft_lightning.probe.evidence import EvidenceTally
from deft_lightning.probe.figure import probe_figure
from deft_lightning.probe.kept import FOLDER
from deft_lightning.probe.knowledge import knowledge
from deft_lightning.probe.rate import Estimate, measured, noise_rate, rate_record
from deft_lightning.probe.reading import SPLIT, Read, announce, read_rows
from deft_lightning.probe.recommend import FEW, Facts, recommend
from deft_lightning.probe.report import prior, table
from deft_lightning.probe.sample import Sampler
from deft_lightning.probe.tally import Tally, candidates, check_seen
from deft_lightning.probe.truth import truth_record

SHOWN = 5  # suspicious examples that are printed


class Watcher(Protocol):
    """What wants to see every batch that is read: a page of the rows, say."""

    def update(self, read: Read) -> None:
        """Look at a batch; it is not to be kept whole."""


def probe_data(
    module: Any,
    data: Any,
    precision: Any,
    device: torch.device,
    *,
    examples: int | None,
    truth: str | None,
    unprompted: bool = True,
    output: Path | None = None,
    watchers: Sequence[Watcher] = (),
    folds: int | None = None,
) -> tuple[dict[str, Any], list[Suspect], TokenSample]:
    """Run the model over the examples.

    Returns the report, every example, the most suspicious first, and a sample of the tokens.

    Args:
        module: SFTModule with its model built.
        data: InstructionDataModule, set up.
        precision: Lightning's precision plugin.
        device: Where the model is.
        examples: How many, spread over the training split; None for all.
        truth: Field of the rows that says which are noisy.
        unprompted: Whether to look at the answers without their prompts too, in a second pass.
        output: Folder where what is read is kept until the report is written, so that a killed probe goes on; None
            keeps nothing.
        watchers: See every batch as well.
        folds: Into how many parts the rows are split, each read by an adapter that was trained on the others; None
            reads them with the model as it is.

    Raises:
        UserError: The chosen objective wants the second pass; nothing is supervised; the model gives no numbers;
            the folds cannot be made.
    """
    operations = numbered([type(op).__name__ for op in data.noise.ops])
    objectives, name, left_out = candidates(module.current_objective)
    tally = Tally(objectives, name, operations)
    sampler, context = Sampler(tally.topks), module.batch_loss.context
    if context.unprompted and not unprompted:
        raise UserError(
            f"probe: {name} compares with what the model says of the answers without their prompts, which"
            " --unprompted false leaves out"
        )
    evidence = None if context.unigram is None else EvidenceTally(context.unigram, len(operations))
    indices, audit, bare, read = data.spread(SPLIT, examples), AuditTally(), None, 0
    known = None if truth is None else data.truths(truth)
    text = cache(lambda token: str(data.tokenizer.decode([token])))
    was_training = {layer: layer.training for layer in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            about = (__version__, fingerprint(module.model), repr(module.current_objective), tally.topks, unprompted)
            given = (*about, str(module.model.config), type(precision).__name__, module.dtype)
            parts, bares = parts_of(module, data, indices, precision, device, folds, output, given), list[Bare]()
            with precision.forward_context():
                passes = len(tally.topks) + 0.5 * unprompted + COST * (len(parts) - 1)
                announce(module, data, indices, device, passes)
            for part in parts:
                # An adapter is trained before autocast begins, which would keep copies of its weights as they were.
                with part.model, precision.forward_context():
                    rows, kept = part.positions, part.kept
                    if unprompted:
                        bare = bare_pass(module, data, SPLIT, rows, device, kept)
                        bares.append(bare)
                    for batch in read_rows(module, data, rows, device, tally.topks, bare, kept):
                        sampler.update(batch.by_topk, batch.keep, batch.positions, batch.codes)
                        tally.update(batch.by_topk, batch.codes)
                        audit.update(batch)
                        if evidence is not None:
                            about_tokens = (batch.labels, batch.keep, batch.positions, batch.codes, batch.bare)
                            evidence.update(batch.stats, *about_tokens)
                        for watcher in watchers:
                            watcher.update(batch)
                        read += batch.batch["input_ids"].numel()
    finally:
        for layer, training in was_training.items():
            layer.training = training
    check_seen(tally)
    bare = joined(bares) if bares else None
    suspects, scored = audit.suspects(known, bool(operations), text)
    means = tally.means()
    noise = tally.noise()
    for row in noise:
        row |= _of_examples(suspects, operations.index(row["operation"]) + 1)
    report: JsonObject = {
        "version": __version__, "model": named(module), "checkpoint": None, "data": title(data.source),
        "examples": len(suspects), "examples_total": data.size(SPLIT),
        "tokens": tally.tokens, "means": means, "prior": prior(means), "objectives": tally.table(),
        "left_out": {**left_out, **tally.failed}, "noise": noise, "histograms": tally.histograms(),
    }  # fmt: skip
    report["knowledge"] = knowledge(data, SPLIT, indices, scored, text)
    if truth is not None or operations:
        by_row = sorted(suspects, key=lambda suspect: suspect.at)
        report["truth"] = truth_record(truth, scored.scores, [suspect.noisy for suspect in by_row])
    if evidence is not None:
        right = _estimate(report, evidence, suspects, operations, bare, read)
        suspects = [replace(suspect, right=right.get(suspect.at)) for suspect in suspects]
    if folds is not None:
        report["folds"] = fold_record(parts)
        report.pop("recommendation", None)  # it is for the model that training starts from
    report["suspicious"] = list(records(data, suspects[:SHOWN]))
    return report, suspects, sampler.sample(operations)


def _estimate(
    report: JsonObject, evidence: EvidenceTally, suspects: Sequence[Suspect], operations: Sequence[str],
    bare: Bare | None, read: int,
) -> dict[int, float]:  # fmt: skip
    """Add the estimated noise rate, what was measured for a recommendation, and that.

    Returns:
        By position in the split, the probability that an answer is right; empty where no estimate is claimed.
    """
    answers = evidence.answers()
    estimate = noise_rate(answers)
    noise, found = rate_record(answers, estimate), measured(answers, estimate)
    noise["reliable"] = found["gain_positive"] >= FEW
    noise["asked"] = float(answers.asked.mean())
    noise["second_pass"] = None
    if bare is not None:
        noise["second_pass"] = {"read": bare.read, "share": bare.read / read, "whole": len(bare.whole)}
    noise |= {"injected": None, "auroc": None}
    hit = answers.corrupted > 0
    if operations:
        share = float(answers.corrupted.sum() / answers.tokens.sum())
        noise |= {"injected": {"answers": float(hit.mean()), "tokens": share}, "auroc": _told(estimate, hit, ~hit)}
    by_position = {suspect.at: suspect for suspect in suspects}
    about = [by_position[at] for at in answers.position.tolist()]
    for row in report["noise"]:
        code = operations.index(row["operation"]) + 1
        own = np.array([code in suspect.operations for suspect in about])
        row["judged_noise"] = float(1 - estimate.right[own].mean()) if own.any() else None
        row["auroc_evidence"] = _told(estimate, own, ~hit)
        row["auroc_evidence_token"] = evidence.token_auroc(code)
    if "truth" in report:
        noisy, clean = (np.array([suspect.noisy is value for suspect in about]) for value in (True, False))
        report["truth"]["auroc_evidence"] = _told(estimate, noisy, clean)
    looked_at = ("gain_token", "gain_positive", "sure", "sure_right")
    facts = Facts(noise["answers"], noise["tokens"], *(found[name] for name in looked_at))
    report |= {"noise_estimate": noise, "measured": found, "recommendation": recommend(facts)._asdict()}
    return dict(zip(answers.position.tolist(), estimate.right.tolist(), strict=True)) if noise["reliable"] else {}


def _told(estimate: Estimate, noisy: NDArray[np.bool_], clean: NDArray[np.bool_]) -> float | None:
    """Return how well the evidence tells noisy answers from clean ones; None without both."""
    if not noisy.any() or not clean.any():
        return None
    return exact_auroc((-estimate.evidence[noisy]).tolist(), (-estimate.evidence[clean]).tolist())


def numbered(names: Sequence[str]) -> list[str]:
    """Return names that tell operations of the same class apart: the second one is ``Name 2``."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return result


def named(module: Any) -> str:
    """Return what the model started from."""
    kind = (module.architecture or {}).get("model_type", "a model of the caller's")
    return str(module.pretrained or f"random weights of {kind}")


def _of_examples(suspects: Sequence[Suspect], code: int) -> JsonObject:
    """Return examples that an operation hit, and how well the score tells them from those that none hit."""
    hit = [suspect.score for suspect in suspects if code in suspect.operations]
    clean = [suspect.score for suspect in suspects if not suspect.operations]
    return {"examples": len(hit), "auroc_example": exact_auroc(hit, clean) if hit and clean else None}


def records(data: Any, suspects: Sequence[Suspect]) -> Iterator[JsonObject]:
    """Yield the records of examples in order of rank."""
    origins = data.origins({suspect.id for suspect in suspects})
    operations = numbered([type(op).__name__ for op in data.noise.ops])
    for rank, suspect in enumerate(suspects, start=1):
        example = data.example(SPLIT, suspect.at)
        origin = origins.get(suspect.id)
        yield describe(suspect, rank, example, data.tokenizer, operations, bool(operations), origin)


def write(
    report: JsonObject,
    suspects: Sequence[Suspect],
    sample: TokenSample,
    data: Any,
    output: Path,
    audit: Path | None,
) -> None:
    """Print the table, write ``probe.json``, ``tokens.npz`` and the figure, and the audit if one is wanted."""
    print(table(report))
    text = json.dumps(finite(report), ensure_ascii=False, allow_nan=False, indent=1)
    with whole_file(output / "probe.json") as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    sample.save(output / NAME)
    try:
        probe_figure(report, output / "probe.png", output / "probe.svg")
    except UserError as error:  # no matplotlib: the numbers are there all the same
        rank_zero_info(f"probe: no figure: {error}")
    if audit is not None:
        write_lines(audit, records(data, suspects))
        rank_zero_info(f"probe: {len(suspects)} examples ranked in {audit.resolve()}; to train without the worst:")
        rank_zero_info(f"  fit --data.exclude {shlex.quote(str(audit))} --data.exclude_top 5%")
    remove(output / FOLDER)
    rank_zero_info(f"probe: {output.resolve()}")
