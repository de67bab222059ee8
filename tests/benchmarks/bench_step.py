"""Processor time of a training step against a bare PyTorch loop, in windows of one process that alternate.

    python tests/benchmarks/bench_step.py [--windows 30] [--steps 10] [--output docs/evidence/data/bench_step.json]
    python tests/benchmarks/bench_step.py --pretrained MODEL --rows my.jsonl --steps 1 --windows 12
    python tests/benchmarks/bench_step.py [--pretrained MODEL] --parts [--windows 30]

The package trains with its own Trainer, monitors and logging as in `fit`, and no validation; after every window of
steps the bare loop trains a second copy of the model on the same batches: transformers' own cross entropy, clipping,
AdamW as torch makes it, no schedule and no logging. A ratio compares a window with the one that follows it, so that a
machine whose speed drifts, or that others use, treats both alike. The first windows, in which allocators, caches and
imports settle, are left out. Without --pretrained the model and the rows are those of configs/from_scratch.yaml.
--parts times what follows the backward pass alone, this package's way and torch's in turn: AdamW, clipping after a
division by the tokens, and the seed of a micro-batch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "from_scratch.yaml"
WARM_UP = 2  # windows


def data_of(args: argparse.Namespace) -> Any:
    """Return the data of a run, a new module each time: the order of its batches is a function of the seed."""
    import yaml

    from deft_lightning.data import InstructionDataModule, Noise, ResponseSwap

    if args.pretrained:
        return InstructionDataModule(
            args.rows, batch_size=args.batch_size, max_length=args.max_length, packing=True, validation_fraction=0.0
        )
    settings = dict(yaml.safe_load(CONFIG.read_text())["data"])
    rate = settings.pop("noise")["ops"][0]["init_args"]["rate"]
    return InstructionDataModule(**settings, noise=Noise(ops=[ResponseSwap(rate)]))


def recipe(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return how the model is made, and the options of AdamW."""
    import yaml

    if args.pretrained:
        return {"pretrained": args.pretrained}, {"lr": 5e-5, "betas": (0.9, 0.95), "weight_decay": 0.01}
    model = yaml.safe_load(CONFIG.read_text())["model"]
    options = dict(model["optimizer"]["init_args"])
    return {"architecture": model["architecture"]}, {**options, "betas": tuple(options["betas"])}


