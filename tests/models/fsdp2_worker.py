"""What two ranks of FSDP2 compute, each on its half of the batch; as a script, one rank of all scenarios.

``python fsdp2_worker.py FOLDER`` with RANK, WORLD_SIZE and MASTER_* set joins the other rank, runs every scenario and
leaves ``rank<R>.pt`` with what it found in FOLDER.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import LLAMA, VOCAB, architecture, build, move_adapters
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader
from worlds import whole_tensor

from deft_lightning import SFTModule, Trainer
from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.models import (
    HeadSeam,
    base_causal_lm,
    check_causal,
    check_head,
    find_head,
    fused_forward,
    router_loss_factor,
)
from deft_lightning.models.load import recompute_activations
from deft_lightning.objectives import DEFT
from deft_lightning.optim import MuonAdamW

Found = dict[str, Any]
WORLD = 2


@dataclass(frozen=True)
class Case:
    """A model, and how it is sharded.

    Attributes:
        options: Its architecture.
        lora: Whether peft adapts its attention and its head.
        bf16: Whether FSDP gathers bfloat16 weights.
        reshard: Whether the root, which holds the head, is sharded again between forward and backward.
        checkpointing: Whether the layers recompute their activations.
        masked: The rank whose rows are not supervised at all.
        pieces: Micro-batches before the gradients are read.
        adjust: What is done to the model beside that.
    """

    options: dict[str, Any]
    lora: bool = False
    bf16: bool = False
    reshard: bool | None = None
    checkpointing: bool = False
    masked: int | None = None
    pieces: int = 1
    adjust: Callable[[Any], None] = field(default=lambda model: None)


def two_layers(kind: str, **more: Any) -> dict[str, Any]:
    return architecture(kind, num_hidden_layers=2, **more)


TIED = {**LLAMA, "num_hidden_layers": 2, "tie_word_embeddings": True}
UNTIED = {**LLAMA, "num_hidden_layers": 2, "tie_word_embeddings": False}
# A soft-capping that bends logits of the size random weights give.
CAPPED = two_layers("gemma2", final_logit_softcapping=3.0)
MIXTURE = two_layers("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)

CASES: dict[str, Case] = {
    "llama": Case(UNTIED),
    "llama tied": Case(TIED),
    "gemma2": Case(CAPPED),
    "head bias": Case(two_layers("phi")),
    "lora head": Case(UNTIED, lora=True),
    "lora head tied": Case(TIED, lora=True),
    "mixture": Case(MIXTURE),
    "root resharded": Case(UNTIED, reshard=True),
    "lora head, root resharded": Case(UNTIED, lora=True, reshard=True),
    "checkpointing": Case(TIED, checkpointing=True),
    "rank 1 masked": Case(UNTIED, masked=1),
    "rank 0 masked, lora head": Case(UNTIED, lora=True, masked=0),
    "two micro-batches": Case(TIED, pieces=2),
    "two micro-batches, lora head": Case(UNTIED, lora=True, pieces=2),
    "llama bf16": Case(UNTIED, bf16=True),
    "llama tied bf16": Case(TIED, bf16=True),
    "gemma2 bf16": Case(CAPPED, bf16=True),
    "lora head bf16": Case(UNTIED, lora=True, bf16=True),
}


GIVEN = ("llama", "llama tied", "lora head")  # those that a module is given as an object


def make(case: Case) -> Any:
    """The model of a case, the same on every rank."""
    model = build(case.options)
    if case.checkpointing:
        recompute_activations(model)
    if case.lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        model = move_adapters(get_peft_model(model, config))
    return model


def shard(model: Any, case: Case) -> None:
    """Each decoder layer, then the root: what everybody does."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if case.bf16 else MixedPrecisionPolicy()
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (WORLD,)), "mp_policy": policy}
    for layer in base_causal_lm(model).model.layers:
        fully_shard(layer, **options)
    fully_shard(model, reshard_after_forward=case.reshard, **options)


