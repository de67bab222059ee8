"""How well the audit tells corrupted rows of real text from clean ones, with the model as it is and by cross-fitting.

    python tests/benchmarks/bench_audit_folds.py --model DIR --source gsm8k_test.jsonl --rows 40 [--output FILE.json]
    python tests/benchmarks/bench_audit_folds.py --model DIR --source svamp_test.jsonl --form svamp --style last_number

Half of the rows are corrupted, as in ``bench_audit_rows.py``; both probes read the same rows, one with ``--folds``.
Each is the verb's own, in float32, ``--truth`` included. What a killed one has read is not read again with ``--cache``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from audit_sources import FORMS, rows_of
from bench_audit_rows import halves, modules

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.data.examples import Prepared


def as_rows(labelled: list[tuple[bool, Prepared]]) -> list[dict[str, Any]]:
    """Return prepared rows as rows of tokens that say which are noisy."""
    return [
        {"id": row.id, "input_ids": row.input_ids.tolist(), "labels": row.labels.tolist(), "wrong": noisy}
        for noisy, row in labelled
    ]


def probed(options: argparse.Namespace, rows: list[dict[str, Any]], folds: int | None, root: Path) -> dict[str, Any]:
    """Return the AUROC of every score with its interval, the mean NLL, and the processor seconds it took."""
    data = InstructionDataModule(
        rows, validation_fraction=0.0, max_length=1024, tokenizer=options.model, batch_size=4, cache=False
    )
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=str(root))
    begun = time.process_time()
    report = trainer.probe(SFTModule(pretrained=options.model), data, output=str(root), truth="wrong", folds=folds)
    truth = report["truth"]
    return {
        "rows": truth["known"], "noisy": truth["noisy"], "scores": truth["scores"], "nll": report["means"]["nll"],
        "tokens": report["tokens"], "folds": report.get("folds"), "seconds": time.process_time() - begun,
    }  # fmt: skip


def main(args: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal model with its tokenizer")
    parser.add_argument("--source", required=True, help="file of rows")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--first", type=int, default=0, help="rows to leave out in front")
    parser.add_argument("--form", default="rows", choices=FORMS, help="of the file")
    parser.add_argument("--style", default="gsm8k", help="where AnswerCorrupt looks for the answer")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--only", help="one operation alone")
    parser.add_argument("--cache", help="folder for what is read, so that a killed run goes on")
    parser.add_argument("--output", help="JSON to write")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    source = rows_of(Path(options.source), options.form)[options.first : options.first + options.rows]
    files = halves(modules(source, options.model, options.style, corrupted=True))
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, labelled in files.items():
            if options.only not in (None, name):
                continue
            rows, result[name] = as_rows(labelled), {}
            for kind, folds in (("plain", None), ("folds", options.folds)):
                root = Path(options.cache or temporary) / f"{Path(options.source).stem} {name} {kind}"
                found = result[name][kind] = probed(options, rows, folds, root)
                print(f"== {name}, {kind}: nll {found['nll']:.3f}, {found['seconds']:.0f} s")
                for score, row in found["scores"].items():
                    print(f"   {score:10} {row['auroc']:.3f} ({row['low']:.3f} to {row['high']:.3f})", flush=True)
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
