"""Time and memory of a loss on dense logits, forward and backward to their gradient: this package against formulas.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_token_loss.py [--vocabularies 64 260 1024 4096 8192]
        [--dtypes bfloat16 float32] [--tokens 2048] [--rounds 7] [--output docs/evidence/data/bench_token_loss.json]

The variants of a case take turns in one process, a window of CPU time each, so that a machine whose speed drifts treats
them alike. A ratio is to cross entropy in the same turn: least, median, largest over the rounds. `textbook` is the path
that float64 logits and compilers take. Memory is what the allocator holds at most beyond the logits, the gradient
included. `fused` rows are the fused head at hidden states of `--width`, against the product and cross entropy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

Variant = Callable[[], Any]


def official(logits: Any, targets: Any) -> Any:
    """DEFT as the paper's authors compute it: log-softmax and softmax of float32 logits, both in the graph."""
    log_p = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    alpha = logits.float().softmax(-1).pow(2).sum(-1).detach()
    return ((1 - (alpha * log_p).exp()) / (alpha + 1e-6)).sum()


def textbook(logits: Any, targets: Any) -> Any:
    """DEFT by the path of this package that float64 takes."""
    from deft_lightning import functional
    from deft_lightning.objectives import DEFT

    by_rows, functional._by_rows = functional._by_rows, lambda logits: False
    try:
        return functional.token_loss(logits, targets, DEFT()).sum()
    finally:
        functional._by_rows = by_rows


def on_logits(tokens: int, vocabulary: int, dtype: Any, masked: float) -> tuple[dict[str, Variant], list[Any]]:
    """Return losses of dense logits, and the leaves that get a gradient."""
    import torch
    from torch.nn.functional import cross_entropy

    from deft_lightning.functional import token_loss
    from deft_lightning.objectives import DEFT, NLL

    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(tokens, vocabulary, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < masked] = -100
    kept = targets != -100
    losses: dict[str, Variant] = {
        "cross entropy": lambda: cross_entropy(logits.float(), targets, reduction="sum"),
        "token_loss DEFT": lambda: token_loss(logits, targets, DEFT()).sum(),
        "token_loss NLL": lambda: token_loss(logits, targets, NLL()).sum(),
        "official formula": lambda: official(*((logits[kept], targets[kept]) if masked else (logits, targets))),
        "textbook": lambda: textbook(logits, targets),
    }
    return losses, [logits]


def on_hidden(tokens: int, vocabulary: int, dtype: Any, width: int) -> tuple[dict[str, Variant], list[Any]]:
    """Return losses of hidden states, and the leaves that get a gradient."""
    import torch
    from torch.nn.functional import cross_entropy

    from deft_lightning.objectives import DEFT, NLL
    from deft_lightning.ops import linear_loss

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = (3 * width**-0.5 * torch.randn(vocabulary, width, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    losses: dict[str, Variant] = {
        "cross entropy": lambda: cross_entropy((hidden @ weight.T).float(), targets, reduction="sum"),
        "fused DEFT": lambda: linear_loss(hidden, weight, targets, DEFT())[0],
        "fused NLL": lambda: linear_loss(hidden, weight, targets, NLL())[0],
    }
    return losses, [hidden, weight]


def differentiate(loss: Variant, leaves: list[Any]) -> None:
    """Run forward and backward."""
    loss().backward()
    for leaf in leaves:
        leaf.grad = None


def window(call: Callable[[], None], seconds: float) -> float:
    """Return CPU seconds of a call, over as many as fit into a window."""
    count, start = 0, time.process_time()
    while (now := time.process_time() - start) < seconds or not count:
        call()
        count += 1
    return now / count


def most_held(call: Callable[[], None]) -> float:
    """Return what the allocator holds at most beyond the start, in MB."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))) / 2**20


def measure(losses: dict[str, Variant], leaves: list[Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return milliseconds, ratios to cross entropy, and memory of every variant."""
    times: dict[str, list[float]] = {name: [] for name in losses}
    calls = {name: lambda loss=loss: differentiate(loss, leaves) for name, loss in losses.items()}
    for call in calls.values():
        call()
    for _ in range(args.rounds):
        for name, call in calls.items():
            times[name].append(window(call, args.window))
    rows = {}
    for name, found in times.items():
        ratios = sorted(a / b for a, b in zip(found, times["cross entropy"], strict=True))
        rows[name] = {
            "ms": statistics.median(found) * 1e3, "MB": most_held(calls[name]),
            "to_cross_entropy": [ratios[0], statistics.median(ratios), ratios[-1]],
        }  # fmt: skip
        least, middle, largest = rows[name]["to_cross_entropy"]
        line = (
            f"| {name} | {rows[name]['ms']:.3g} | {least:.2f} | {middle:.2f} | {largest:.2f} | {rows[name]['MB']:.1f} |"
        )
        print(line, flush=True)
    return rows


def main() -> None:
    """Measure, print tables, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[64, 260, 1024, 4096, 8192])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--masked", type=float, default=0.0, help="share of targets that are ignored")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument(
        "--fused_up_to", type=int, default=4096, help="largest vocabulary that the fused head is timed at"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--window", type=float, default=0.1, help="CPU seconds of a variant in a round")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    import torch

    threads = os.environ.get("OMP_NUM_THREADS", "all")
    machine = f"{os.cpu_count()} cores, {platform.machine()}, OMP_NUM_THREADS={threads}, torch {torch.__version__}"
    print(f"N={args.tokens}, {args.masked:.0%} ignored; {machine}")
    cases = []
    for name in args.dtypes:
        for vocabulary in args.vocabularies:
            made = {"logits": on_logits(args.tokens, vocabulary, getattr(torch, name), args.masked)}
            if vocabulary <= args.fused_up_to:
                made["hidden"] = on_hidden(args.tokens, vocabulary, getattr(torch, name), args.width)
            for start, (losses, leaves) in made.items():
                print(f"\nV={vocabulary}, {name}, from {start}\n\n| loss | ms | least | median | largest | MB |")
                print("|---|---|---|---|---|---|")
                rows = measure(losses, leaves, args)
                cases.append({"vocabulary": vocabulary, "dtype": name, "start": start, "rows": rows})
    if args.output:
        shape = {"tokens": args.tokens, "masked": args.masked, "width": args.width, "rounds": args.rounds}
        result = {"machine": machine, **shape, "cases": cases}
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
