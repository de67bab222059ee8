"""A rank of transformers.Trainer: trains every case on its share of the rows, resumes one, and writes what came out."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed import destroy_process_group
from whole_batches import tiny_model, trained, wrong_rows

from deft_lightning.integrations import GateCallback, compute_loss_func
from deft_lightning.objectives.parse import parse_objective


def run(root: Path, name: str, objective: str, **options: Any) -> None:
    trainer = trained(root / name, compute_loss_func(parse_objective(objective)), GateCallback(), **options)
    if trainer.is_world_process_zero():
        weights = [weight.detach() for weight in trainer.model.parameters()]
        torch.save({"weights": weights, "log": trainer.state.log_history}, root / f"{name}.pt")


def main(root: Path) -> None:
    for name, (objective, batch, accumulate) in json.loads((root / "cases.json").read_text()).items():
        run(root, name, objective, batch=batch, accumulate=accumulate)
    options: dict[str, Any] = {
        "batch": 1, "accumulate": 2, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch",
        "learning_rate": 1e-2,
    }  # fmt: skip
    objective = "Contaminated(answer_chance=least, start=0.2)"
    run(root, "whole", objective, **options)
    run(root, "cut", objective, **options, resume=str(root / "whole" / "checkpoint-3"))
    learnt = tiny_model()
    learnt.load_state_dict(torch.load(root / "learnt.pt", weights_only=True))
    sampled = "Contaminated(chance=unigram, answer_chance=None)"
    run(root, "sampled", sampled, batch=2, model=learnt, rows=wrong_rows(), max_steps=1)
    run(root, "evaluated", "DEFT", batch=4, eval_strategy="epoch", per_device_eval_batch_size=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # While the group is there: the last trainer's gradient buckets would end it, holding the lock that it waits for.
    gc.collect()
    destroy_process_group()
