"""Runs that are the same for one process and for two ranks; as a script, one rank of all of them.

``python ranks_worker.py FOLDER STRATEGY`` with LOCAL_RANK, WORLD_SIZE and MASTER_* set joins the other ranks, runs
every scenario and leaves ``rank<R>.pt`` with what it found in FOLDER.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from given_tokens import statistics_of
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from worlds import adam, bare_trainer, constant, random_example, weights

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.callbacks import (
    Checkpoint,
    Dashboard,
    EntropyMonitor,
    GateMonitor,
    GracefulStop,
    NoiseMonitor,
    PredictionWriter,
)
from deft_lightning.data.examples import Prepared
from deft_lightning.data.loading.collate import TrainCollator
from deft_lightning.data.loading.sampler import ShardedSampler
from deft_lightning.data.noise import Noise, TokenReplace
from deft_lightning.errors import UserError
from deft_lightning.evaluation import Generation
from deft_lightning.functional import TokenStats
from deft_lightning.models import LoRA
from deft_lightning.objectives import DEFT, NLL, Likelihood, Objective, Rescaled, Schedule, Tsallis

GLOBAL_BATCH = 8
quick_adam = partial(adam, lr=1e-2)
Found = dict[str, Any]


def prepared(seed: int, learnt: int) -> Prepared:
    """Random tokens of which the last ``learnt`` are supervised."""
    return random_example(seed, 6 + seed % 5 + learnt, learnt)


def uneven(count: int) -> list[Prepared]:
    """From 1 to 9 supervised tokens."""
    return [prepared(i, 1 + (3 * i * i) % 9) for i in range(count)]


def weighted(count: int) -> list[Prepared]:
    """From 1 to 9 supervised tokens, each with a weight of its own; the second half weighs far less."""
    found = []
    for i, one in enumerate(uneven(count)):
        drawn = np.random.default_rng(i).uniform(0.1, 4 if i < count // 2 else 0.2, len(one.labels))
        found.append(replace(one, weight=np.where(one.labels == -100, 0, drawn).astype(np.float32)))
    return found


def make_trainer(root: Path, world: int, *callbacks: Any, **options: Any) -> Trainer:
    strategy = sys.argv[2] if world > 1 else "auto"
    given = {name: value() if name == "strategy" else value for name, value in options.items()}
    return bare_trainer(root, *callbacks, **{"devices": world, "strategy": strategy, **given})


def make_module(root: Path, rate: float = 0.5, **options: Any) -> SFTModule:
    torch.manual_seed(0)
    folder = next(path for path in (root, *root.parents) if (path / "pretrained").is_dir())
    return SFTModule(
        **{
            "pretrained": str(folder / "pretrained"),
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=rate),
            "scheduler": constant,
            **options,
        }
    )


def train(
    root: Path, world: int, examples: list[Prepared], *, size: int = GLOBAL_BATCH, shuffle: bool = True,
    model: dict[str, Any] | None = None, callbacks: Sequence[Callback] = (), **options: Any,
) -> Found:  # fmt: skip
    """Weights after some steps, ``size`` examples a micro-batch over all ranks together."""
    rank = int(os.environ.get("LOCAL_RANK", 0)) if world > 1 else 0
    sampler = ShardedSampler(len(examples), rank=rank, world=world, seed=3, shuffle=shuffle, even=True)
    collate = TrainCollator(0, weighted=any(example.weight is not None for example in examples))
    loader = DataLoader(examples, size // world, sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]
    module = make_module(root, **(model or {}))
    trainer = make_trainer(root, world, *callbacks, **options)
    trainer.fit(module, loader)
    return {
        "weights": weights(module.model),
        "steps": trainer.global_step,
        "tokens": module.tokens_seen,
        "grad_norm": trainer.callback_metrics["train/grad_norm"].clone(),
        "nll": trainer.callback_metrics["train/nll"].clone(),
        "loss": trainer.callback_metrics["train/loss"].clone(),
        "metrics": {name: value.clone() for name, value in trainer.callback_metrics.items()},
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


def columns_left_out(root: Path, world: int) -> Found:
    """The gradient of the logits through some of its columns, which each rank chooses for its own tokens."""
    module = {"head_sparsity": 2.0**-7, "rate": 0.05, "pretrained": str(root / "peaked")}
    found = train(root, world, uneven(16), model=module, max_epochs=2)
    return {**found, "kept": found["metrics"]["head/kept_columns"], "dropped": found["metrics"]["head/dropped"]}


class Scales(Callback):
    """Keeps the factor on the loss of each micro-batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(pl_module.current_objective.scale)


