"""Time and memory of the head, forward and backward: the products alone, dense formulas, this package, its peers.

    python tests/benchmarks/bench_head.py [--dtype bfloat16] [--tokens 2048] [--rounds 5] [--device cuda]
        [--memory_tokens 512 1024 2048 4096] [--output docs/evidence/data/bench_head.json]
        [--figure docs/evidence/figures/bench_head.png]

Every measurement is a process of its own. A round runs all variants in turn, so that a machine whose speed drifts
treats them alike; ratios are to the products of the same round, and medians over rounds. Time is CPU time on the CPU
and the time between events on CUDA, of the second call: the first one warms up. Memory is the peak above what stood
before the call, the gradients included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("torch linear_cross_entropy", "TRL (DEFT)", "Liger (NLL)")
VARIANTS = (
    "products", "official formula", "dense NLL", "fused NLL", "fused DEFT", "fused DEFT, log p alone",
    "fused Cayley floor", *PEERS,
)  # fmt: skip


def official(hidden: Any, weight: Any, targets: Any) -> Any:
    """DEFT as the paper's authors compute it: log-softmax and softmax of float32 logits, both in the graph."""
    logits = hidden @ weight.T
    log_p = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    alpha = logits.float().softmax(-1).pow(2).sum(-1).detach()
    return ((1 - (alpha * log_p).exp()) / (alpha + 1e-6)).sum()


def fused_head(objective: Any) -> Callable[..., Any]:
    """This package's head."""
    from deft_lightning.ops import linear_loss

    return lambda hidden, weight, targets: linear_loss(hidden, weight, targets, objective)[0]


def head(variant: str) -> Callable[..., Any]:
    """Return the function of hidden states, weight and targets that gives a loss."""
    import torch.nn.functional as F
    from torch.nn import LinearCrossEntropyOptions

    from deft_lightning.functional import deformed_log
    from deft_lightning.objectives import DEFT, NLL, Cayley

    if variant == "official formula":
        return official
    if variant == "dense NLL":
        return lambda h, w, t: F.cross_entropy((h @ w.T).float(), t, reduction="sum")
    if variant.startswith("fused"):
        return fused_head(Cayley(floor=0.5) if "Cayley" in variant else DEFT() if "DEFT" in variant else NLL())
    if variant == "torch linear_cross_entropy":
        return lambda h, w, t: F.linear_cross_entropy(h, w, t, reduction="sum", options=LinearCrossEntropyOptions())
    if variant == "TRL (DEFT)":
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        def through_trl(h: Any, w: Any, t: Any) -> Any:
            # Vocabulary tiles of 32768 are its default; asked for what DEFT needs and nothing else.
            log_p, _, log_square, *_ = ChunkedLogProbFunction.apply(
                h, w, None, t, 1.0, 32768, None, 1.0, ("log_sum_sq_probs",)
            )
            return deformed_log(log_p, log_square.exp()).sum()

        return through_trl
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda h, w, t: loss(w, h, t)


def without_statistics() -> None:
    """Leave out what log p does not need, to see what the other statistics cost."""
    from deft_lightning.ops.torch_rows import TorchRows

    TorchRows._spread = lambda self, z, pi, peak, log_sum: (peak, log_sum)  # type: ignore[method-assign]


def measure(variant: str, tokens: int, args: argparse.Namespace) -> dict[str, float]:
    """Run one variant in this process."""
    import torch

    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    if "alone" in variant:
        without_statistics()
    torch.manual_seed(0)
    # Filled in place, and in the dtype itself: a float32 draft would be the peak of the process.
    hidden = torch.empty(tokens, args.width, dtype=dtype, device=device).normal_().requires_grad_()
    weight = torch.empty(args.vocabulary, args.width, dtype=dtype, device=device).normal_(std=0.02).requires_grad_()
    targets = torch.randint(args.vocabulary, (tokens,), device=device)
    if variant == "products":

        def call() -> None:
            with torch.no_grad():
                logits = hidden @ weight.T
                _gradients = logits @ weight, logits.T @ hidden
    else:
        function = head(variant)

        def call() -> None:
            function(hidden, weight, targets).backward()
            hidden.grad = weight.grad = None

    before = peak(device, reset=True)
    call()
    memory = peak(device) - before
    return {"seconds": seconds_of(call, device), "MB": memory}


