"""Processor seconds of a probe that reads rows of like length together, against one that reads them as they come.

    python tests/benchmarks/bench_probe.py --model DIR --source gsm8k_test.jsonl --rows 100 [--pairs 3]

Both probes read the same rows with the same model, in turns, so that what else the machine does falls on both. The
other one draws the order from the seed and fills batches with ``--batch_size`` rows, as the probe did at first. Tokens
are counted with padding, and exact for all rows. ``--unprompted`` adds the second pass, which is the same in both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from audit_sources import FORMS, rows_of

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning._lightning import attach
from deft_lightning.data.loading.collate import TrainCollator
from deft_lightning.data.loading.factory import LoaderFactory
from deft_lightning.data.loading.packing import bounded_batches
from deft_lightning.probe import probe_data
from deft_lightning.training.verbs.probe import load

Batches = Iterator[tuple[list[int], dict[str, Any]]]


def as_they_come(self: LoaderFactory, rows: Any, positions: Sequence[int]) -> Batches:
    """Yield batches of rows in an order drawn from the seed, whatever their lengths."""
    size, collate = self.settings.batch_size, TrainCollator(self.pad_id, weighted=rows.weighted)
    order = [positions[i] for i in np.random.default_rng([self.settings.seed]).permutation(len(positions))]
    for start in range(0, len(order), size):
        own = order[start : start + size]
        yield own, collate([rows.example(at) for at in own])


@contextmanager
def reading(before: bool) -> Iterator[None]:
    """Read rows as they come, if wanted."""
    own = LoaderFactory.some
    if before:
        LoaderFactory.some = as_they_come  # type: ignore[method-assign]
    try:
        yield
    finally:
        LoaderFactory.some = own  # type: ignore[method-assign]


def padded(lengths: Sequence[int], size: int, seed: int) -> tuple[int, int]:
    """Return the tokens that both ways read, padding included: as they come, and by length."""
    order = np.random.default_rng([seed]).permutation(len(lengths))
    drawn = [lengths[i] for i in order]
    came = sum(len(part) * max(part) for part in (drawn[at : at + size] for at in range(0, len(drawn), size)))
    batches = bounded_batches(lengths, size * max(lengths), seed)
    return came, sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal model with its tokenizer")
    parser.add_argument("--source", required=True, help="file of rows")
    parser.add_argument("--form", default="rows", choices=FORMS[:3], help="of the file")
    parser.add_argument("--rows", type=int, default=100, help="that are read")
    parser.add_argument("--counted", type=int, default=1000, help="rows whose tokens are counted")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--unprompted", action="store_true", help="with the second pass")
    parser.add_argument("--output", help="JSON to write")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    source = rows_of(Path(options.source), options.form)[: options.counted]
    data = InstructionDataModule(
        source, validation_fraction=0.0, max_length=1024, tokenizer=options.model, batch_size=options.batch_size,
        cache=False,
    )  # fmt: skip
    module = SFTModule(pretrained=options.model)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, monitors=False,
    )  # fmt: skip
    attach(trainer, module, data)
    data.prepare_data()
    data.setup("fit")
    load(trainer, module, None)
    lengths = [int(length) for length in data.splits["train"].examples.lengths()]
    came, sorted_ = padded(lengths, options.batch_size, data.settings.seed)
    print(
        f"{len(lengths)} rows: {came:,} tokens as they come, {sorted_:,} by length, {came / sorted_:.2f} times as many"
    )

    def seconds(before: bool) -> float:
        with reading(before):
            begun = time.process_time()
            probe_data(
                module, data, trainer.precision_plugin, trainer.strategy.root_device, examples=options.rows, truth=None,
                unprompted=options.unprompted,
            )  # fmt: skip
            return time.process_time() - begun

    pairs = []
    for pair in range(options.pairs):
        turns = [(before, seconds(before)) for before in ((True, False) if pair % 2 == 0 else (False, True))]
        own = dict(turns)
        pairs.append((own[True], own[False]))
        print(f"pair {pair + 1}: {own[True]:.1f} s as they come, {own[False]:.1f} s by length", flush=True)
    ratios = sorted(came_s / length_s for came_s, length_s in pairs)
    result = {
        "source": Path(options.source).name, "rows": options.rows, "batch_size": options.batch_size,
        "unprompted": options.unprompted, "tokens": {"rows": len(lengths), "as_they_come": came, "by_length": sorted_},
        "seconds": [[round(value, 2) for value in pair] for pair in pairs],
        "ratio": {"min": ratios[0], "median": statistics.median(ratios), "max": ratios[-1]},
    }  # fmt: skip
    print("ratio: " + ", ".join(f"{name} {value:.2f}" for name, value in result["ratio"].items()))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
