"""What gate/locked shows of a plateau, of wrong labels and of neither, and what frees a plateau.

    python tests/benchmarks/bench_locked.py [--steps 150] [--output docs/evidence/data/bench_locked.json]

Sums of two digits, by a Llama of 0.1M parameters. Two models to start from are trained with NLL: one gives the right
sums, one says 07 to everything. Each is then trained on with other rows and objectives. Told are means over the last
ten logged steps, the validation on right sums, and whether the run was warned of locked tokens.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.callbacks import GateMonitor
from deft_lightning.data import Noise, ResponseSwap
from deft_lightning.objectives import DEFT, NLL, Floored, Objective, Schedule

SHAPE = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
WRONG = 0.6  # share of the rows that are hit
TAGS = ("gate/locked", "gate/locked_clean", "prob/mean", "gate/mean")
draw = random.Random(0)
Answer = Callable[[int, int], int]


def right(a: int, b: int) -> int:
    return a + b


def constant(a: int, b: int) -> int:
    return 7


def often_wrong(a: int, b: int) -> int:
    return draw.randrange(19) if draw.random() < WRONG else a + b


def write_sums(path: Path, answer: Answer, count: int) -> str:
    pairs = [(draw.randrange(10), draw.randrange(10)) for _ in range(count)]
    texts = [(f"{a}+{b}", f"{answer(a, b):02d}") for a, b in pairs]
    rows = [{"id": f"{path.stem}{i}", "question": q, "answer": a} for i, (q, a) in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(
    folder: Path, name: str, objective: Objective, answer: Answer, steps: int, start: str | None, swapped: bool = False
) -> dict[str, Any]:
    """Train, export to the folder's NAME, and tell how it ended."""
    torch.manual_seed(1)
    rate = 1e-3 if start else 4e-3
    module = SFTModule(
        objective, pretrained=start, architecture=None if start else SHAPE,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.01),
    )  # fmt: skip
    data = InstructionDataModule(
        write_sums(folder / f"{name}-train.jsonl", answer, 6400), tokenizer_size=0, batch_size=64, eval_batch_size=200,
        validation_source=write_sums(folder / f"{name}-val.jsonl", right, 200),
        noise=Noise(ops=[ResponseSwap(WRONG)] if swapped else []),
    )  # fmt: skip
    log = CSVLogger(str(folder), name=f"{name}-log", version=0)
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, logger=log, callbacks=[GateMonitor(histograms=False)], accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=5,
        val_check_interval=steps, check_val_every_n_epoch=None, gradient_clip_val=1.0,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, data)
    trainer.export(module, output=str(folder / name), datamodule=data)
    rows = list(csv.DictReader(Path(log.log_dir, "metrics.csv").read_text().splitlines()))
    columns = {tag: [float(row[tag]) for row in rows if row.get(tag)][-10:] for tag in (*TAGS, "val/nll")}
    found = {tag: round(fmean(values), 4) for tag, values in columns.items() if values}
    accuracy = round(float(trainer.callback_metrics["val/token_accuracy"]), 4)
    warned = any("gate/locked: for" in str(warning.message) for warning in caught)
    print(name, {**found, "val/token_accuracy": accuracy, "warned": warned}, flush=True)
    return {"name": name, "objective": repr(objective), **found, "val/token_accuracy": accuracy, "warned": warned}


def main() -> None:
    """Train the two models, then go on with each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        table = [
            train(folder, "knows the sums", NLL(), right, 300, None),
            train(folder, "says 07", NLL(), constant, 60, None),
        ]
        knows, says = str(folder / "knows the sums"), str(folder / "says 07")
        for objective in (DEFT(), NLL(), Schedule(), Floored(), Floored(decay="linear")):
            table.append(train(folder, f"says 07, right rows, {objective!r}", objective, right, args.steps, says))
        table.append(train(folder, "knows, right rows", DEFT(), right, args.steps, knows))
        table.append(train(folder, "knows, wrong rows", DEFT(), often_wrong, args.steps, knows))
        table.append(train(folder, "knows, swapped rows", DEFT(), right, args.steps, knows, swapped=True))
    if args.output:
        args.output.write_text(json.dumps({"steps": args.steps, "runs": table}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
