"""What two ranks cost: DDP and FSDP2 over gloo against one process on half of the work.

    python tests/benchmarks/bench_ranks.py [--layers 8] [--width 512] [--rows 8] [--rounds 3] [--output FILE]

A step is timed from one ``on_train_batch_start`` to the next, the median of 12 after 4; each rank has one thread and a
core of its own, so one process on its half of the batch is what two ranks would take if talking were free. Memory is
the peak resident memory of a rank above what it had before the model was built, while it is built and while it trains
(Linux); held are its shares of weights and of Adam's state. The all-reduce of a step's totals is timed alone, 300 times
in a row.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEPS, WARM = 16, 4


def worker(args: argparse.Namespace) -> None:
    """One rank: train, and leave what was measured."""
    import logging
    import warnings

    import torch
    from lightning.pytorch import Callback
    from torch.utils.data import DataLoader

    from deft_lightning import SFTModule, Trainer
    from deft_lightning.training.totals import StepTotals

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    class Clock(Callback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_start(self, *_: Any) -> None:
            self.built = peak(reset=True)

        def on_train_batch_start(self, *_: Any) -> None:
            self.times.append(time.perf_counter())

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 8000, (len(rows), 64), generator=torch.Generator().manual_seed(rows[0] + rank))
        return {"input_ids": ids, "labels": ids}

    width = args.width
    module = SFTModule(
        architecture={
            "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": args.layers,
            "num_attention_heads": 8, "vocab_size": 8000, "tie_word_embeddings": True,
        }
    )  # fmt: skip
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy="auto" if world == 1 else args.worker, max_steps=STEPS,
        max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[clock],
        enable_model_summary=False, use_distributed_sampler=False, log_every_n_steps=10**6,
    )  # fmt: skip
    before = peak(reset=True)
    trainer.fit(module, DataLoader(range(10**6), args.rows // 2, collate_fn=collate))  # type: ignore[arg-type]
    trained = peak()
    steps = [b - a for a, b in zip(clock.times[WARM:], clock.times[WARM + 1 :], strict=False)]
    held = 0
    for p in module.model.parameters():
        states = [v for v in trainer.optimizers[0].state[p].values() if torch.is_tensor(v)]
        for tensor in (p, *states):
            share = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            held += share.numel() * share.element_size()
    totals = StepTotals()
    totals.count(torch.tensor(1))
    start = time.perf_counter()
    for _ in range(300):
        totals.reduce(False)
    found = {
        "step_s": statistics.median(steps), "built_MB": clock.built - before, "trained_MB": trained - before,
        "held_MB": held / 2**20,
        "totals_s": (time.perf_counter() - start) / 300,
        "gradients_MB": sum(p.numel() for p in module.model.parameters()) * 4 / 2**20,
    }  # fmt: skip
    (args.folder / f"{rank}.json").write_text(json.dumps(found))


def peak(reset: bool = False) -> float:
    """Largest resident memory in MB since the last reset."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) / 1024


def run(strategy: str, args: argparse.Namespace) -> dict[str, float]:
    """Start the ranks of a strategy; the slower one counts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = 1 if strategy == "one process" else 2
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, __file__, "--worker", strategy, "--folder", folder, "--layers", str(args.layers),
            "--width", str(args.width), "--rows", str(args.rows),
        ]  # fmt: skip
        shared = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        joined = {"NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [{}] if world == 1 else [{**joined, "LOCAL_RANK": str(rank)} for rank in range(2)]
        processes = [subprocess.Popen(command, env={**shared, **rank}, stdout=subprocess.DEVNULL) for rank in ranks]
        assert [process.wait(600) for process in processes] == [0] * world, strategy
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
    worst = {name: max(rank[name] for rank in found) for name in found[0]}
    return {**worst, "last_built_MB": found[-1]["built_MB"], "last_trained_MB": found[-1]["trained_MB"]}


def main() -> None:
    """Print a table; with --output, keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8, help="of 64 tokens, over both ranks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    rounds = [{name: run(name, args) for name in ("one process", "ddp", "fsdp2")} for _ in range(args.rounds)]
    table: dict[str, dict[str, float]] = {}
    print(f"{args.layers} layers of {args.width}, gradients of {rounds[0]['ddp']['gradients_MB']:.0f} MB, float32")
    print("\n| | seconds a step | to one process | totals, share of a step | peak MB building, worst and last rank |"
          " training | weights and Adam, MB |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for name in rounds[0]:
        found = {key: statistics.median(r[name][key] for r in rounds) for key in rounds[0][name]}
        ratio = statistics.median(r[name]["step_s"] / r["one process"]["step_s"] for r in rounds)
        share = statistics.median(r[name]["totals_s"] / r[name]["step_s"] for r in rounds)
        table[name] = {**found, "ratio": ratio, "totals_share": share}
        print(f"| {name} | {found['step_s']:.3f} | {ratio:.2f} | {share:.2%} | {found['built_MB']:.0f},"
              f" {found['last_built_MB']:.0f} | {found['trained_MB']:.0f}, {found['last_trained_MB']:.0f} |"
              f" {found['held_MB']:.0f} |")  # fmt: skip
    if args.output:
        about = {"machine": platform.machine(), "cores": os.cpu_count(), **vars(args)}
        about = {key: value for key, value in about.items() if key not in ("output", "worker", "folder")}
        args.output.write_text(json.dumps({**about, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
