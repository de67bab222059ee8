"""One of four ranks under fsdp2 in two groups that hold the whole model each.

``python hybrid_worker.py FOLDER fsdp2`` with LOCAL_RANK, WORLD_SIZE and MASTER_* set joins the other ranks and leaves
``hybrid<R>.pt`` with what it found in FOLDER.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from ranks_worker import data, exported, make_module, make_trainer, resumed, run_to, train, uneven
from worlds import weights

from deft_lightning.errors import UserError
from deft_lightning.models.fingerprint import fingerprint
from deft_lightning.training import offload
from deft_lightning.training.fsdp2 import FSDP2Strategy

Found = dict[str, Any]
IN_HOST_MEMORY = {"cpu_offload": True, "offload_activations": True}
SENT = {"count": 0}  # activations that went to host memory


class Watch(Callback):
    """Says before the first step what this rank holds, and which model it is."""

    found: Found

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        local = [p.to_local() if hasattr(p, "to_local") else p for p in pl_module.model.parameters()]
        total = sum(p.numel() for p in pl_module.model.parameters())
        self.found = {"share": sum(p.numel() for p in local) / total, "fingerprint": fingerprint(pl_module.model)}


def plain(root: Path, world: int, **options: Any) -> Found:
    """Four steps on rows of which each rank has its own."""
    watch, before = Watch(), SENT["count"]
    # A small rate: what is compared is the rounding of sums in another order, not how far training carries it.
    trained = train(root, world, uneven(32), callbacks=[watch], model={"rate": 0.1}, **options)
    return {**trained, **watch.found, "sent": SENT["count"] - before}


def exchanged(root: Path, world: int) -> Found:
    """Two steps of one process, two more in groups."""
    first = root / "one.ckpt"
    if world == 1:
        first.write_bytes(Path(run_to(root, 1, 2)[1]).read_bytes())
    options = {} if world == 1 else {"strategy": partial(FSDP2Strategy, replicate=2)}
    module, path = run_to(root, world, 4, str(first), **options)
    return {"weights": weights(module.model), "checkpoint": path}


def refused(root: Path, world: int) -> Found:
    """Four ranks in three groups."""
    try:
        strategy = FSDP2Strategy(replicate=3)
        make_trainer(root, world, max_steps=1, strategy=lambda: strategy).fit(make_module(root), data(root, world))
    except UserError as error:
        return {"error": str(error)}
    return {}


def count_sent() -> None:
    """Send activations of any size, as none is large in a model this small, and count them."""
    offload.LEAST = 0
    worth_sending = offload._worth_sending

    def counting(tensor: torch.Tensor) -> bool:
        worth = worth_sending(tensor)
        SENT["count"] += worth
        return worth

    offload._worth_sending = counting


def main() -> None:
    """Run every scenario as one rank of four."""
    root, world, rank = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"]), os.environ["RANK"]
    groups = partial(FSDP2Strategy, replicate=2)
    count_sent()
    found = {
        "groups": plain(root, world, strategy=groups),
        "host memory": plain(root, world, strategy=partial(groups, **IN_HOST_MEMORY)),
        "low precision": plain(root, world, strategy=groups, precision="bf16-mixed"),
        "resumed": resumed(root / "file", world, strategy=groups),
        "resumed from shares": resumed(
            root / "shares", world, strategy=partial(groups, save_distributed_checkpoint=True, **IN_HOST_MEMORY)
        ),
        "exchanged": exchanged(root, world),
        "exported": exported(root, world, strategy=groups),
        "refused": refused(root, world),
    }
    torch.save(found, root / f"hybrid{rank}.pt")


if __name__ == "__main__":
    main()
