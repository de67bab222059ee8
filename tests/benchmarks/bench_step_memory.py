"""A training step of a 0.5B-shaped Qwen2 with random weights under a memory limit: fused head against dense head.

    python tests/benchmarks/bench_step_memory.py [--tokens 4096] [--limit_gb 8]
        [--output docs/evidence/data/bench_step_memory.json]

Each head runs in a process of its own, first without a limit, which gives its peak, then under the limit (Linux:
RLIMIT_DATA, private memory). A step is forward, backward and AdamW in bfloat16, with gradient checkpointing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Sizes of Qwen2-0.5B, from its published configuration.
QWEN2 = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
}  # fmt: skip


def step(head: str, tokens: int, limit_gb: float) -> None:
    """Take one step and print its peak memory and time."""
    import torch

    from deft_lightning import SFTModule
    from deft_lightning.objectives import DEFT

    torch.manual_seed(0)
    module = SFTModule(DEFT(), architecture=QWEN2, head=head, dtype="bfloat16", gradient_checkpointing=True)
    module.configure_model()
    optimizer = torch.optim.AdamW(module.parameters())
    ids = torch.randint(QWEN2["vocab_size"], (tokens // 1024, 1024))
    module.loss_and_stats({"input_ids": ids[:1, :16], "labels": ids[:1, :16]})  # the checks of the first batch
    if limit_gb:
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gb * 2**30),) * 2)
    start = time.perf_counter()
    loss, _, keep = module.loss_and_stats({"input_ids": ids, "labels": ids})
    (loss / keep.sum()).backward()
    optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"peak_GiB": peak, "seconds": time.perf_counter() - start, "loss": float(loss / keep.sum())}))


def main() -> None:
    """Run both heads, with and without the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--limit_gb", type=float, default=8.0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--head", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.head:
        step(args.head, args.tokens, args.limit_gb)
        return
    result: dict[str, object] = {"tokens": args.tokens, "limit_GiB": args.limit_gb, "cores": os.cpu_count()}
    for head in ("fused", "dense"):
        for limit in (0.0, args.limit_gb):
            done = subprocess.run(
                [sys.executable, __file__, "--head", head, "--tokens", str(args.tokens), "--limit_gb", str(limit)],
                capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            lines = done.stdout.splitlines() if done.returncode == 0 else done.stderr.strip().splitlines()
            found = json.loads(lines[-1]) if done.returncode == 0 else {"failed": lines[-1] if lines else "killed"}
            result[f"{head}, {f'limit {limit:g} GiB' if limit else 'no limit'}"] = found
            print(f"{head}, {f'limit {limit:g} GiB' if limit else 'no limit'}: {found}", flush=True)
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
