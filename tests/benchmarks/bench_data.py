"""Preparation of instruction data: time against `datasets.map` with the same tokenizer, cache, memory, packing.

    python tests/benchmarks/bench_data.py --source gsm8k_train.jsonl --tokenizer FOLDER [--rounds 5]
        [--memory_mb 250 500 1000] [--output docs/evidence/data/bench_data.json]

`datasets.map` is given the same texts, the chat template already applied, and does nothing but tokenise them; its time
is that of `map` alone. Preparation reads the file, normalises, renders, tokenises, masks, truncates and writes. Memory
is the peak of a process's own (anonymous) pages while it prepares a generated JSONL of that size. Packing is measured
as tokens a second (padding not counted) of forward and backward of a small Llama. Rounds run both in turn; ratios are
medians over rounds.
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
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def module(args: argparse.Namespace, cache: str, source: str | None = None, **options: Any) -> Any:
    """The data module under test."""
    from deft_lightning import InstructionDataModule

    return InstructionDataModule(
        source=source or args.source, tokenizer=args.tokenizer, max_length=args.max_length, cache_dir=cache,
        num_proc=args.num_proc, **options,
    )  # fmt: skip


def prepare(args: argparse.Namespace) -> dict[str, float]:
    """Prepare once and load once, each as a run would."""
    with tempfile.TemporaryDirectory() as cache:
        times = {}
        for name in ("prepare", "reload"):
            data = module(args, cache)
            data._settle_tokenizer()
            data.tokenizer("warm up")
            start = time.perf_counter()
            data.setup("fit")
            times[name] = time.perf_counter() - start
        return times


def map_alone(args: argparse.Namespace) -> dict[str, float]:
    """Tokenise the rendered texts with datasets.map."""
    from datasets import Dataset, disable_caching

    from deft_lightning.data.encoding.template import render
    from deft_lightning.data.prepared.recipe import read_examples

    with tempfile.TemporaryDirectory() as cache:
        data = module(args, cache)
        data._settle_tokenizer()
        recipe, tokenizer = data.settings.recipe(), data.tokenizer
        examples = read_examples(args.source, recipe, None)
        rows = Dataset.from_list([{"text": render(tokenizer, e.messages, prompt=False)} for e in examples])
        tokenizer("warm up")
        disable_caching()
        start = time.perf_counter()
        rows.map(
            lambda batch: tokenizer(batch["text"], add_special_tokens=False),
            batched=True, num_proc=args.num_proc if args.num_proc > 1 else None,
        )  # fmt: skip
        return {"map": time.perf_counter() - start}


def memory(args: argparse.Namespace, megabytes: int) -> dict[str, float]:
    """Peak anonymous memory while preparing a generated file, above that before."""

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w", encoding="utf-8") as out:
            number = 0
            while out.tell() < megabytes << 20:
                for _ in range(1000):
                    number += 1
                    words = f"What is {number} times {number % 97}? " * 20
                    row = {"question": words, "answer": f"It is {number * (number % 97)}. " * 30}
                    out.write(json.dumps(row) + "\n")
        data = module(args, folder, str(path))
        data._settle_tokenizer()
        data.tokenizer("warm up")
        before = peak = anonymous()
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.05):
                peak = max(peak, anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        data.setup("fit")
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
        return {"rows": number, "MB": (peak - before) / 1024, "seconds": seconds}


def packing(args: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of padded, length-grouped and packed batches."""
    import torch

    from deft_lightning import SFTModule
    from deft_lightning.objectives import DEFT

    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, options in {
            "padded": {"batch_size": 8}, "grouped": {"batch_size": 8, "group_by_length": True},
            "packed": {"batch_size": 2, "packing": True},
        }.items():  # fmt: skip
            data = module(args, cache, **options)
            data.setup("fit")
            torch.manual_seed(0)
            size = {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 4, "num_attention_heads": 6}
            model = SFTModule(DEFT(), architecture={"model_type": "llama", "vocab_size": len(data.tokenizer), **size})
            model.configure_model()
            tokens, shapes, start = 0, 0, 0.0
            for step, batch in enumerate(data.train_dataloader()):
                if step == 3:
                    tokens, shapes, start = 0, 0, time.perf_counter()
                model.loss_and_stats(batch)[0].backward()
                tokens += batch["num_tokens"]
                shapes += batch["input_ids"].numel()
                if step == 40:
                    break
            result[f"{name} tokens/s"] = tokens / (time.perf_counter() - start)
            result[f"{name} share of tokens that are not padding"] = tokens / shapes
    return result


PARTS = {"prepare": prepare, "map": map_alone, "packing": packing}


def run(part: str, args: argparse.Namespace) -> dict[str, float]:
    """Run a part in a process of its own."""
    command = [
        sys.executable, __file__, "--part", part, "--source", args.source, "--tokenizer", args.tokenizer,
        "--num_proc", str(args.num_proc), "--max_length", str(args.max_length),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Run the rounds and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory_mb", type=int, nargs="*", default=[])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part = PARTS.get(args.part)
        print(json.dumps(part(args) if part else memory(args, int(args.part))))
        return
    rounds = [{**run("prepare", args), **run("map", args)} for _ in range(args.rounds)]
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "num_proc": args.num_proc,
        **{f"{name}_s": statistics.median(row[name] for row in rounds) for name in ("prepare", "map", "reload")},
        "prepare_to_map": statistics.median(row["prepare"] / row["map"] for row in rounds),
        "packing": run("packing", args),
    }  # fmt: skip
    print(json.dumps(result, indent=2), flush=True)
    for megabytes in args.memory_mb:
        result[f"memory of {megabytes} MB"] = found = run(str(megabytes), args)
        print(f"{megabytes} MB: {found}", flush=True)
    if args.output:
        args.output.write_text(json.dumps({**result, "rounds": rounds}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