def rescaled(root: Path, world: int, examples: list[Prepared] | None = None) -> Found:
    """Windows of eight examples and a last one of four; gates are far from 1."""
    model = {"objective": Rescaled(base=Tsallis(q=0.5), decay=0.5), "rate": 0.1}
    scales = Scales()
    options: dict[str, Any] = {"size": 4, "accumulate_grad_batches": 2, "max_epochs": 2, "shuffle": examples is None}
    found = train(root, world, examples or uneven(12), model=model, callbacks=[scales], **options)
    return {**found, "scales": scales.seen}


def scheduled(root: Path, world: int) -> Found:
    """NLL, NLL, half of each, Likelihood: one optimizer step each."""
    objective = Schedule(then=Likelihood(), switch=0.25, blend=0.5)
    options: dict[str, Any] = {"size": 4, "accumulate_grad_batches": 2, "max_epochs": 2}
    return train(root, world, uneven(12), model={"objective": objective}, **options)


def data(root: Path, world: int, **options: Any) -> InstructionDataModule:
    root = next(path for path in (root, *root.parents) if (path / "pretrained").is_dir())
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
    monitors = [
        GateMonitor(others=[NLL(), Likelihood(), Tsallis(0.5)]),
        EntropyMonitor(),
        NoiseMonitor(),
        Dashboard(),
        Checkpoint(),
    ]
    module = make_module(root)
    trainer = make_trainer(folder, world, *monitors, logger=None, max_epochs=2)
    trainer.fit(module, data(root, world))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"metrics": metrics, "log_dir": trainer.log_dir, "weights": weights(module.model)}


