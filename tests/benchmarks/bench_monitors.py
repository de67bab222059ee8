"""What the monitors cost: time of ten steps with them and without, and peak memory, with a large vocabulary.

    python tests/benchmarks/bench_monitors.py [--windows 24] [--rounds 3]
        [--output docs/evidence/data/bench_monitors.json]

Time: one run, whose monitors look at every second window of ten steps, the default logging interval. Each window is
compared with the one before it, so that a machine whose speed drifts treats both alike; the median of the ratios is
told, and beside it, free of the noise of the steps, the share of a window spent inside the monitors: of the clock, and
of the time of the processor, which others who use the machine disturb less. Windows in which a figure is drawn (the
first, second, fourth and eighth watched one) are told apart. Memory: whole processes with monitors, without, and with
monitors that draw nothing, in turn; the median of the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EVERY = 10  # --trainer.log_every_n_steps


def child(mode: str, windows: int, vocabulary: int, tokens: int, width: int) -> None:
    """Train with monitors: ``alternate`` (in every second window), ``on``, ``scalars`` (drawing nothing) or ``off``."""
    import numpy as np
    import torch
    from lightning.pytorch import Callback
    from torch.utils.data import DataLoader

    from deft_lightning import SFTModule, Trainer
    from deft_lightning.callbacks import Dashboard, EntropyMonitor, GateMonitor, NoiseMonitor

    torch.set_num_threads(1)
    torch.manual_seed(0)
    inside, ends = np.zeros(2), [np.zeros(2)]
    spent: list[Any] = []

    def now() -> Any:
        return np.array([time.perf_counter(), time.process_time()])

    def timed(cls: Any, **options: Any) -> Any:
        class Timed(cls):  # type: ignore[misc]
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                nonlocal inside
                if mode != "alternate" or len(ends) % 2 == 0:
                    start = now()
                    super().on_train_batch_end(trainer, *args)
                    inside = inside + now() - start

        return Timed(**options)

    class Clock(Callback):
        """The last of the callbacks, so that a window ends after what the monitors did in its last step."""

        def on_train_start(self, *args: Any) -> None:
            ends[0] = now()

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            nonlocal inside
            if trainer.global_step % EVERY == 0:
                ends.append(now())
                spent.append(inside)
                inside = np.zeros(2)

    monitors: list[Any] = []
    if mode != "off":
        drawn = {"histograms": mode != "scalars"}
        monitors = [timed(GateMonitor, **drawn), timed(EntropyMonitor), timed(NoiseMonitor)]
        monitors += [Dashboard()] if mode != "scalars" else []
    ids = torch.randint(vocabulary, (4, tokens // 4 + 1))
    noise, other = (torch.rand(ids.shape) < 0.2).to(torch.int8), torch.randint(vocabulary, ids.shape)
    labels = torch.where(noise > 0, other, ids)
    batch = {"input_ids": ids, "labels": labels, "clean_labels": ids, "noise_code": noise}
    shape = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=windows * EVERY, log_every_n_steps=EVERY, default_root_dir=folder,
            callbacks=[*monitors, Clock()], enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, gradient_clip_val=1.0,
        )  # fmt: skip
        batches = DataLoader([batch] * (windows * EVERY), batch_size=None)  # type: ignore[arg-type]
        trainer.fit(SFTModule(architecture=shape), batches)
    found = {"": np.diff(np.array(ends), axis=0), "_inside": np.array(spent)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    times = {f"{clock}{of}": found[of][:, i].tolist() for i, clock in enumerate(("wall", "cpu")) for of in found}
    print(json.dumps({**times, "peak_MiB": peak}))


def run(mode: str, windows: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return what a process of its own measured."""
    sizes = ["--vocabulary", str(args.vocabulary), "--tokens", str(args.tokens), "--width", str(args.width)]
    done = subprocess.run(
        [sys.executable, __file__, "--child", mode, "--windows", str(windows), *sizes],
        check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        # A fixed threshold gives freed blocks back at once: glibc's moving one changes peaks by 5 % from run to run.
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure time, then memory, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.windows, args.vocabulary, args.tokens, args.width)
        return
    found = run("alternate", args.windows, args)
    watched = range(1, len(found["wall"]), 2)
    drawn = [window for count, window in enumerate(watched, start=1) if not count & (count - 1)]
    plain = [window for window in watched if window not in drawn]
    shares = {clock: [i / w for i, w in zip(found[f"{clock}_inside"], found[clock], strict=True)]
              for clock in ("wall", "cpu")}  # fmt: skip
    peaks = [{mode: run(mode, 2, args)["peak_MiB"] for mode in ("off", "scalars", "on")} for _ in range(args.rounds)]
    result = {
        "tokens": args.tokens, "vocabulary": args.vocabulary, "width": args.width, "cores": os.cpu_count(),
        "step_s": {clock: statistics.median(found[clock]) / EVERY for clock in shares},
        "time_ratio": {clock: statistics.median(found[clock][i] / found[clock][i - 1] for i in plain)
                       for clock in shares},
        "share_inside": {clock: statistics.median(share[i] for i in plain) for clock, share in shares.items()},
        "share_inside_with_a_figure": {clock: max(share[i] for i in drawn) for clock, share in shares.items()},
        "inside_cpu_ms": {
            "without a figure": 1e3 * statistics.median(found["cpu_inside"][i] for i in plain),
            "with a figure": [1e3 * found["cpu_inside"][i] for i in drawn],
        },
        "peak_MiB": {mode: statistics.median(row[mode] for row in peaks) for mode in peaks[0]},
        "peak_ratio": {mode: statistics.median(row[mode] / row["off"] for row in peaks) for mode in ("scalars", "on")},
        "windows": {name: value for name, value in found.items() if name != "peak_MiB"}, "peaks": peaks,
    }  # fmt: skip
    print(json.dumps({name: value for name, value in result.items() if name not in ("windows", "peaks")}, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
