"""Kill a real run at random moments and go on, until it ends as one that was left alone.

    python tests/kill_runs.py [--kills 20] [--strategy auto|ddp|fsdp2] [--steps 300] [--seed 0] [--asynchronous]

Every run is ``python -m deft_lightning fit`` in a process group of its own, ended by SIGKILL at a moment drawn from
the seed, some before the first step, and continued with ``--ckpt_path last``; every second one while a checkpoint is
half-written. At the end the weights must be those of the run that was left alone, bit for bit; no process may be left,
and no file that cannot be read.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def command(root: Path, steps: int, strategy: str) -> list[str]:
    """A small run that saves every third step, with dropout, workers and token noise that changes with the epoch."""
    noise = {"class_path": "TokenReplace", "init_args": {"rates": [0.3, 0.1, 0.0]}}
    ranks = [] if strategy == "auto" else ["--trainer.devices", "2", "--trainer.strategy", strategy]
    return [
        sys.executable, "-m", "deft_lightning", "fit", "--data.source", str(root / "rows.jsonl"),
        "--data.tokenizer_size", "0", "--data.batch_size", str(4 // (2 if ranks else 1)), "--data.num_workers", "1",
        "--data.validation_fraction", "0", "--data.noise.ops", json.dumps([noise]),
        "--model.architecture", json.dumps({
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "attention_dropout": 0.2,
        }),
        "--model.optimizer.lr", "1e-3", "--trainer.accelerator", "cpu", "--trainer.max_steps", str(steps), *ranks,
        "--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--after_fit.export", "false",
        "--checkpoint.every_n_train_steps", "3", "--checkpoint.save_top_k", "1",
    ]  # fmt: skip


def environment(root: Path) -> dict[str, str]:
    """One thread a process, and prepared data of this run alone."""
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo",
        "DEFT_LIGHTNING_CACHE": str(root / "cache"), "PYTHONPATH": str(ROOT),
    }  # fmt: skip


def begin(root: Path, home: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    """Start a run whose checkpoints go to a folder."""
    home.mkdir(exist_ok=True)
    with (home / "log").open("ab") as log:
        return subprocess.Popen(
            [*arguments, "--trainer.default_root_dir", str(home)], cwd=ROOT, env=environment(root), stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def left(group: int) -> list[int]:
    """Processes of a group that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def checkpoints(home: Path) -> list[Path]:
    return [path for path in home.rglob("*.ckpt") if path.exists() and not path.is_symlink()]


def half_written(home: Path) -> list[Path]:
    """Checkpoints that are being written, or were when their writer was killed."""
    return [path for path in home.rglob(".*.ckpt.*") if path.exists()]


def final(home: Path, steps: int) -> dict[str, torch.Tensor]:
    """The weights a run ended with."""
    found = [torch.load(path, weights_only=True) for path in checkpoints(home)]
    (last,) = (checkpoint for checkpoint in found if checkpoint["global_step"] == steps)
    return dict(last["state_dict"])


def kill_and_go_on(
    root: Path, kills: int, steps: int, strategy: str, seed: int, longest: float, asynchronous: bool = False
) -> dict[str, Any]:
    """Return what became of a run that was killed, against one that was not.

    Args:
        root: Folder for everything.
        kills: How often.
        steps: Optimizer steps of the whole run.
        strategy: ``auto``, ``ddp`` or ``fsdp2``; the latter on two ranks.
        seed: Of the moments.
        longest: Seconds after its start that a run is killed at the latest; every second one is killed up to 50 ms
            after it has begun to write a checkpoint.
        asynchronous: Whether checkpoints are written while training continues.
    """
    draw = random.Random(seed)
    rows = ({"question": f"{i} + {i * 7}", "answer": str(8 * i) * (1 + i % 3)} for i in range(90))
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    option = ["--checkpoint.asynchronous", "true"] if asynchronous else []
    arguments, alone, killed = [*command(root, steps, strategy), *option], root / "alone", root / "killed"
    process = begin(root, alone, arguments)
    assert process.wait(600) == 0, (alone / "log").read_text()[-2000:]
    moments, saved, halves = [], [], 0
    while len(moments) < kills:
        resume = ["--ckpt_path", "last"] if checkpoints(killed) else []
        before = set(half_written(killed))
        process, writing = begin(root, killed, [*arguments, *resume]), len(moments) % 2 == 1
        while writing and process.poll() is None and not set(half_written(killed)) - before:
            time.sleep(0.0005)
        moment = draw.uniform(0.0, 0.05 if writing else longest)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            moments.append(moment)
            for _ in range(100):
                if not left(process.pid):
                    break
                time.sleep(0.05)
            assert not left(process.pid), "a process is left"
            for path in checkpoints(killed):
                torch.load(path, weights_only=True)  # each is whole
            halves += bool(half_written(killed))
            newest = [torch.load(path, weights_only=True)["global_step"] for path in checkpoints(killed)]
            saved.append(max(newest, default=0))
        else:
            assert process.returncode == 0, (killed / "log").read_text()[-2000:]
            break
    process = begin(root, killed, [*arguments, *(["--ckpt_path", "last"] if checkpoints(killed) else [])])
    assert process.wait(600) == 0, (killed / "log").read_text()[-2000:]
    one, other = final(alone, steps), final(killed, steps)
    return {
        "strategy": strategy, "kills": len(moments), "seconds": [round(m, 2) for m in moments],
        "newest step after each kill": saved, "kills that left a half-written checkpoint": halves,
        "largest difference of a weight": max(float((one[name] - other[name]).abs().max()) for name in one),
        "partial files left": len([path for path in killed.rglob(".*ckpt*")]),
    }  # fmt: skip


def main() -> None:
    """Parse and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=15.0)
    parser.add_argument("--asynchronous", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        moments = (args.seed, args.longest, args.asynchronous)
        found = kill_and_go_on(Path(folder), args.kills, args.steps, args.strategy, *moments)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
