"""A run on several sources, the same for one process and for two ranks; as a script, one rank of it.

``python sources_worker.py FOLDER STRATEGY`` with LOCAL_RANK, WORLD_SIZE and MASTER_* set joins the other rank; events
go to ``FOLDER/STRATEGY``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from worlds import bare_trainer, constant, sgd, write_rows

from deft_lightning import InstructionDataModule, SFTModule
from deft_lightning.callbacks import GateMonitor, NoiseMonitor
from deft_lightning.data.noise import Noise, TokenReplace
from deft_lightning.objectives import DEFT, Objective

# Sources of unlike lengths and unlike sizes: a mean of means is not the mean over tokens.
ANSWERS = {
    "a": [f"{i}" for i in range(24)],
    "b": [f"one, two, three and {i} more of them" for i in range(12)],
    "c": [("so " * (i % 5)) + "it is" for i in range(16)],
}


def write_sources(root: Path) -> list[str]:
    """Write a file for each source; ids begin with its name."""
    return [
        write_rows(root / f"{name}.jsonl", ({"id": f"{name}{i}", "question": f"q{i}", "answer": a} for i, a in rows))
        for name, rows in ((name, enumerate(answers)) for name, answers in ANSWERS.items())
    ]


def make_data(source: Any, **options: Any) -> InstructionDataModule:
    defaults = {"tokenizer_size": 0, "batch_size": 8, "validation_fraction": 0.25, "cache": False}
    return InstructionDataModule(source, **{**defaults, **options})


def run(
    root: Path, pretrained: str, data: InstructionDataModule, *callbacks: Any, ckpt_path: str | None = None,
    optimizer: Any = sgd, objective: Objective | None = None, **options: Any,
) -> SFTModule:  # fmt: skip
    """Train, with events in ``root``."""
    torch.manual_seed(0)
    module = SFTModule(objective or DEFT(), pretrained=pretrained, optimizer=optimizer, scheduler=constant)
    logger = TensorBoardLogger(root.parent, name=root.name, version="")
    watching = (GateMonitor(histograms=False), NoiseMonitor())
    trainer = bare_trainer(root, *watching, *callbacks, logger=logger, **options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module


NOISE = Noise(ops=[TokenReplace(rate=0.3)])


def on_ranks(root: Path, world: int, strategy: str) -> SFTModule:
    """Steps of two micro-batches, logged every second one."""
    sources = [str(root / f"{name}.jsonl") for name in ANSWERS]
    objectives = {"a": "Tsallis(q=0.3)", "c": "Contaminated(answer_chance=least, decay=0.5)"}
    data = make_data(sources, batch_size=8 // world, noise=NOISE, objectives=objectives)
    options: dict[str, Any] = {
        "devices": world, "strategy": strategy, "log_every_n_steps": 2, "max_epochs": 2, "accumulate_grad_batches": 2,
        "limit_train_batches": 4,  # the batches that are full
    }  # fmt: skip
    return run(root / strategy, str(root / "pretrained"), data, **options)


if __name__ == "__main__":
    on_ranks(Path(sys.argv[1]), 2, sys.argv[2])
