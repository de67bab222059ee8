"""What the lines of a log and the summary cost: time of ten steps with them and without.

    python tests/benchmarks/bench_lines.py [--windows 24] [--width 128] [--output docs/evidence/data/bench_lines.json]

One run of the shape of configs/from_scratch.yaml, whose line and summary callbacks act in every second window of ten
steps, the default logging interval: a line each. Each window is compared with the one before it, so that a machine
whose speed drifts treats both alike; beside the median of these ratios stands the share of a window that is spent
inside the callbacks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.callbacks import RunSummary, SFTProgressBar

EVERY = 10  # --trainer.log_every_n_steps


def now() -> Any:
    """Return seconds of the clock and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


def measure(windows: int, width: int) -> dict[str, list[float]]:
    """Train, and return times of each window, and those inside the callbacks, by clock."""
    inside, ends, spent = np.zeros(2), [np.zeros(2)], []

    def timed(cls: Any, **options: Any) -> Any:
        def hook(name: str) -> Any:
            def call(self: Any, trainer: Any, *args: Any) -> None:
                nonlocal inside
                if len(ends) % 2 == 0:
                    start = now()
                    getattr(cls, name)(self, trainer, *args)
                    inside = inside + now() - start

            return call

        names = ("on_train_batch_start", "on_train_batch_end")
        return type("Timed", (cls,), {name: hook(name) for name in names})(**options)

    class Clock(Callback):
        """The last of the callbacks."""

        def on_train_start(self, *args: Any) -> None:
            ends[0] = now()

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            nonlocal inside
            if trainer.global_step % EVERY == 0:
                ends.append(now())
                spent.append(inside)
                inside = np.zeros(2)

    shape = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        data = InstructionDataModule(
            "reasoning_gym:spell_backward?size=5000&question=metadata.word", tokenizer_size=0, batch_size=64,
            validation_fraction=0.0,
        )  # fmt: skip
        callbacks = [timed(SFTProgressBar, style="lines"), timed(RunSummary), Clock()]
        Trainer(
            accelerator="cpu", devices=1, max_steps=windows * EVERY, log_every_n_steps=EVERY, default_root_dir=folder,
            callbacks=callbacks, enable_checkpointing=False, enable_model_summary=False,
        ).fit(SFTModule(architecture=shape), data)  # fmt: skip
    found = {"": np.diff(np.array(ends), axis=0), "_inside": np.array(spent)}
    return {f"{clock}{of}": found[of][:, i].tolist() for i, clock in enumerate(("wall", "cpu")) for of in found}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(args.windows, args.width)
    watched = range(1, len(found["wall"]), 2)
    result = {
        "width": args.width, "cores": os.cpu_count(),
        "step_s": {clock: statistics.median(found[clock]) / EVERY for clock in ("wall", "cpu")},
        "time_ratio": {clock: statistics.median(found[clock][i] / found[clock][i - 1] for i in watched)
                       for clock in ("wall", "cpu")},
        "share_inside": {clock: statistics.median(found[f"{clock}_inside"][i] / found[clock][i] for i in watched)
                         for clock in ("wall", "cpu")},
        "inside_cpu_ms": 1e3 * statistics.median(found["cpu_inside"][i] for i in watched),
        "windows": found,
    }  # fmt: skip
    print(json.dumps({name: value for name, value in result.items() if name != "windows"}, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
