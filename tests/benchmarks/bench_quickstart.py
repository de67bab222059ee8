"""Time to the first step of a run from random weights, and its tokens per second against a bare PyTorch loop.

    python tests/benchmarks/bench_quickstart.py [--rounds 5] [--steps 150]
        [--output docs/evidence/data/bench_quickstart.json]

Each figure comes from whole processes, run in turn (package, bare loop, package, ...), so that a machine whose speed
drifts treats both alike. The bare loop has the same architecture, batches, optimizer and clipping, and transformers'
own cross entropy; no schedule, monitors, logging, bars or checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "from_scratch.yaml"
SKIP = 20  # steps before the clock starts: allocators and caches settle


def bare_loop(steps: int) -> None:
    """Train the model of configs/from_scratch.yaml in a plain loop and print tokens per second."""
    import torch
    import yaml

    from deft_lightning.data import InstructionDataModule, Noise, ResponseSwap
    from deft_lightning.models import from_architecture

    config = yaml.safe_load(CONFIG.read_text())
    torch.manual_seed(config["seed_everything"])
    settings = dict(config["data"])
    rate = settings.pop("noise")["ops"][0]["init_args"]["rate"]
    data = InstructionDataModule(**settings, noise=Noise(ops=[ResponseSwap(rate)]))
    data.setup("fit")
    model = from_architecture(config["model"]["architecture"], data.tokenizer, "float32")
    options = config["model"]["optimizer"]["init_args"]
    optimizer = torch.optim.AdamW(model.parameters(), **{**options, "betas": tuple(options["betas"])})
    batches = iter(data.train_dataloader())
    tokens, start = 0, 0.0
    for step in range(steps):
        batch = next(batches)
        loss = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += batch["num_tokens"]
        if step == SKIP - 1:
            tokens, start = 0, time.perf_counter()
    print(json.dumps({"tokens_per_s": tokens / (time.perf_counter() - start)}))


def package(steps: int, objective: str) -> dict[str, float]:
    """Run the command line; return seconds to the first step and tokens per second after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Path(folder) / "clock.json"
        environment = {**os.environ, "STEP_CLOCK": str(clock), "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
        command = [
            sys.executable, "-m", "deft_lightning", "fit", "--config", str(CONFIG), "--model.objective", objective,
            "--trainer.max_steps", str(steps), "--trainer.default_root_dir", folder, "--after_fit.test", "false",
            "--trainer.callbacks", "step_clock.StepClock",
        ]  # fmt: skip
        started = time.time()
        subprocess.run(command, check=True, env=environment, cwd=ROOT, capture_output=True)
        ends = json.loads(clock.read_text())
    tokens = sum(count for _, count in ends[SKIP:])
    return {"first_step_s": ends[0][0] - started, "tokens_per_s": tokens / (ends[-1][0] - ends[SKIP - 1][0])}


def main() -> None:
    """Run the rounds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        bare_loop(args.steps)
        return
    rows = []
    for number in range(args.rounds):
        bare = subprocess.run(
            [sys.executable, __file__, "--bare", "--steps", str(args.steps)],
            check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        row = {"bare": json.loads(bare.stdout.splitlines()[-1])["tokens_per_s"]}
        for objective in ("DEFT", "NLL"):
            row.update({f"{objective} {name}": value for name, value in package(args.steps, objective).items()})
        rows.append(row)
        print(f"round {number + 1}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}",
        "first_step_s": statistics.median(row["DEFT first_step_s"] for row in rows),
        "tokens_per_s": {
            "bare loop": statistics.median(row["bare"] for row in rows),
            "DEFT": statistics.median(row["DEFT tokens_per_s"] for row in rows),
            "NLL": statistics.median(row["NLL tokens_per_s"] for row in rows),
        },
        "ratio_to_bare": {
            name: statistics.median(row[f"{name} tokens_per_s"] / row["bare"] for row in rows)
            for name in ("DEFT", "NLL")
        },
        "rounds": rows,
    }
    print(json.dumps({name: value for name, value in result.items() if name != "rounds"}, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
