"""A step of `fit`, of TRL's SFTTrainer and of a bare loop side by side: processor time, peak memory, and the start.

    python tests/benchmarks/bench_trl.py --pretrained MODEL --rows my.jsonl [--rounds 1] [--steps 4]
        [--precision 32-true bf16-mixed] [--cases NAME ...] [--output docs/evidence/data/bench_trl.json]

All train the same model on the same texts, cut to the same number of tokens, with AdamW and clipping, without
validation, checkpoints and gradient checkpointing, and log as they do by default. The bare loop, with transformers'
loss, logs nothing. The weights are in float32; `bf16-mixed` is SFTTrainer's `bf16=True`. Each case is a process of its
own with one thread; the cases take turns. Times are of the processor. Steps count from the second on; the start is from
the beginning of the process to the end of its first step. The peak is VmHWM of the whole process (Linux:
/proc/self/status).
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
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CASES = ("fit DEFT", "fit NLL", "TRL nll", "TRL dft", "bare loop")
RATE, BETAS, DECAY = 5e-5, (0.9, 0.95), 0.01


def texts(args: argparse.Namespace) -> list[dict[str, str]]:
    """Return rows that are longer than a row of the batch: the file's text in pieces."""
    whole = Path(args.rows).read_text(encoding="utf-8")
    size = 8 * args.max_length  # characters; a token has four or five
    count = args.batch_size * args.steps
    if len(whole) < size * count:
        raise SystemExit(f"{args.rows}: {size * count:,} characters are needed")
    return [{"text": whole[at * size : (at + 1) * size]} for at in range(count)]


def train_here(args: argparse.Namespace, ends: list[float], folder: str, objective: str) -> None:
    """Train with this package, as `fit` does."""
    from functools import partial

    import torch
    from lightning.pytorch import Callback

    from deft_lightning import InstructionDataModule, SFTModule, Trainer

    class Clock(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert batch["input_ids"].shape == (args.batch_size, args.max_length), batch["input_ids"].shape
            ends.append(time.process_time())

    trainer = Trainer(
        max_steps=args.steps, default_root_dir=folder, limit_val_batches=0, enable_checkpointing=False,
        accelerator="cpu", devices=1, precision=args.precision[0], callbacks=[Clock()],
    )  # fmt: skip
    # Behind the monitors, whose work is of the step.
    trainer.callbacks.append(trainer.callbacks.pop([type(one) for one in trainer.callbacks].index(Clock)))
    optimizer = partial(torch.optim.AdamW, lr=RATE, betas=BETAS, weight_decay=DECAY)
    data = InstructionDataModule(
        texts(args), batch_size=args.batch_size, max_length=args.max_length, validation_fraction=0.0
    )
    trainer.fit(SFTModule(objective, pretrained=args.pretrained, optimizer=optimizer), data)


def train_there(args: argparse.Namespace, ends: list[float], folder: str, loss: str) -> None:
    """Train with TRL's SFTTrainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.process_time())

    config = SFTConfig(
        folder, max_steps=args.steps, per_device_train_batch_size=args.batch_size, max_length=args.max_length,
        loss_type=loss, learning_rate=RATE, adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=DECAY,
        max_grad_norm=1.0, use_cpu=True, bf16=args.precision[0] != "32-true", gradient_checkpointing=False,
        save_strategy="no", report_to=["tensorboard"], disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(args.pretrained, dtype=torch.float32), args=config,
        train_dataset=Dataset.from_list(texts(args)),
        processing_class=AutoTokenizer.from_pretrained(args.pretrained), callbacks=[Clock()],
    )  # fmt: skip
    lengths = {len(row) for row in trainer.train_dataset["input_ids"]}
    assert lengths == {args.max_length}, lengths
    trainer.train()


def train_bare(args: argparse.Namespace, ends: list[float], folder: str, name: str) -> None:
    """Train in a plain loop, by the model's own loss."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.pretrained)
    ids = [tokenizer(row["text"])["input_ids"][: args.max_length] for row in texts(args)]
    model = AutoModelForCausalLM.from_pretrained(args.pretrained, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True)
    for batch in torch.tensor(ids).split(args.batch_size):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision[0] != "32-true"):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.process_time())


WAYS = {"fit": train_here, "TRL": train_there, "bare": train_bare}


def child(args: argparse.Namespace) -> None:
    """Train one case in this process, and print what it took."""
    ends: list[float] = []
    way, name = args.case.split()
    with tempfile.TemporaryDirectory() as folder:
        WAYS[way](args, ends, folder, name)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = int(status.partition("VmHWM:")[2].split()[0])
    steps = [after - before for before, after in pairwise(ends)]
    print(json.dumps({"start_s": ends[0], "steps_s": steps, "peak_GiB": peak / 2**20}))


def measure(args: argparse.Namespace, case: str, precision: str) -> dict[str, Any]:
    """Return what a case took, from a process of its own."""
    command = [
        sys.executable, __file__, "--case", case, "--pretrained", args.pretrained, "--rows", args.rows, "--steps",
        str(args.steps), "--precision", precision, "--batch_size", str(args.batch_size), "--max_length",
        str(args.max_length),
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        environment["DEFT_LIGHTNING_CACHE"] = environment["HF_DATASETS_CACHE"] = folder
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case}, {precision}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="folder of a model")
    parser.add_argument("--rows", required=True, help="file of which the text is trained on")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="of each process, of which the first is the start")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--precision", nargs="+", default=["32-true", "bf16-mixed"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.pretrained, args.rows = str(Path(args.pretrained).resolve()), str(Path(args.rows).resolve())
    if args.case:
        child(args)
        return
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for number in range(args.rounds):
        for precision in args.precision:
            for case in args.cases if number % 2 == 0 else args.cases[::-1]:
                one = measure(args, case, precision)
                found.setdefault(precision, {}).setdefault(case, []).append(one)
                step = statistics.median(one["steps_s"])
                print(f"{precision} {case}: step {step:.2f} s, {one['peak_GiB']:.2f} GiB, start {one['start_s']:.1f} s",
                      flush=True)  # fmt: skip
                if args.output:
                    about = {
                        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
                        "batch": [args.batch_size, args.max_length], "steps": args.steps, "runs": found,
                    }  # fmt: skip
                    args.output.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
