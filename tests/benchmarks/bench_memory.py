"""The estimate of memory against what real fits take, on a CPU; and the table of what fits on a GPU.

    python tests/benchmarks/bench_memory.py [--sizes 23M 57M 135M] [--only NAME ...]
        [--output docs/evidence/data/bench_memory.json]
    python tests/benchmarks/bench_memory.py --table

Each fit is a process of its own: three optimizer steps of a Llama with random weights, on rows that all have as many
tokens as a batch is long, with the recipe of `fit`. Measured is the peak of its resident memory above what it held
before the model was built (Linux: /proc/self/status, VmHWM reset there). The table needs no memory: shapes alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# The largest is SmolLM2-135M's; vocabularies are those of such models, the data has bytes.
SHAPES: dict[str, dict[str, Any]] = {
    "23M": {"hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 8, "num_attention_heads": 5,
            "vocab_size": 32_000},
    "57M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8,
            "vocab_size": 32_000},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49_152},
}  # fmt: skip
BATCHES = {"23M": (4, 256), "57M": (2, 256), "135M": (2, 256)}  # rows and their tokens
RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, checkpointing": {"gradient_checkpointing": True},
    "LoRA": {"lora": 16},
    "LoRA, checkpointing": {"lora": 16, "gradient_checkpointing": True},
}
LIMIT = 0.15
GIB = 2**30


def status(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise KeyError(name)


def fit(size: str, run: str, precision: str) -> None:
    """Train in this process; print what it took and what was estimated."""
    import numpy as np
    import torch

    from deft_lightning import InstructionDataModule, SFTModule, Trainer
    from deft_lightning.models import LoRA
    from deft_lightning.training.memory import estimate_of

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    found: dict[str, Any] = {}

    class Measured(SFTModule):
        def configure_model(self) -> None:
            if self.model is None:
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
                found["before"] = status("VmRSS")
            super().configure_model()
            found["estimate"] = vars(estimate_of(self, self.prompts.largest_batch))

    (rows, length), options = BATCHES[size], dict(RUNS[run])
    letters = np.random.default_rng(0).integers(97, 123, (3 * rows, length)).astype(np.uint8)
    if (rank := options.pop("lora", None)) is not None:
        options["lora"] = LoRA(rank)
    architecture = {
        "model_type": "llama", "max_position_embeddings": 1024, "tie_word_embeddings": True, **SHAPES[size]
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        data = InstructionDataModule(
            [{"text": bytes(row).decode()} for row in letters], tokenizer_size=0, max_length=length, batch_size=rows,
            validation_fraction=0.0, cache=False,
        )  # fmt: skip
        module = Measured(architecture=architecture, **options)
        trainer = Trainer(
            max_steps=3, default_root_dir=folder, accelerator="cpu", devices=1, precision=precision,
            enable_progress_bar=False, log_every_n_steps=10,
        )  # fmt: skip
        begun = time.perf_counter()
        trainer.fit(module, data)
    found |= {"peak": status("VmHWM") - found["before"], "seconds": time.perf_counter() - begun}
    print(json.dumps(found))


def measure(size: str, run: str, precision: str) -> dict[str, Any]:
    """Return what a fit took, from a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--fit", size, run, precision], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    rows, length = BATCHES[size]
    return {
        "size": size, "run": run, "precision": precision, "rows": rows, "length": length,
        "estimate": found["estimate"], "estimated_GiB": found["estimate"]["peak"] / GIB,
        "measured_GiB": found["peak"] / GIB, "ratio": found["estimate"]["peak"] / found["peak"],
        "seconds": found["seconds"],
    }  # fmt: skip


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--precision", nargs="+", default=["32-true"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--fit", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fit:
        fit(*args.fit)
        return
    results = []
    for size in args.sizes:
        for run in args.only:
            for precision in args.precision:
                found = measure(size, run, precision)
                results.append(found)
                print(
                    f"{size:>5} {run:<20} {precision:<10} estimated {found['estimated_GiB']:.2f} GiB, measured"
                    f" {found['measured_GiB']:.2f} GiB, ratio {found['ratio']:.2f}, {found['seconds']:.0f} s",
                    flush=True,
                )
                if args.output:
                    args.output.write_text(
                        json.dumps({"cores": os.cpu_count(), "runs": results}, indent=2) + "\n", encoding="utf-8"
                    )
    worst = max(abs(found["ratio"] - 1) for found in results)
    print(f"furthest off: {worst:.0%}, the goal is {LIMIT:.0%}")


if __name__ == "__main__":
    main()
