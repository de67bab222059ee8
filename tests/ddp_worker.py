"""Runs that are the same for one process and for two ranks; as a script, one rank of all of them.

``python ddp_worker.py FOLDER`` with LOCAL_RANK, WORLD_SIZE and MASTER_* set joins the other ranks, runs every scenario
and leaves ``rank<R>.pt`` with what it found in FOLDER.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.callbacks import Checkpoint, EntropyMonitor, GateMonitor, NoiseMonitor, PredictionWriter
from deft_lightning.data.collate import Prepared, TrainCollator
from deft_lightning.data.noise import Noise, TokenReplace
from deft_lightning.data.order import ShardedSampler
from deft_lightning.evaluation import Generation
from deft_lightning.models import LoRA

GLOBAL_BATCH = 8
Found = dict[str, Any]


def prepared(seed: int, learnt: int) -> Prepared:
    """Random tokens of which the last ``learnt`` are supervised."""
    length = 6 + seed % 5 + learnt
    ids = np.random.default_rng(seed).integers(6, 262, length)
    labels = np.where(np.arange(length) >= length - learnt, ids, -100)
    return Prepared(f"p{seed}", ids, labels, np.zeros(length, dtype=np.int64))


def uneven(count: int) -> list[Prepared]:
    """From 1 to 9 supervised tokens."""
    return [prepared(i, 1 + (3 * i * i) % 9) for i in range(count)]


def weights(module: SFTModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.model.named_parameters() if p.requires_grad}


def make_trainer(root: Path, world: int, *callbacks: Any, **options: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": world,
            "strategy": "ddp" if world > 1 else "auto",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "default_root_dir": str(root),
            "callbacks": list(callbacks),
            **options,
        }
    )


def make_module(root: Path, rate: float = 0.5, **options: Any) -> SFTModule:
    torch.manual_seed(0)
    return SFTModule(
        pretrained=str(root / "pretrained"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        **options,
    )


def train(
    root: Path, world: int, examples: list[Prepared], *, size: int = GLOBAL_BATCH, shuffle: bool = True,
    model: dict[str, Any] | None = None, **options: Any,
) -> Found:  # fmt: skip
    """Weights after some steps, ``size`` examples a micro-batch over all ranks together."""
    rank = int(os.environ.get("LOCAL_RANK", 0)) if world > 1 else 0
    sampler = ShardedSampler(len(examples), rank=rank, world=world, seed=3, shuffle=shuffle, even=True)
    loader = DataLoader(examples, size // world, sampler=sampler, collate_fn=TrainCollator(0))  # type: ignore[arg-type]
    module = make_module(root, **(model or {}))
    trainer = make_trainer(root, world, **options)
    trainer.fit(module, loader)
    return {
        "weights": weights(module),
        "steps": trainer.global_step,
        "tokens": module.tokens_seen,
        "grad_norm": trainer.callback_metrics["train/grad_norm"].clone(),
        "nll": trainer.callback_metrics["train/nll"].clone(),
    }


def one_rank_masked(root: Path, world: int) -> Found:
    """Every second example is fully masked, so one of two ranks never sees a label."""
    examples = [prepared(i, 0 if i % 2 else 1 + i % 4) for i in range(16)]
    return train(root, world, examples, shuffle=False)


def nothing_supervised(root: Path, world: int) -> Found:
    return train(root, world, [prepared(i, 0) for i in range(8)])


def accumulated(root: Path, world: int) -> Found:
    """Windows of eight examples and a last one of four."""
    return train(root, world, uneven(12), size=4, accumulate_grad_batches=2, max_epochs=2)


def data(root: Path, world: int, **options: Any) -> InstructionDataModule:
    return InstructionDataModule(
        str(root / "train.jsonl"),
        **{
            "format": "question_answer",
            "validation_source": str(root / "val.jsonl"),
            "batch_size": GLOBAL_BATCH // world,
            "eval_batch_size": 1,
            "noise": Noise(ops=[TokenReplace(rate=0.3)]),
            **options,
        },
    )


def watched(root: Path, world: int) -> Found:
    """Monitors, validation with an odd number of examples, and a checkpoint."""
    folder = root / f"run{world}"
    monitors = [GateMonitor(), EntropyMonitor(), NoiseMonitor(), Checkpoint()]
    module = make_module(root)
    trainer = make_trainer(folder, world, *monitors, logger=None, max_epochs=2)
    trainer.fit(module, data(root, world))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"metrics": metrics, "log_dir": trainer.log_dir, "weights": weights(module)}


def validated(root: Path, world: int) -> Found:
    found, *_ = make_trainer(root, world).validate(make_module(root), data(root, world), verbose=False)
    return {"metrics": found}


def predicted(root: Path, world: int, rows: str = "test") -> Found:
    path = root / f"predictions-{rows}-{world}.jsonl"
    module = make_module(root, generation=Generation(max_new_tokens=4))
    loaded = data(root, world, test_source=str(root / f"{rows}.jsonl"))
    trainer = make_trainer(root, world, PredictionWriter(str(path)))
    trainer.predict(module, loaded, return_predictions=False)
    (found,) = trainer.test(module, loaded, verbose=False)
    return {"path": str(path), "metrics": found}


SCENARIOS: dict[str, Callable[[Path, int], Found]] = {
    "uneven": lambda root, world: train(root, world, uneven(16), max_epochs=2),
    "dense": lambda root, world: train(root, world, uneven(16), model={"head": "dense"}),
    "clipped": lambda root, world: train(root, world, uneven(16), gradient_clip_val=0.1),
    "accumulated": accumulated,
    "one rank masked": one_rank_masked,
    "nothing supervised": nothing_supervised,
    "lora": lambda root, world: train(root, world, uneven(16), model={"lora": LoRA(r=2)}, max_epochs=2),
    "watched": watched,
    "validated": validated,
    "predicted": predicted,
    "separators predicted": lambda root, world: predicted(root, world, "separators"),
}


def main() -> None:
    """Run every scenario as one rank."""
    root, world = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    found = {}
    for name, scenario in SCENARIOS.items():
        print(f"scenario: {name}", flush=True)
        found[name] = scenario(root, world)
    torch.save(found, root / f"rank{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main()
