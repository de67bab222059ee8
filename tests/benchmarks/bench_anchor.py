"""What an anchor costs: CPU time of a training step, forward and backward, against the same step without one.

    python tests/benchmarks/bench_anchor.py [--pairs 15] [--tokens 512] [--output docs/evidence/data/bench_anchor.json]

A pair is a step of either in turn, so that a machine whose speed drifts treats them alike; ratios are of pairs, and the
median is told. A random Llama of 4 layers of 256 and a vocabulary of 32,000; every token is supervised.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from deft_lightning import SFTModule
from deft_lightning.models import LoRA
from deft_lightning.objectives import NLL, KLAnchor

ARCHITECTURE = {
    "model_type": "llama", "vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip


def module_of(objective: Any, lora: LoRA | None) -> SFTModule:
    """Return a module whose model is built."""
    torch.manual_seed(0)
    module = SFTModule(objective, architecture=ARCHITECTURE, lora=lora)
    module.configure_model()
    return module


def step(module: SFTModule, batch: dict[str, Any]) -> float:
    """Return the CPU seconds of a forward and a backward pass."""
    start = time.process_time()
    total, *_ = module.loss_and_stats(batch)
    total.backward()
    spent = time.process_time() - start
    module.zero_grad()
    return spent


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ids = torch.randint(32_000, (2, options.tokens // 2), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    found: dict[str, Any] = {"pairs": options.pairs, "tokens": options.tokens, "torch": torch.__version__}
    for name, lora in (("frozen copy", None), ("adapters off", LoRA(r=16))):
        modules = [module_of(objective, lora) for objective in (NLL(), KLAnchor(weight=0.05))]
        for module in modules:
            step(module, batch)  # the first one checks the head
        times = [[step(module, batch) for module in modules] for _ in range(options.pairs)]
        ratios = sorted(anchored / plain for plain, anchored in times)
        found[name] = {
            "plain": statistics.median(plain for plain, _ in times),
            "anchored": statistics.median(anchored for _, anchored in times),
            "ratio": statistics.median(ratios), "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        }  # fmt: skip
        print(name, {key: value for key, value in found[name].items()})
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