class Given(SFTModule):
    """Trains as ever; the tokens its monitors see are those of :func:`statistics_of`."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        counts = (batch["labels"][:, 1:] != -100).sum(1).tolist()
        rows = [statistics_of(id, count) for id, count in zip(batch["example_id"], counts, strict=True)]
        stats, noise, clean = (list(column) for column in zip(*rows, strict=True))
        assert all(part.topk_entropy is None for part in stats)
        fields = (None if part[0] is None else torch.cat(part) for part in zip(*stats, strict=True))
        given = {"stats": TokenStats(*fields), "noise_code": torch.cat(noise), "clean_labels": torch.cat(clean)}
        return {**super().training_step(batch, batch_idx), **given}


def given(root: Path, world: int) -> Found:
    """Two optimizer steps of two micro-batches, watched; the last micro-batch has fewer tokens on one rank."""
    torch.manual_seed(0)
    module = Given(pretrained=str(root / "pretrained"), optimizer=quick_adam, scheduler=constant)
    monitors = [GateMonitor(others=[NLL(), Tsallis(0.5)]), EntropyMonitor(), NoiseMonitor(), Dashboard()]
    options = {"accumulate_grad_batches": 2, "logger": None}
    trainer = make_trainer(root / f"given{world}", world, *monitors, **options)
    rank = int(os.environ.get("LOCAL_RANK", 0)) if world > 1 else 0
    examples = [prepared(i, 0 if i == 30 else 20 + 7 * (i % 6)) for i in range(32)]
    sampler = ShardedSampler(len(examples), rank=rank, world=world, seed=3, shuffle=False, even=True)
    loader = DataLoader(examples, 8 // world, sampler=sampler, collate_fn=TrainCollator(0))  # type: ignore[arg-type]
    trainer.fit(module, loader)
    steps = [[(e.id, int((e.labels[1:] != -100).sum())) for e in examples[i : i + 16]] for i in (0, 16)]
    return {"log_dir": trainer.log_dir, "seen": steps}


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


def benchmarked(root: Path, world: int) -> Found:
    """Three benchmarks with odd numbers of rows, sampled."""
    path = root / f"benchmarks-{world}.jsonl"
    module = make_module(root, generation=Generation(max_new_tokens=5, samples=3, temperature=1.0))
    rows = {name: str(root / f"{name}.jsonl") for name in ("figfont", "medical", "gsm8k")}
    loaded = data(root, world, benchmarks=rows)
    trainer = make_trainer(root, world, PredictionWriter(str(path)))
    trainer.predict(module, loaded, return_predictions=False)
    trainer.test(module, loaded, verbose=False)
    return {"path": str(path), "metrics": {name: float(v) for name, v in trainer.callback_metrics.items()}}


def packed(root: Path, world: int) -> Found:
    """Rows of several examples; which ones share a row does not depend on the ranks."""
    module = make_module(root)
    loaded = data(root, world, packing=True, max_length=64, batch_size=2 // world, noise=Noise())
    trainer = make_trainer(root, world, max_epochs=2)
    trainer.fit(module, loaded)
    return {"weights": weights(module.model), "steps": trainer.global_step, "tokens": module.tokens_seen,
            "grad_norm": trainer.callback_metrics["train/grad_norm"].clone(),
            "nll": trainer.callback_metrics["train/nll"].clone()}  # fmt: skip


def built(root: Path, world: int) -> Found:
    """On which devices this rank builds the model."""
    module, seen = make_module(root), []
    build = module._build

    def spy() -> Any:
        model = build()
        seen.append(sorted({p.device.type for p in model.parameters()}))
        return model

    module._build = spy  # type: ignore[method-assign]
    make_trainer(root, world, max_steps=1).fit(module, DataLoader(uneven(8), 4, collate_fn=TrainCollator(0)))  # type: ignore[arg-type]
    held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in module.model.parameters())
    return {"devices": seen, "share": held / sum(p.numel() for p in module.model.parameters())}


def run_to(root: Path, world: int, steps: int, resume: str | None = None, **options: Any) -> tuple[SFTModule, str]:
    """Train to a step under a schedule of noise, from the start or a checkpoint; return where the last one is."""
    module = make_module(root, **{"optimizer": adam, **options.pop("model", {})})
    kept = Checkpoint()
    trainer = make_trainer(root / "to" / f"{steps}-{world}", world, kept, max_steps=steps, max_epochs=-1, **options)
    noise = Noise(ops=[TokenReplace(rates=[0.3, 0.0])])
    trainer.fit(module, data(root, world, noise=noise), ckpt_path=resume, weights_only=True if resume else None)
    assert trainer.global_step == steps
    return module, kept.last_model_path


def resumed(
    root: Path, world: int, adapters: LoRA | None = None, objective: Objective | None = None, **options: Any
) -> Found:
    """Five steps at once and three and two, in the middle of an epoch, with dropout."""
    model: dict[str, Any] = {
        "objective": objective or DEFT(), "pretrained": None, "architecture": {**SHAPE, "attention_dropout": 0.4},
        "lora": adapters,
    }  # fmt: skip
    whole = weights(run_to(root / "whole", world, 5, model=model, **options)[0])
    still = {**model, "architecture": SHAPE, "lora": adapters and LoRA(r=2)}
    plain = weights(run_to(root / "plain", world, 5, model=still, **options)[0])
    _, cut = run_to(root / "cut", world, 3, model=model, **options)
    again = weights(run_to(root / "again", world, 5, cut, model=model, **options)[0])
    furthest = max(float((whole[name] - again[name]).abs().max()) for name in whole)
    dropped = max(float((whole[name] - plain[name]).abs().max()) for name in whole)
    return {"difference": furthest, "dropout": dropped, "checkpoint": cut}


def sharded(root: Path, world: int) -> Found:
    """As resumed, of checkpoints to which each rank writes its share; nothing where weights are not sharded."""
    if world == 1 or sys.argv[2] != "fsdp2":
        return {}
    from deft_lightning.training.fsdp2 import FSDP2Strategy

    # A strategy serves one trainer.
    found = resumed(root / "sharded", world, strategy=lambda: FSDP2Strategy(save_distributed_checkpoint=True))
    folder = Path(found["checkpoint"])
    exporter = make_trainer(root, world)
    if int(os.environ["LOCAL_RANK"]) == 0:
        exporter.export(ckpt_path=str(folder), output=str(root / "exported-shares"))
    return {**found, "files": sorted(path.name for path in folder.iterdir())}


def exchanged(root: Path, world: int) -> Found:
    """Two steps of one process, two more by whoever runs this."""
    first = root / "one.ckpt"
    if world == 1:
        _, path = run_to(root, 1, 2)
        first.write_bytes(Path(path).read_bytes())
    module, path = run_to(root, world, 4, str(first))
    return {"weights": weights(module.model), "checkpoint": path}


def exported(root: Path, world: int, **options: Any) -> Found:
    """From the running module, by all ranks."""
    module = make_module(root, lora=LoRA(r=2))
    trainer = make_trainer(root, world, **options)
    trainer.fit(module, DataLoader(uneven(8), 8 // world, collate_fn=TrainCollator(0)))  # type: ignore[arg-type]
    folder = trainer.export(module, output=str(root / f"exported-{world}"))
    named = {name: p.detach() for name, p in module.model.named_parameters()}
    return {"folder": str(folder), "weights": {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for name, p in named.items()
    }}  # fmt: skip


class Broken(SFTModule):
    """Its loss is not a number where example p9 is."""

    def configure_model(self) -> None:
        built = self.model is not None
        super().configure_model()
        if built:
            return
        terms = self.batch_loss

        def broken(batch: dict[str, Any], *others: Any) -> Any:
            output = terms(batch, *others)
            return output._replace(loss=output.loss * float("nan")) if "p9" in batch["example_id"] else output

        broken.context = terms.context  # type: ignore[attr-defined]
        self.batch_loss = broken


def skipped(root: Path, world: int) -> Found:
    torch.manual_seed(0)
    module = Broken(pretrained=str(root / "pretrained"), optimizer=quick_adam, scheduler=constant, on_nonfinite="skip")
    return {**fit_in_order(root, world, module), "skipped": module.skipped}


def raised(root: Path, world: int) -> Found:
    torch.manual_seed(0)
    module = Broken(pretrained=str(root / "pretrained"), optimizer=quick_adam, scheduler=constant)
    try:
        fit_in_order(root, world, module)
    except UserError as error:
        return {"error": str(error), "weights": weights(module.model)}
    return {}


def fit_in_order(root: Path, world: int, module: SFTModule, *callbacks: Any, **options: Any) -> Found:
    rank = int(os.environ.get("LOCAL_RANK", 0)) if world > 1 else 0
    examples = uneven(24)
    sampler = ShardedSampler(len(examples), rank=rank, world=world, seed=3, shuffle=False, even=True)
    loader = DataLoader(examples, 8 // world, sampler=sampler, collate_fn=TrainCollator(0))  # type: ignore[arg-type]
    trainer = make_trainer(root, world, *callbacks, **options)
    trainer.fit(module, loader)
    return {"weights": weights(module.model), "steps": trainer.global_step, "tokens": module.tokens_seen}


class Terminate(Callback):
    """Sends this process, the last rank, the signal of a scheduler during the second step."""

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if trainer.global_step == 1 and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped(root: Path, world: int) -> Found:
    """One rank is told to stop; all do, after the same step, with one checkpoint."""
    kept = Checkpoint(dirpath=str(root / f"stopped-{world}"))
    found = fit_in_order(root, world, make_module(root), kept, GracefulStop(), Terminate(), max_epochs=9)
    return {**found, "files": sorted(path.name for path in (root / f"stopped-{world}").iterdir())}


SHAPE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "initializer_range": 0.3,
}  # fmt: skip
SCENARIOS: dict[str, Callable[[Path, int], Found]] = {
    "uneven": lambda root, world: train(root, world, uneven(16), max_epochs=2),
    "dense": lambda root, world: train(root, world, uneven(16), model={"head": "dense"}),
    "columns left out": columns_left_out,
    "clipped": lambda root, world: train(root, world, uneven(16), gradient_clip_val=0.1),
    "accumulated": accumulated,
    "one rank masked": one_rank_masked,
    "nothing supervised": nothing_supervised,
    "lora": lambda root, world: train(root, world, uneven(16), model={"lora": LoRA(r=2)}, max_epochs=2),
    "rescaled": rescaled,
    "rescaled, one rank masked": lambda root, world: rescaled(
        root, world, [prepared(i, 0 if i % 2 else 1 + i % 4) for i in range(16)]
    ),
    "scheduled": scheduled,
    "weighted": lambda root, world: train(root, world, weighted(12), size=4, accumulate_grad_batches=2, max_epochs=2),
    "weighted, rescaled": lambda root, world: rescaled(root, world, weighted(12)),
    "packed": lambda root, world: packed(root, world),
    "bf16": lambda root, world: train(root, world, uneven(16), precision="bf16-mixed", max_epochs=2),
    "checkpointed": lambda root, world: train(
        root, world, uneven(16), model={"gradient_checkpointing": True, "compile": False}
    ),
    "built": built,
    "resumed": resumed,
    "resumed lora": lambda root, world: resumed(root / "lora", world, adapters=LoRA(r=2, dropout=0.1)),
    "resumed rescaled": lambda root, world: resumed(root / "rescaled", world, objective=Rescaled(base=Tsallis(q=0.5))),
    "sharded": sharded,
    "exchanged": exchanged,
    "exported": exported,
    "skipped": skipped,
    "raised": raised,
    "stopped": stopped,
    "watched": watched,
    "given": given,
    "validated": validated,
    "predicted": predicted,
    "benchmarked": benchmarked,
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