def rows(piece: int, case: Case) -> tuple[Tensor, Tensor]:
    """Tokens and targets of a micro-batch of both ranks: the first two rows are rank 0's, the others rank 1's."""
    generator = torch.Generator().manual_seed(11 + piece)
    ids = torch.randint(3, VOCAB, (2 * WORLD, 20), generator=generator)
    targets = torch.randint(3, VOCAB, (2 * WORLD, 20), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = -100
    if case.masked is not None:
        targets[2 * case.masked : 2 * case.masked + 2] = -100
    return ids, targets


def half(piece: int, case: Case, rank: int) -> tuple[Tensor, Tensor]:
    ids, targets = rows(piece, case)
    return ids[2 * rank : 2 * rank + 2], targets[2 * rank : 2 * rank + 2]


def run(model: Any, seam: HeadSeam, ids: Tensor, targets: Tensor) -> tuple[Tensor, TokenStats]:
    """Loss of a half batch; of a mixture of experts with its router's, as the training step adds it."""
    found = fused_forward(model, seam, {"input_ids": ids, "use_cache": False}, targets, DEFT())
    factor = router_loss_factor(model)
    if factor is None:
        return found.loss, found.stats
    assert found.aux_loss is not None
    return found.loss + factor * len(found.stats.log_prob) * found.aux_loss, found.stats


def step(case: Case, rank: int) -> Found:
    """Loss of this rank's half and the gradients of both, of every micro-batch together."""
    model = make(case)
    seam = find_head(model)
    shard(model, case)
    losses, kept = [], []
    for piece in range(case.pieces):
        loss, stats = run(model, seam, *half(piece, case, rank))
        loss.backward()
        losses.append(loss.detach())
        kept.append(stats.log_prob)
    return {
        "loss": torch.stack(losses).sum(),
        "log_prob": torch.cat(kept),
        # FSDP has averaged over the ranks what the single process sums.
        "gradients": {n: whole_tensor(p.grad) * WORLD for n, p in model.named_parameters() if p.grad is not None},
    }


def sharded_outside(case: Case, rank: int) -> Found:
    """What there is of the head outside its forward, after a step that used it."""
    model = make(case)
    seam = find_head(model)
    shard(model, case)
    kinds, errors = [], []
    for _ in range(2):
        kinds.append(type(seam.projection.weight).__name__)
        local = tuple(seam.projection.weight.to_local().shape)
        try:
            seam.weights()
        except UserError as error:
            errors.append(str(error))
        loss, _ = run(model, seam, *half(0, case, rank))
        loss.backward()
    return {"kinds": kinds, "local": local, "errors": errors, "forwards": left_behind(model)}


def left_behind(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def found_late(case: Case, rank: int) -> Found:
    """The head is looked for once the model is sharded already."""
    model = make(case)
    shard(model, case)
    loss, _ = run(model, find_head(model), *half(0, case, rank))
    loss.backward()
    return {
        "loss": loss.detach(),
        "gradients": {n: whole_tensor(p.grad) * WORLD for n, p in model.named_parameters() if p.grad is not None},
    }


def checked(case: Case, rank: int) -> Found:
    """The checks of a first batch on both ranks, in every mode they run in; then a step."""
    model = make(case)
    seam = find_head(model)
    shard(model, case)
    ids, targets = half(0, case, rank)
    check_causal(model, ids)
    check_head(model, seam, ids, DEFT())
    with torch.no_grad():
        check_head(model, seam, ids, DEFT())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    loss, _ = run(model, seam, ids, targets)
    loss.backward()
    return {"loss": loss.detach()}


def refused(case: Case, rank: int) -> Found:
    """A head that scales its logits by what nobody knows of; then the very same model as it is, on the dense path."""
    model = make(case)
    seam = find_head(model)
    causal = base_causal_lm(model)
    own = causal.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.logits = output.logits * 1.02
        return output

    causal.forward = scaled
    shard(model, case)
    ids, _ = half(0, case, rank)
    error = ""
    try:
        check_head(model, seam, ids, DEFT())
    except UserError as raised:
        error = str(raised)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    return {"error": error, "logits": logits, "restored": causal.forward is scaled}


def head_alone(case: Case, rank: int) -> Found:
    """A head that is a unit of its own is sharded again before the check reads it: better said than trained."""
    model = make(case)
    seam = find_head(model)
    fully_shard(base_causal_lm(model).lm_head, mesh=init_device_mesh("cpu", (WORLD,)))
    shard(model, case)
    try:
        check_head(model, seam, half(0, case, rank)[0], DEFT())
    except UserError as error:
        return {"error": str(error)}
    return {"error": ""}


def evaluated(case: Case, rank: int) -> Found:
    """Evaluation without a graph before and after a step, and real logits in between."""
    model = make(case)
    seam = find_head(model)
    shard(model, case)
    ids, targets = half(0, case, rank)
    found = []
    for _ in range(2):
        with torch.no_grad():
            loss, stats = run(model, seam, ids, targets)
        assert not loss.requires_grad
        found.append(loss)
        trained, _ = run(model, seam, ids, targets)
        trained.backward()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    return {"losses": found, "log_prob": stats.log_prob, "logits": logits}


def two_steps(module: SFTModule, rank: int | None) -> dict[str, Tensor]:
    """Weights after two steps of a run by Lightning: under fsdp2 with this rank's rows, or of None with all."""
    batches = []
    for piece in range(2):
        ids, targets = rows(piece, CASES["llama"]) if rank is None else half(piece, CASES["llama"], rank)
        labels = nn.functional.pad(targets[:, :-1], (1, 0), value=-100)
        batches.append({"input_ids": ids, "labels": labels})
    trainer = Trainer(
        accelerator="cpu", devices=1 if rank is None else WORLD, strategy="auto" if rank is None else "fsdp2",
        max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        monitors=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return {n: whole_tensor(p.detach()).clone() for n, p in module.model.named_parameters() if p.requires_grad}


def half_rate(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def given_object(case: Case, rank: int | None) -> Found:
    """A model object, trained by Lightning; or the line that refuses it."""
    try:
        return {
            "weights": two_steps(SFTModule(DEFT(), pretrained=make(case), optimizer=half_rate, scheduler=None), rank)
        }
    except UserError as error:
        return {"error": str(error)}


def with_muon(case: Case, rank: int) -> Found:
    """An optimizer that needs whole matrices."""
    module = SFTModule(DEFT(), architecture=case.options, optimizer=lambda groups: MuonAdamW(groups, lr=1e-2))
    try:
        two_steps(module, rank)
    except UserError as error:
        return {"error": str(error)}
    return {"error": ""}


Scenario = Callable[[int], Found]
SCENARIOS: dict[str, Scenario] = {
    **{name: (lambda rank, case=case: step(case, rank)) for name, case in CASES.items()},
    "sharded outside": lambda rank: sharded_outside(CASES["root resharded"], rank),
    "sharded outside, lora": lambda rank: sharded_outside(CASES["lora head, root resharded"], rank),
    "found late": lambda rank: found_late(CASES["llama tied"], rank),
    "found late, lora": lambda rank: found_late(CASES["lora head"], rank),
    **{
        f"checked {name}": (lambda rank, case=CASES[name]: checked(case, rank))
        for name in ("llama", "llama tied", "gemma2", "lora head", "llama bf16", "lora head bf16", "root resharded")
    },
    "refused": lambda rank: refused(CASES["llama"], rank),
    "refused, lora": lambda rank: refused(CASES["lora head"], rank),
    "head alone": lambda rank: head_alone(CASES["llama"], rank),
    "evaluated": lambda rank: evaluated(CASES["llama tied"], rank),
    "evaluated, lora": lambda rank: evaluated(CASES["lora head, root resharded"], rank),
    **{f"given {name}": (lambda rank, case=CASES[name]: given_object(case, rank)) for name in GIVEN},
    "muon": lambda rank: with_muon(CASES["llama"], rank),
}


def main() -> None:
    """Run every scenario as one rank."""
    root, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Found] = {}
    for name, scenario in SCENARIOS.items():
        print(f"scenario: {name}", flush=True)
        try:
            found[name] = scenario(rank)
        except Exception:  # the same on both ranks; the test of this scenario shows it
            found[name] = {"failed": traceback.format_exc()}
            print(found[name]["failed"], flush=True)
    torch.save(found, root / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
