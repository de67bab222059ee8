"""The adapter of a fold: trained on the rows of the others, kept for a probe that is killed, taken away afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from deft_lightning.annotations import Batch
from deft_lightning.atomic import whole_file
from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX
from deft_lightning.hashing import key as key_of
from deft_lightning.models.lora import LoRA, add_adapters
from deft_lightning.objectives import NLL
from deft_lightning.probe.folds import Fold, steps_of
from deft_lightning.probe.pace import Pace
from deft_lightning.probe.reading import SPLIT, tokens_of

RANK = 8
RATE = 1e-3  # of AdamW; falls to 0 in a line
CLIP = 1.0
ADAPTER = "adapter.safetensors"


@contextmanager
def adapted(
    module: Any, data: Any, fold: Fold, precision: Any, device: torch.device, folder: Path | None
) -> Iterator[None]:
    """Give the model an adapter that has learnt the other rows of a fold; take it away again.

    The weights of the model are frozen meanwhile and the same to the bit afterwards.

    Args:
        module: SFTModule with its model built, not training.
        data: InstructionDataModule, set up.
        fold: Which rows are left out, and which are learnt.
        precision: Lightning's precision plugin.
        device: Where the model is.
        folder: Where the adapter is kept, so that a killed probe does not train it again; None keeps nothing.
    """
    model = module.model
    required = [(weight, weight.requires_grad) for weight in model.parameters()]
    hooked = bool(getattr(model, "_require_grads_hooks", ()))  # peft adds one more under gradient checkpointing
    model.disable_input_require_grads()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(key_of("fold", fold.number) % 2**63)
        wrapped = None
        try:
            wrapped = add_adapters(model, LoRA(r=RANK))
            weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
            if folder is None or not _load(folder / ADAPTER, weights):
                rank_zero_info(
                    f"{fold.title}: an adapter of rank {RANK} learns the {len(fold.others):,} other rows in"
                    f" {fold.steps:,} steps; then it reads {len(fold.positions):,} rows"
                )
                with torch.enable_grad():
                    _train(module, data, fold, list(weights.values()), precision, device)
                if folder is not None:
                    _save(folder / ADAPTER, weights)
            else:
                rank_zero_info(f"{fold.title}: its adapter is there from a killed probe")
            for weight in weights.values():
                weight.requires_grad_(False)  # autocast keeps copies of what requires a gradient
            model.eval()
            yield
        finally:
            if wrapped is not None:
                wrapped.unload()
            model.disable_input_require_grads()
            if hooked:
                model.enable_input_require_grads()
            for weight, was in required:
                weight.requires_grad_(was)


def _train(
    module: Any, data: Any, fold: Fold, weights: list[nn.Parameter], precision: Any, device: torch.device
) -> None:
    """Train an adapter on the other rows for one epoch, with NLL."""
    own = module.batch_loss
    loss = type(own)(module.model, own.seam, own.router_factor)  # no context or reference of the module's is touched
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    steps = steps_of(data, fold)
    module.model.train()
    with Pace(f"{fold.title}: learning the other rows", len(fold.others), tokens_of(data, fold.others)) as pace:
        for number, step in enumerate(steps):
            batches = [batch for _, batch in data.batches_of(SPLIT, step)]
            count = sum(_count(batch) for batch in batches)
            for batch in batches if count else ():
                moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
                with precision.forward_context():
                    total = loss(moved, NLL()).total
                (total / count).backward()
            norm = nn.utils.clip_grad_norm_(weights, CLIP)
            if not torch.isfinite(norm):
                raise UserError(
                    f"{fold.title}: the gradient of step {number + 1} is not finite (--model.dtype,"
                    " --trainer.precision)"
                )
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - number / len(steps))
            optimizer.step()
            optimizer.zero_grad()
            pace.update(len(step), tokens_of(data, step))


def _count(batch: Batch) -> float:
    learnt = batch["labels"][:, 1:] != IGNORE_INDEX
    return float(batch["token_weight"][:, 1:][learnt].sum() if "token_weight" in batch else learnt.sum())


def _load(file: Path, weights: dict[str, nn.Parameter]) -> bool:
    """Read an adapter into its weights; return whether it was there and fits."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        there = load_file(file)
    except (OSError, SafetensorError):
        return False
    if {name: weight.shape for name, weight in weights.items()} != {name: part.shape for name, part in there.items()}:
        return False
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(there[name])
    return True


def _save(file: Path, weights: dict[str, nn.Parameter]) -> None:
    from safetensors.torch import save_file

    with whole_file(file) as partial:
        save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, partial)
