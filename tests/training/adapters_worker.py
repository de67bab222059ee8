"""Runs of adapters on a base in files, on two ranks; as a script, one rank of all of them.

``python adapters_worker.py FOLDER STRATEGY [QUANTIZATION]`` with LOCAL_RANK, WORLD_SIZE and MASTER_* set, as
``ranks_worker.py``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ranks_worker import make_trainer, run_to
from worlds import weights

from deft_lightning.errors import UserError
from deft_lightning.models import LoRA, load_checkpoint

Found = dict[str, Any]
ADAPTERS: dict[str, Any] = {"lora": LoRA(r=2, dropout=0.4)}


def resumed(root: Path, world: int, **options: Any) -> Found:
    """Four steps at once, and two and two; what the checkpoint between them holds."""
    whole = weights(run_to(root / "whole", world, 4, model=ADAPTERS, **options)[0].model)
    _, cut = run_to(root / "cut", world, 2, model=ADAPTERS, **options)
    again = weights(run_to(root / "again", world, 4, cut, model=ADAPTERS, **options)[0].model)
    held = load_checkpoint(cut)
    return {
        "difference": max(float((whole[name] - again[name]).abs().max()) for name in whole),
        "held": sorted(held["state_dict"]),
        "trained": sorted(f"model.{name}" for name in whole),
        "base": held["deft_lightning"]["base"],
        "checkpoint": cut,
    }


def shares(root: Path, world: int) -> Found:
    """As resumed, of checkpoints to which each rank writes its share; nothing where weights are not sharded."""
    if sys.argv[2] != "fsdp2":
        return {}
    from deft_lightning.training.fsdp2 import FSDP2Strategy

    found = resumed(root / "shares", world, strategy=lambda: FSDP2Strategy(save_distributed_checkpoint=True))
    exporter = make_trainer(root, world)
    if int(os.environ["LOCAL_RANK"]) == 0:
        exporter.export(ckpt_path=found["checkpoint"], output=str(root / "exported-shares"))
    return {**found, "refused": refused(root / "other-shares", world, found["checkpoint"])}


def refused(root: Path, world: int, checkpoint: str) -> str:
    """Return the line for a checkpoint whose base is another one."""
    other = {**ADAPTERS, "pretrained": str(root.parent / "elsewhere")}
    try:
        run_to(root, world, 4, checkpoint, model=other)
    except UserError as error:
        return str(error)
    return ""


def file(root: Path, world: int) -> Found:
    """As resumed, of one file."""
    found = resumed(root / "file", world)
    return {**found, "refused": refused(root / "other", world, found["checkpoint"])}


SCENARIOS: dict[str, Callable[[Path, int], Found]] = {"file": file, "shares": shares}


def main() -> None:
    """Run every scenario as one rank."""
    root, world = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    ADAPTERS["quantization"] = sys.argv[3] if len(sys.argv) > 3 else None
    found = {}
    for name, scenario in SCENARIOS.items():
        print(f"scenario: {name}", flush=True)
        found[name] = scenario(root, world)
    torch.save(found, root / f"rank{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main()
