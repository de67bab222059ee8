"""Anchored runs that are the same for one process and for two ranks; as a script, one rank of all of them.

``python anchor_worker.py FOLDER STRATEGY`` with LOCAL_RANK, WORLD_SIZE and MASTER_* set, as ``ranks_worker.py``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ranks_worker import data, make_module, make_trainer, resumed, run_to, train, uneven, weighted
from worlds import adam, weights

from deft_lightning.errors import UserError
from deft_lightning.models import LoRA
from deft_lightning.objectives import NLL, KLAnchor

Found = dict[str, Any]
ANCHOR = KLAnchor(base=NLL(), weight=0.5)
WITH_HEAD = LoRA(r=2, target_modules=["q_proj", "lm_head"])
LONG: dict[str, Any] = {"max_epochs": 3, "size": 4, "accumulate_grad_batches": 2}


def anchored(root: Path, world: int, more: dict[str, Any] | None = None, **options: Any) -> Found:
    """Three epochs at a rate that moves the model, so that the anchor pulls."""
    given: dict[str, Any] = {**LONG, **options}
    examples = given.pop("examples", None) or uneven(12)
    model = {"objective": ANCHOR, "rate": 0.1, **(more or {})}
    return train(root, world, examples, model=model, **given)


def forgotten(root: Path, world: int, **model: Any) -> Found:
    """What is measured on held-out rows after some training."""
    module = make_module(root, optimizer=partial(adam, lr=1e-2), forgetting=True, **model)
    trainer = make_trainer(root / f"forgotten{world}", world, max_epochs=2)
    trainer.fit(module, data(root, world))
    return {"kl": float(trainer.callback_metrics["forgetting/kl"]), "weights": weights(module.model)}


def other_beginning(root: Path, world: int) -> Found:
    """A run that is resumed with a model it did not begin from."""
    _, cut = run_to(root / "begun", world, 2, model={"objective": ANCHOR})
    try:
        run_to(root / "other", world, 4, cut, model={"objective": ANCHOR, "pretrained": str(root / "elsewhere")})
    except UserError as error:
        return {"error": str(error)}
    return {}


SCENARIOS: dict[str, Callable[[Path, int], Found]] = {
    "frozen": anchored,
    "dense": lambda root, world: anchored(root, world, {"head": "dense"}),
    "adapters": lambda root, world: anchored(root, world, {"lora": WITH_HEAD}),
    "weighted": lambda root, world: anchored(root, world, examples=weighted(12)),
    "checkpointed": lambda root, world: anchored(root, world, {"gradient_checkpointing": True}),
    "plain": lambda root, world: anchored(root, world, {"objective": NLL()}),
    "weight 0": lambda root, world: anchored(root, world, {"objective": KLAnchor(base=NLL(), weight=0.0)}),
    "bf16": lambda root, world: anchored(root, world, precision="bf16-mixed"),
    "resumed": lambda root, world: resumed(root / "anchored", world, objective=ANCHOR),
    "resumed adapters": lambda root, world: resumed(
        root / "anchored-lora", world, adapters=LoRA(r=2, dropout=0.1), objective=ANCHOR
    ),
    "forgotten": forgotten,
    "forgotten adapters": lambda root, world: forgotten(root / "lora", world, lora=WITH_HEAD),
    "other beginning": other_beginning,
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