def seconds_of(call: Callable[[], None], device: Any) -> float:
    """Seconds of one call: of all CPU threads, or between two events of the stream."""
    import torch

    if device.type != "cuda":
        start = time.process_time()
        call()
        return time.process_time() - start
    times = []
    for _ in range(10):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end_event.record()
        torch.cuda.synchronize()
        times.append(start_event.elapsed_time(end_event) / 1e3)
    return statistics.median(times)


def peak(device: Any, reset: bool = False) -> float:
    """Largest memory so far in MB; after a reset, what is held now."""
    import torch

    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: peak := now
    (line,) = (x for x in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def run(variant: str, tokens: int, args: argparse.Namespace) -> dict[str, float] | str:
    """Measure a variant in a process of its own; the last line of its error if there is one."""
    command = [
        sys.executable, __file__, "--one", variant, "--tokens", str(tokens), "--dtype", args.dtype, "--device",
        args.device, "--width", str(args.width), "--vocabulary", str(args.vocabulary),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["killed"])[-1][:100]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of every variant at one number of tokens."""
    rounds: dict[str, list[dict[str, float]]] = {}
    failed: dict[str, str] = {}
    for _ in range(args.rounds):
        for variant in args.variants:
            if variant in failed:
                continue
            found = run(variant, args.tokens, args)
            if isinstance(found, str):
                failed[variant] = found
            else:
                rounds.setdefault(variant, []).append(found)
    rows = {}
    for variant, found in rounds.items():
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(found, rounds["products"], strict=True)]
        rows[variant] = {
            "seconds": statistics.median(x["seconds"] for x in found), "to_products": statistics.median(ratios),
            "ratios": ratios, "MB": statistics.median(x["MB"] for x in found),
        }  # fmt: skip
        line = rows[variant]
        print(f"| {variant} | {line['seconds']:.3g} | {line['to_products']:.2f} | {line['MB']:.0f} |", flush=True)
    for variant, why in failed.items():
        print(f"| {variant} | did not run: {why} |")
    return {"rows": rows, "failed": failed}


def draw(memory: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    """Peak memory against the number of tokens."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    widths = iter((4.0, 1.2, 1.2, 1.2))  # ours lie on each other: the first one wide, the next ones on top of it
    for (variant, points), marker in zip(memory.items(), "osD^vPX*<>", strict=False):
        ours = variant.startswith("fused")
        axes.plot(
            [int(n) for n in points], [mb / 1024 for mb in points.values()], marker=marker, markersize=5,
            label=variant, linewidth=next(widths) if ours else 1.2, linestyle="-" if ours else "--",
        )  # fmt: skip
    axes.set(
        xlabel="supervised tokens", ylabel="peak memory of the head (GiB)", ylim=(0, None), xlim=(0, None),
        title=f"V = {args.vocabulary:,}, D = {args.width}, {args.dtype}, gradients included",
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(args.figure, dpi=160)


def main() -> None:
    """Measure, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=896, help="0.5B models of the Qwen2 family")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--memory_tokens", type=int, nargs="*", default=[])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.tokens, args)))
        return
    import torch

    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    shape = f"V={args.vocabulary}, D={args.width}, N={args.tokens}, {args.dtype}"
    machine = f"{where}, OMP_NUM_THREADS={threads}, torch {torch.__version__}"
    print(f"{shape}; {machine}\n\n| head | seconds | to products | peak MB |\n|---|---|---|---|")
    result: dict[str, Any] = {"shape": shape, "machine": machine, **table(args)}
    memory: dict[str, dict[str, float]] = {}
    for variant in args.variants if args.memory_tokens else []:
        if variant in result["rows"] and "alone" not in variant:
            for tokens in args.memory_tokens:
                found = run(variant, tokens, args)
                if isinstance(found, dict):
                    memory.setdefault(variant, {})[str(tokens)] = found["MB"]
            print(f"{variant}: " + ", ".join(f"N={n} {mb:.0f} MB" for n, mb in memory.get(variant, {}).items()))
    result["memory"] = memory
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.figure and memory:
        draw(memory, args)


if __name__ == "__main__":
    main()
