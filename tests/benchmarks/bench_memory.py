"""The estimate of memory against what real fits take, on a CPU; and the table of what fits on a GPU.

    python tests/benchmarks/bench_memory.py [--sizes 23M 57M 135M] [--only NAME ...]
        [--allocator exact] [--output docs/evidence/data/bench_memory.json]
    python tests/benchmarks/bench_memory.py --table

Each fit is a process of its own, which has made a tiny one of its kind before: two optimizer steps of a Llama with
random weights, on one thread, with the recipe of `fit`. Measured is the peak of its resident memory above what it held
before the model was built (Linux: /proc/self/status, VmHWM reset there). glibc keeps freed blocks below a threshold
that it raises itself; with ``--allocator exact`` each large tensor is mapped by itself, so that resident memory is what
tensors hold. The table needs no memory: shapes alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

# The largest is SmolLM2-135M's; vocabularies are those of such models, the data has bytes.
SHAPES: dict[str, dict[str, Any]] = {
    "23M": {"hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 8, "num_attention_heads": 5,
            "vocab_size": 32_000},
    "57M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8,
            "vocab_size": 32_000},
    "tiny": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "vocab_size": 300},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49_152},
}  # fmt: skip
BATCHES = {"tiny": (2, 16), "23M": (4, 256), "57M": (2, 256), "135M": (1, 256)}  # rows and their tokens
STEPS = 2  # the second has all: weights, gradients of the first until its own begin, optimizer state
COMMON = {"model_type": "llama", "max_position_embeddings": 1024, "tie_word_embeddings": True}
RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, checkpointing": {"gradient_checkpointing": True},
    "LoRA": {"lora": 16},
    "LoRA, checkpointing": {"lora": 16, "gradient_checkpointing": True},
    "nf4": {"lora": 16, "quantization": "nf4"},
    "nf4, checkpointing": {"lora": 16, "quantization": "nf4", "gradient_checkpointing": True},
    "int8": {"lora": 16, "quantization": "int8"},
    "int8, checkpointing": {"lora": 16, "quantization": "int8", "gradient_checkpointing": True},
}
LIMIT = 0.15
# Sizes of Qwen2.5, from its published configurations.
QWEN = {
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False},
    "14B": {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 48, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152_064, "tie_word_embeddings": False},
}  # fmt: skip
WAYS = ("full", "full, checkpointing", "`deft:model/full`", "`deft:model/lora`", "LoRA, checkpointing",
        "LoRA, int8", "LoRA, int8, checkpointing", "LoRA, nf4", "`deft:model/qlora`",
        "`fsdp2`, 8 GPUs, checkpointing")  # fmt: skip
GIB = 2**30
M_MMAP_THRESHOLD = -3  # of malloc.h


def status(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise KeyError(name)


def fit(size: str, run: str, precision: str) -> dict[str, Any]:
    """Train in this process; return what it took and what was estimated."""
    from deft_lightning import InstructionDataModule, SFTModule, Trainer
    from deft_lightning.models import LoRA
    from deft_lightning.training.memory.advice import estimate_of

    found: dict[str, Any] = {}

    class Measured(SFTModule):
        def configure_model(self) -> None:
            if self.model is None:
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
                found["before"] = status("VmRSS")
            super().configure_model()
            found.setdefault("loaded", status("VmHWM") - found["before"])  # pages of files that are read count too
            found["estimate"] = vars(estimate_of(self, self.prompts.largest_batch))

    (rows, length), options = BATCHES[size], dict(RUNS[run])
    letters = np.random.default_rng(0).integers(97, 123, (STEPS * rows, length)).astype(np.uint8)
    if (rank := options.pop("lora", None)) is not None:
        options["lora"] = LoRA(rank)
    with tempfile.TemporaryDirectory() as folder:
        data = InstructionDataModule(
            [{"text": bytes(row).decode()} for row in letters], tokenizer_size=0, max_length=length, batch_size=rows,
            validation_fraction=0.0, cache=False,
        )  # fmt: skip
        if "quantization" in options:  # weights are quantised while they are read from files
            from deft_lightning.data.encoding.tokenizer import build_tokenizer
            from deft_lightning.models import from_architecture

            written = from_architecture({**COMMON, **SHAPES[size]}, None, "float32")
            written.save_pretrained(base := str(Path(folder) / "base"))
            build_tokenizer(["a"], 0).save_pretrained(base)
            del written
            module = Measured(pretrained=base, **options)
        else:
            module = Measured(architecture={**COMMON, **SHAPES[size]}, **options)
        trainer = Trainer(
            max_steps=STEPS, default_root_dir=folder, accelerator="cpu", devices=1, precision=precision,
            enable_progress_bar=False, log_every_n_steps=1,
        )  # fmt: skip
        begun = time.perf_counter()
        trainer.fit(module, data)
    return {**found, "peak": status("VmHWM") - found["before"], "seconds": time.perf_counter() - begun}


def measure(size: str, run: str, precision: str) -> dict[str, Any]:
    """Return what a fit took, from a process of its own that has made a tiny one of the same kind before.

    So libraries are imported, and those pages of them are resident that a fit touches: they are no memory of the run.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr
        fit("tiny", run, precision)
        with os.fdopen(write, "w") as out:
            json.dump(fit(size, run, precision), out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    if os.waitpid(child, 0)[1] or not text:
        raise SystemExit(f"{size}, {run}: the fit failed")
    found: dict[str, Any] = json.loads(text)
    rows, length = BATCHES[size]
    return {
        "size": size, "run": run, "precision": precision, "rows": rows, "length": length,
        "estimate": found["estimate"], "estimated_GiB": found["estimate"]["peak"] / GIB,
        "measured_GiB": found["peak"] / GIB, "ratio": found["estimate"]["peak"] / found["peak"],
        "loaded_GiB": found["loaded"] / GIB, "seconds": found["seconds"],
    }  # fmt: skip


def needed(model: str, way: str) -> float:
    """Return the estimate of a way to train a model on a GPU, in GiB; 8 rows of 1024 tokens, 2 by `deft:model/full`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from deft_lightning.data.loading.shape import BatchShape
    from deft_lightning.models import LoRA, add_adapters
    from deft_lightning.models.load import recompute_activations
    from deft_lightning.models.quantized_shape import quantize_shapes
    from deft_lightning.training.memory.estimate import Setup, estimate
    from deft_lightning.training.optim import adamw

    lora, rows = "lora" in way.lower(), 2 if "full`" in way else 8
    config = AutoConfig.for_model("qwen2", **QWEN[model])
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if lora else torch.float32).train()
        kind: Any = "nf4" if "nf4" in way or "qlora" in way else "int8" if "int8" in way else None
        if kind is not None:
            quantize_shapes(built, kind, torch.bfloat16)
        if "checkpointing" in way or "full`" in way or "qlora" in way:
            recompute_activations(built)
        built = add_adapters(built, LoRA()) if lora else built
    setup = Setup(adamw, "bf16-mixed", kernel="triton", device="cuda")
    if "full`" in way:
        setup = replace(setup, accumulate=4)
    if "fsdp2" in way:
        setup = replace(setup, ranks=8, sharded=True)
    batch = BatchShape(rows, 1024, rows * 1023)
    return estimate(built, batch, setup).peak / GIB


def table() -> None:
    """Print what fits, as the page has it."""
    print(f"| GiB on a GPU | {' | '.join(QWEN)} |\n|---|{'---|' * len(QWEN)}")
    for way in WAYS:
        print(f"| {way} | {' | '.join(f'{needed(model, way):.1f}' for model in QWEN)} |", flush=True)


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["23M", "57M", "135M"], choices=list(SHAPES))
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--precision", nargs="+", default=["32-true"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--allocator", choices=["glibc", "exact"], default="glibc")
    args = parser.parse_args()
    if args.table:
        table()
        return
    if args.allocator == "exact":  # every tensor above 64 KiB is mapped by itself, and unmapped when it is freed
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    torch.set_num_threads(1)
    fit("tiny", "full", "32-true")  # imports what any fit does
    results = []
    for size in args.sizes:
        for run in args.only:
            for precision in args.precision:
                found = measure(size, run, precision)
                results.append(found)
                print(
                    f"{size:>5} {run:<20} {precision:<10} estimated {found['estimated_GiB']:.2f} GiB, measured"
                    f" {found['measured_GiB']:.2f} GiB, ratio {found['ratio']:.2f}, {found['seconds']:.0f} s",
                    flush=True,
                )
                if args.output:
                    about = {"cores": os.cpu_count(), "allocator": args.allocator, "runs": results}
                    args.output.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    worst = max(abs(found["ratio"] - 1) for found in results)
    print(f"furthest off: {worst:.0%}, the goal is {LIMIT:.0%}")


if __name__ == "__main__":
    main()
