"""Processor time of `fit` from the start of its process to its first step, against another tree, in pairs.

    python tests/benchmarks/bench_start.py --other TREE [--pairs 10] [--config configs/quickstart.yaml]
        [--cold] [--output docs/evidence/data/bench_start.json]

Each start is a process of its own, with one thread. It ends in a callback behind the first optimizer step, which
reports the processor time of the process and of those that it has waited for (Linux: getrusage), its peak memory, and
how many modules it imported. The trees take turns, and which is first alternates: a ratio compares the two starts of a
pair. The first pair, which compiles files, is left out. The data is prepared before, unless --cold has each start
prepare it anew.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CALLBACK = """
import json, os, resource, sys
from lightning.pytorch import Callback


class FirstStep(Callback):
    def on_train_batch_end(self, *_):
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        with open(os.environ["FIRST_STEP"], "w", encoding="utf-8") as file:
            json.dump({
                "cpu_s": sum(one.ru_utime + one.ru_stime for one in used), "peak_MiB": used[0].ru_maxrss / 1024,
                "modules": len(sys.modules),
            }, file)
        os._exit(0)
"""  # as a file, so that a tree without it can be measured


def start(tree: Path, folder: Path, config: Path, cache: Path) -> dict[str, float]:
    """Return what one start of a tree took."""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    environment = {
        **os.environ, "PYTHONPATH": f"{tree}:{folder}", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "DEFT_LIGHTNING_CACHE": str(cache), "FIRST_STEP": str(answer),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "deft_lightning", "fit", "--config", str(config), "--trainer.default_root_dir",
        str(folder / "logs"), "--trainer.callbacks+=first_step.FirstStep",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)
    if not answer.exists():
        raise SystemExit(
            f"{tree}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'ended in silence'}"
        )
    found: dict[str, float] = json.loads(answer.read_text())
    return found


def compare(trees: list[Path], pairs: int, config: Path, cold: bool) -> dict[str, Any]:
    """Return the starts of both trees, and their ratios."""
    measured: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "first_step.py").write_text(CALLBACK, encoding="utf-8")
        for pair in range(pairs + 1):
            for number in (0, 1) if pair % 2 else (1, 0):
                cache = folder / (f"cache{number}_{pair}" if cold else f"cache{number}")
                measured[number].append(start(trees[number], folder, config, cache))
            this, other = (found[-1]["cpu_s"] for found in measured)
            print(f"pair {pair}: {this:.2f} and {other:.2f} s, ratio {this / other:.3f}", flush=True)
    starts = {tree: found[1:] for tree, found in zip(("this", "other"), measured, strict=True)}
    ratios = [this["cpu_s"] / other["cpu_s"] for this, other in zip(*starts.values(), strict=True)]
    return {
        "ratio": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
        **{
            key: {tree: statistics.median(one[key] for one in found) for tree, found in starts.items()}
            for key in ("cpu_s", "peak_MiB", "modules")
        },
        "starts": starts,
    }  # fmt: skip


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="a checkout of another version")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"), help="below each tree")
    parser.add_argument("--cold", action="store_true", help="prepare the data in each start")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread", "config": str(args.config),
        "data": "prepared by each start" if args.cold else "prepared before",
        **compare([ROOT, args.other.resolve()], args.pairs, args.config, args.cold),
    }  # fmt: skip
    print(json.dumps({name: value for name, value in result.items() if name != "starts"}, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
