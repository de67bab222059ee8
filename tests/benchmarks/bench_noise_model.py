"""What the noise model costs: CPU time of a training step, forward, backward and EM, against the same step with NLL.

    python tests/benchmarks/bench_noise_model.py [--shape small] [--lora] [--pairs 15] [--tokens 1024] [--answer 64]

A pair is a step of either in turn, so that a machine whose speed drifts treats them alike; ratios are of pairs.
Rows of 128 tokens, the last 64 of them the answer. A random Llama of 4 layers of 256 and a vocabulary of 32,000, of
which the head is most of the work; `--shape smollm2` is one of SmolLM2-135M, 30 layers of 576. `best` reads the answers
once more, behind 64 tokens of others and a frame of 24, and each behind a header of 6.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deft_lightning import SFTModule
from deft_lightning.data.examples import Prepared, Unprompted
from deft_lightning.data.loading.collate import TrainCollator
from deft_lightning.functional import IGNORE_INDEX
from deft_lightning.models import LoRA
from deft_lightning.objectives import NLL, Contaminated, Objective
from deft_lightning.objectives.context import ContextSource, unigram_log_prob
from deft_lightning.training.unprompted import MOST

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
              "num_attention_heads": 4},
    "smollm2": {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
}  # fmt: skip
KINDS = {
    "tokens, unigram": Contaminated(level="token", chance="unigram"),
    "tokens, least": Contaminated(level="token"),
    "both, unigram": Contaminated(chance="unigram", answer_chance=None),
    "both, least and best (default)": Contaminated(),
}


FRAME, AHEAD, HEADER = 24, 64, 6


def module_of(objective: Objective, shape: dict[str, Any], lora: bool) -> SFTModule:
    """Return a module whose model is built, with a unigram of its labels, and answers read behind others."""
    torch.manual_seed(0)
    architecture = {"model_type": "llama", "max_position_embeddings": 4096, **shape}
    module = SFTModule(objective, architecture=architecture, lora=LoRA(r=16) if lora else None)
    module.configure_model()
    module.batch_loss.unprompted.alone, module.batch_loss.unprompted.once = False, True
    size = shape["vocab_size"]
    counts = np.arange(1, size + 1, dtype=np.int64)
    module.batch_loss.context = ContextSource(objective, unigram_log_prob(counts, size), size)
    return module


def step(module: SFTModule, batch: dict[str, Any]) -> float:
    """Return the CPU seconds of a forward and a backward pass, and of what the run adds up for the objective."""
    start = time.process_time()
    total, stats, _ = module.loss_and_stats(batch)
    total.backward()
    if (tracked := module.current_objective.tracks) is not None:
        tracked.sums(stats).tolist()
    module.batch_loss.context.end_step(False)
    spent = time.process_time() - start
    module.zero_grad()
    return spent


def batch_of(rows: int, answer: int) -> dict[str, Any]:
    """Return rows of random tokens, and their answers without prompts as a loader brings them along."""
    draw = np.random.default_rng(0)
    ahead = draw.integers(0, 32_000, FRAME + AHEAD)
    examples = []
    for row in range(rows):
        ids = draw.integers(0, 32_000, 128)
        labels = np.where(np.arange(128) < 128 - answer, IGNORE_INDEX, ids)
        read = slice(128 - answer - HEADER, 128 - answer + min(answer, MOST))
        bare = Unprompted(ids[read], labels[read], ahead, FRAME, 0)
        examples.append(Prepared(str(row), ids, labels, np.zeros_like(ids), unprompted=bare))
    return TrainCollator(0)(examples)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer, of 128 a row")
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 16 alone")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batch = batch_of(options.tokens // 128, options.answer)
    names = ("shape", "lora", "pairs", "tokens", "answer")
    found: dict[str, Any] = {name: getattr(options, name) for name in names}
    plain = module_of(NLL(), SHAPES[options.shape], options.lora)
    for name, objective in KINDS.items():
        other = module_of(objective, SHAPES[options.shape], options.lora)
        for module in (plain, other):
            step(module, batch)
        ratios = [step(other, batch) / step(plain, batch) for _ in range(options.pairs)]
        found[name] = {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}
        print(f"{name:32s} " + "  ".join(f"{key} {value:.3f}" for key, value in found[name].items()))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
