"""A run of the noise model, the same for one process and for two ranks; as a script, one rank of it.

``python contaminated_worker.py FOLDER STRATEGY [best]`` with LOCAL_RANK, WORLD_SIZE and MASTER_* set joins the other
rank and leaves ``STRATEGY.pt`` with weights, rates and mean prediction in FOLDER.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from worlds import bare_trainer, constant, sgd, weights

from deft_lightning import InstructionDataModule, SFTModule
from deft_lightning.data.noise import Noise, ResponseSwap
from deft_lightning.objectives import Contaminated, Objective

NOISE = Noise(ops=[ResponseSwap(rate=0.5)])
NOISY: Objective = Contaminated(chance="least", answer_chance="unigram", decay=0.5, start=0.3)

# The default chances, one of them what the model says of an answer without its prompt, and the rate of a sample.
BEST: Objective = Contaminated(decay=0.5)


def train(
    root: Path, data: dict[str, Any] | None = None, *callbacks: Any, objective: Objective = NOISY,
    ckpt_path: str | None = None, model: dict[str, Any] | None = None, kind: type[SFTModule] = SFTModule,
    **options: Any,
) -> SFTModule:  # fmt: skip
    """Train on the rows in ``root``, whole windows of eight examples."""
    torch.manual_seed(0)
    settings = {"batch_size": 8, "validation_fraction": 0.0, "noise": NOISE, **(data or {})}
    module = kind(
        objective, pretrained=str(root / "pretrained"), **{"optimizer": sgd, "scheduler": constant, **(model or {})}
    )  # fmt: skip
    trainer = bare_trainer(root / "runs", *callbacks, **{"max_epochs": 2, **options})
    trainer.fit(module, InstructionDataModule(str(root / "rows.jsonl"), **settings), ckpt_path=ckpt_path)
    return module


def found(module: SFTModule) -> dict[str, Any]:
    """What has to be the same however a run is cut up."""
    marginal = module.batch_loss.context.marginal
    return {
        "weights": weights(module.model), "rates": module.normaliser.memory,
        "marginal": None if marginal is None else marginal.mean.clone(),
    }  # fmt: skip


if __name__ == "__main__":
    folder, strategy = Path(sys.argv[1]), sys.argv[2]
    kept = {"batch_size": 4, "cache_dir": str(folder / f"cache of {strategy}")}  # nothing that one process has computed
    on_both = found(train(folder, kept, objective=BEST if "best" in sys.argv else NOISY, devices=2, strategy=strategy))
    if os.environ["LOCAL_RANK"] == "0":
        torch.save(on_both, folder / f"{strategy}.pt")