def bare_loop(args: argparse.Namespace) -> Iterator[None]:
    """Train a step at a time in a plain loop."""
    import torch
    from transformers import AutoModelForCausalLM

    from deft_lightning.models import from_architecture

    made, options = recipe(args)
    data = data_of(args)
    data.setup("fit")
    if args.pretrained:
        model = AutoModelForCausalLM.from_pretrained(args.pretrained, dtype=torch.float32)
    else:
        model = from_architecture(made["architecture"], data.tokenizer, "float32")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    for batch in data.train_dataloader():
        names = ("input_ids", "labels", *(["position_ids"] if "position_ids" in batch else ["attention_mask"]))
        loss = model(**{name: batch[name] for name in names}, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


def package(args: argparse.Namespace, folder: str, between: Callable[[], None], objective: str) -> list[float]:
    """Train with the package; return the processor time of each window of steps, and call a function after each."""
    import torch
    from lightning.pytorch import Callback

    from deft_lightning import SFTModule, Trainer

    windows: list[float] = []
    started = 0.0

    class Clock(Callback):
        """The last of the callbacks, so that a window ends after what the monitors did in its last step."""

        def on_train_start(self, *_: Any) -> None:
            nonlocal started
            started = time.process_time()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            nonlocal started
            if trainer.global_step % args.steps == 0:
                windows.append(time.process_time() - started)
                between()
                started = time.process_time()

    made, options = recipe(args)
    trainer = Trainer(
        max_steps=args.windows * args.steps, default_root_dir=folder, limit_val_batches=0, enable_checkpointing=False,
        accelerator="cpu", devices=1, callbacks=[Clock()],
    )  # fmt: skip
    # Callbacks of the recipe come behind those that are given.
    trainer.callbacks.append(trainer.callbacks.pop([type(one) for one in trainer.callbacks].index(Clock)))
    module = SFTModule(objective, **made, optimizer=partial(torch.optim.AdamW, **options))
    trainer.fit(module, data_of(args))
    return windows


def compare(args: argparse.Namespace, objective: str) -> dict[str, Any]:
    """Return what one objective costs against the bare loop."""
    steps, bare = bare_loop(args), []

    def between() -> None:
        started = time.process_time()
        for _ in range(args.steps):
            next(steps)
        bare.append(time.process_time() - started)

    with tempfile.TemporaryDirectory() as folder:
        own = package(args, folder, between, objective)
    ratios = [mine / other for mine, other in zip(own, bare, strict=True)][WARM_UP:]
    return {
        "ratio": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
        "ratio_of_sums": sum(own[WARM_UP:]) / sum(bare[WARM_UP:]),
        "step_cpu_s": {
            "package": statistics.median(own[WARM_UP:]) / args.steps,
            "bare loop": statistics.median(bare[WARM_UP:]) / args.steps,
        },
        "windows": {"package": own, "bare loop": bare},
    }


def parts(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the parts of a step behind the backward pass cost, in ms of the processor."""
    import torch
    from torch.nn.utils import clip_grad_norm_
    from transformers import AutoModelForCausalLM

    from deft_lightning.models import from_architecture
    from deft_lightning.training.fused_adam import fuse
    from deft_lightning.training.normaliser import StepNormaliser
    from deft_lightning.training.seeding import reseed

    made, options = recipe(args)
    if args.pretrained:
        model = AutoModelForCausalLM.from_pretrained(args.pretrained, dtype=torch.float32)
    else:
        data = data_of(args)
        data.setup("fit")
        model = from_architecture(made["architecture"], data.tokenizer, "float32")
    weights, one = list(model.parameters()), torch.tensor(1.0)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    loop, fused = (torch.optim.AdamW(weights, **options) for _ in range(2))
    fuse(fused)
    normaliser = StepNormaliser("raise")

    def two_passes() -> None:
        torch._foreach_mul_([weight.grad for weight in weights], one)
        clip_grad_norm_(weights, 1.0)

    def one_pass() -> None:
        normaliser._scale = one
        normaliser.clip_norm(fused, 1.0)

    ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "AdamW": (loop.step, fused.step), "dividing and clipping": (two_passes, one_pass),
        "seed": (lambda: torch.manual_seed(1), lambda: reseed(0, 0, 0, torch.device("cpu"))),
    }  # fmt: skip
    result = {}
    for name, pair in ways.items():
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(args.windows):
            for way, spent in zip(pair, times, strict=True):
                started = time.process_time()
                for _ in range(3):
                    way()
                spent.append((time.process_time() - started) / 3 * 1e3)
        ratios = [ours / theirs for theirs, ours in zip(*times, strict=True)][WARM_UP:]
        result[name] = {
            "torch_ms": statistics.median(times[0]), "package_ms": statistics.median(times[1]),
            "ratio": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
        }  # fmt: skip
    return result


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10, help="of a window; 10 is the default logging interval")
    parser.add_argument("--objectives", nargs="+", default=["DEFT", "NLL"])
    parser.add_argument("--pretrained", help="folder of a model; default: the model of configs/from_scratch.yaml")
    parser.add_argument("--rows", help="file of rows, with --pretrained")
    parser.add_argument("--batch_size", type=int, default=4, help="packed rows of a step, with --pretrained")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a packed row, with --pretrained")
    parser.add_argument("--parts", action="store_true", help="what follows the backward pass alone")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.parts:
        print(json.dumps(parts(args), indent=2))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}",
        "windows": args.windows - WARM_UP, "steps_of_a_window": args.steps,
        "objectives": {objective: compare(args, objective) for objective in args.objectives},
    }  # fmt: skip
    told = {name: {key: value for key, value in row.items() if key != "windows"}
            for name, row in result["objectives"].items()}  # fmt: skip
    print(json.dumps({**result, "objectives": told}, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
