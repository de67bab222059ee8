"""Compare this tree with another one: the seconds of a step, in turns, and the weights that a run ends with.

    python tests/benchmarks/compare_versions.py --other TREE [--pairs 30] [--steps 20]
    python tests/benchmarks/compare_versions.py --other TREE --weights [--strategy auto|ddp|fsdp2]

Each tree trains ``configs/from_scratch.yaml`` in a process of its own. For the time, both processes stay, and take
turns of some steps, so that what else the machine does falls on both; the ratio is of processor seconds. For the
weights, each runs 50 steps through the command line, and every weight must have the same bits.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "from_scratch.yaml"


def environment(tree: Path, folder: Path) -> dict[str, str]:
    """One thread, the package of a tree, prepared data of its own."""
    return {
        **os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "DEFT_LIGHTNING_CACHE": str(folder / "cache"), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def take_turns(folder: Path, steps: int) -> None:
    """Train; wait before each turn of steps for a line on standard input, and answer with the seconds of the turn."""
    from lightning.pytorch.callbacks import Callback

    try:
        cli: Any = import_module("deft_lightning.cli.main")
    except ModuleNotFoundError:  # earlier versions have it in a file of its own
        cli = import_module("deft_lightning.cli")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    class Turns(Callback):
        begun, count = 0.0, 0

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if self.count % steps == 0:
                if self.count:
                    print(time.process_time() - self.begun, file=answers, flush=True)
                if not sys.stdin.readline():
                    os._exit(0)
                self.begun = time.process_time()
            self.count += 1

    add = cli.DeftCLI.instantiate_trainer

    def instantiate(self: Any, **kwargs: Any) -> Any:
        trainer = add(self, **kwargs)
        trainer.callbacks.insert(0, Turns())
        return trainer

    cli.DeftCLI.instantiate_trainer = instantiate
    cli.run(
        ["fit", "--config", str(CONFIG), "--trainer.max_steps", "100000", "--trainer.default_root_dir", str(folder),
         "--trainer.val_check_interval", "null", "--trainer.check_val_every_n_epoch", "1000",
         "--trainer.enable_progress_bar", "false"]
    )  # fmt: skip


def step_times(trees: list[Path], pairs: int, steps: int, root: Path) -> None:
    """Print the ratio of the seconds of a step, this tree over the other."""
    processes = []
    for number, tree in enumerate(trees):
        folder = root / str(number)
        folder.mkdir()
        command = [sys.executable, __file__, "--turns", str(folder), "--steps", str(steps)]
        processes.append(
            subprocess.Popen(
                command, env=environment(tree, folder), cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )
        )  # fmt: skip

    def turn(number: int) -> float:
        process = processes[number]
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline()) / steps

    for number in (0, 1):
        turn(number)  # the first steps compile and allocate
    seconds: list[list[float]] = [[], []]
    for pair in range(pairs):
        for number in (0, 1) if pair % 2 else (1, 0):
            seconds[number].append(turn(number))
    for process in processes:
        process.kill()
    ratios = [this / other for this, other in zip(*seconds, strict=True)]
    middle = [statistics.median(one) for one in seconds]
    print(
        f"{pairs} pairs of {steps} steps: ratio median {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max"
        f" {max(ratios):.3f}), of the medians {middle[0] / middle[1]:.3f}; a step {1000 * middle[0]:.1f} and"
        f" {1000 * middle[1]:.1f} ms of processor; {platform.machine()}, {os.cpu_count()} cores"
    )


def same_weights(trees: list[Path], strategy: str, root: Path) -> None:
    """Print whether both trees end 50 steps of the run with the same weights."""
    import torch

    ranks = [] if strategy == "auto" else ["--trainer.devices", "2", "--trainer.strategy", strategy]
    ends = []
    for number, tree in enumerate(trees):
        folder = root / f"weights{number}"
        folder.mkdir()
        command = [
            sys.executable, "-m", "deft_lightning", "fit", "--config", str(CONFIG), "--trainer.max_steps", "50",
            "--trainer.val_check_interval", "null", "--trainer.check_val_every_n_epoch", "1000",
            "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder), "--after_fit.export", "false",
            "--after_fit.test", "false", "--checkpoint.every_n_train_steps", "50", *ranks,
        ]  # fmt: skip
        subprocess.run(command, env=environment(tree, folder), cwd=folder, check=True, capture_output=True)
        (path,) = folder.rglob("step=50.ckpt")
        ends.append(torch.load(path, weights_only=True)["state_dict"])
    one, other = ends
    different = [name for name in one.keys() | other.keys() if name not in one or not one[name].equal(other.get(name))]
    print(f"{strategy}: {len(one)} tensors, {len(different)} of them different {different[:3]}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--weights", action="store_true")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--turns", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.turns is not None:
        take_turns(given.turns, given.steps)
        return
    trees = [ROOT, given.other.resolve()]
    with tempfile.TemporaryDirectory() as folder:
        if given.weights:
            same_weights(trees, given.strategy, Path(folder))
        else:
            step_times(trees, given.pairs, given.steps, Path(folder))


if __name__ == "__main__":
    main()
