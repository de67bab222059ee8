"""One cell of a study: a run through SFTModule, InstructionDataModule and Trainer, and what is kept of it."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning import seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from deft_lightning._version import __version__
from deft_lightning.annotations import JsonObject
from deft_lightning.callbacks import EntropyMonitor, FirstLastValidation, GateMonitor, NoiseEstimate, NoiseMonitor
from deft_lightning.data import InstructionDataModule, known_noise
from deft_lightning.data.noise import Noise
from deft_lightning.data.prepared.audit_file import Top
from deft_lightning.errors import UserError
from deft_lightning.evaluation import Generation
from deft_lightning.figures import read_run
from deft_lightning.objectives import NLL
from deft_lightning.study.files import complete_folder, digest, write_json
from deft_lightning.study.plan import Cell
from deft_lightning.study.regime import Base
from deft_lightning.study.tasks import Task, base_rows, rows_apart, rows_of
from deft_lightning.training.module import SFTModule
from deft_lightning.training.trainer import Trainer

TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'user' %}>{% else %}{{ eos_token }}{% endif %}{% endfor %}"
)
POINTS = 30  # of a curve
EVAL_BATCH = 200
CURVES = (
    "train/nll", "val/nll", "val/token_accuracy", "focus/mean", "prob/mean", "gate/mean", "gate/clean", "gate/noisy",
    "gate/locked", "gate/locked_clean", "collision/mean", "entropy/shannon", "noise/memorised",
    "noise/recovered", "noise/gradient_share", "noise/auroc_gate", "noise/estimated", "noise/estimated_tokens",
    "noise/true", "val_noisy/nll", "val_noisy/reproduced",
)  # fmt: skip


def base_folder(cell: Cell, root: Path) -> Path | None:
    """Return where the study keeps the model that it trains for a cell to start from, if it does.

    The accelerator, on which cells depend, has no part in it: a base is the same model wherever it was trained.
    """
    base = cell.setting.base
    if base is None:
        return None
    setting = cell.setting
    given = {name: value for name, value in vars(base).items() if value is not None}
    about = [
        __version__, given, cell.seed, cell.architecture, cell.base_rows, cell.held_out, cell.files,
        setting.tokenizer_size, setting.max_length, setting.max_new_tokens, setting.split_by, setting.judge,
        *filter(None, [setting.max_characters]),
    ]  # fmt: skip
    return root / "bases" / digest(about)


def start_from(cell: Cell, root: Path) -> str | None:
    """Return the model that a cell starts from, None for random weights."""
    base = base_folder(cell, root)
    return cell.setting.pretrained if base is None else str(base / "model")


def train_base(cell: Cell, root: Path) -> JsonObject:
    """Train the model that a cell starts from, unless it is there."""
    target, base, task = base_folder(cell, root), cell.setting.base, base_rows(cell, root)
    assert target is not None and isinstance(base, Base) and task is not None
    if not (target / "base.json").exists():
        _quiet()
        seed_everything(cell.seed, verbose=False)
        data = _data(
            cell, root, task.train, task.validation, base.batch_size, cell.seed, 1.0 if base.op else 0.0, None, base.op
        )
        module = _module(cell, NLL(), base.rate, None)
        trainer = _trainer(cell, base.steps, root, None, cell.setting.looks)
        trainer.fit(module, datamodule=data)
        with complete_folder(target) as folder:
            trainer.export(module, output=str(folder / "model"), datamodule=data)
            scores = _score(cell, root, trainer, module, data, task.test, None)
            write_json(folder / "base.json", {"source": base.source, "seed": cell.seed, **scores})
    return {"base": target.name}


def start_file(cell: Cell, root: Path) -> Path | None:
    """Return where the scores of a pretrained model are before it is trained; None for other starts.

    The accelerator, on which cells depend, has no part in it: it is the same model wherever it is scored.
    """
    setting = cell.setting
    if setting.pretrained is None:
        return None
    about = [
        __version__, setting.pretrained, setting.source, cell.held_out, cell.files, setting.max_length,
        setting.max_new_tokens, setting.split_by, setting.judge, setting.max_characters,
    ]  # fmt: skip
    return root / "starts" / f"{digest(about)}.json"


def score_start(cell: Cell, root: Path) -> JsonObject:
    """Score a pretrained model before it is trained, and write the result."""
    target = start_file(cell, root)
    assert target is not None
    module, data, trainer = start(cell, root)
    task = rows_of(cell, root)
    scores = _score(cell, root, trainer, module, data, task.test, cell.setting.pretrained)
    write_json(target, {"source": cell.setting.pretrained, **scores})
    return scores


def cell_file(cell: Cell, root: Path) -> Path:
    """Return where the result of a cell is, once it has run."""
    return root / "cells" / f"{cell.id}.json"


def run_cell(cell: Cell, root: Path) -> JsonObject:
    """Train and score one cell, and write its result."""
    _quiet()
    seed_everything(cell.seed, verbose=False)
    task = rows_of(cell, root)
    model = start_from(cell, root)
    data = _own_data(cell, root, task, model)
    module = _module(cell, cell.objective, cell.rate, model)
    folder = root / "runs" / cell.folder
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    trainer = _trainer(cell, cell.setting.steps, root, folder, cell.setting.looks)
    trainer.fit(module, datamodule=data)
    if trainer.global_step != cell.setting.steps:
        raise UserError(
            f"the run ended after {trainer.global_step} of {cell.setting.steps} steps; start the study again"
        )
    scores = _score(cell, root, trainer, module, data, getattr(task, cell.split), model)
    result: JsonObject = {
        "version": __version__, "id": cell.id, "objective": repr(cell.objective),
        "noise": cell.noise, "rate": cell.rate, "seed": cell.seed, "steps": cell.setting.steps,
        cell.split: scores | _forgetting(cell, root, module, model) | _left_out(cell, root),
    }  # fmt: skip
    for logger in trainer.loggers:
        logger.finalize("success")
    scalars = read_run(folder)
    result["curves"] = {tag: scalars[tag] for tag in CURVES if tag in scalars}
    write_json(cell_file(cell, root), result)
    return result


def start(cell: Cell, root: Path) -> tuple[SFTModule, InstructionDataModule, Trainer]:
    """Return model, data and trainer as they are before the first step of a cell."""
    _quiet()
    seed_everything(cell.seed, verbose=False)
    task = rows_of(cell, root)
    model = start_from(cell, root)
    data = _own_data(cell, root, task, model)
    return _module(cell, cell.objective, cell.rate, model), data, _trainer(cell, 1, root, None)


def audit_file(cell: Cell, root: Path) -> Path | None:
    """Return where the audit is by which a cell leaves out training rows; None where it trains on all of them."""
    if cell.setting.exclude_top is None:
        return None
    # Whatever is trained on the rows, and however many of them are left out, they are audited once.
    setting = replace(cell.setting, exclude_top=None)
    whole = replace(cell, setting=setting, objective=NLL(), rate=setting.rate, head="fused")
    return root / "audits" / whole.id / "audit.jsonl"


def _left_out(cell: Cell, root: Path) -> dict[str, float]:
    """Return the share of the training rows that a cell leaves out, and the share of noise among these."""
    audit, top = audit_file(cell, root), cell.setting.exclude_top
    if audit is None or top is None:
        return {}
    noisy = [json.loads(line)["noisy"] for line in audit.read_text(encoding="utf-8").splitlines()]
    count = Top.read(top).of(len(noisy), audit.name)
    hit = {"left_out/noisy": sum(noisy[:count]) / count} if None not in noisy else {}
    return {"left_out/share": count / len(noisy), **hit}


def _own_data(cell: Cell, root: Path, task: Task, model: str | None) -> InstructionDataModule:
    setting, audit = cell.setting, audit_file(cell, root)
    return _data(
        cell, root, task.train, task.validation, setting.batch_size, cell.seed, cell.noise, model,
        exclude=None if audit is None else str(audit),
    )  # fmt: skip


def _data(
    cell: Cell,
    root: Path,
    train: Path,
    validation: Path,
    batch_size: int,
    seed: int,
    noise: float,
    model: str | None,
    op: str | None = None,
    exclude: str | None = None,
) -> InstructionDataModule:
    return InstructionDataModule(
        str(train), format="prompt_completion", validation_source=str(validation), batch_size=batch_size,
        eval_batch_size=EVAL_BATCH if cell.setting.judge == "exact_match" else batch_size,
        max_length=cell.setting.max_length, tokenizer=model, tokenizer_size=cell.setting.tokenizer_size,
        chat_template=None if model else TEMPLATE, cache_dir=str(root / "cache"), seed=seed,
        noise=Noise(ops=[known_noise()[op or cell.setting.op](rate=noise)] if noise else [], seed=seed),  # type: ignore[call-arg]
        exclude=exclude, exclude_top=cell.setting.exclude_top if exclude else None,
    )  # fmt: skip


def _module(cell: Cell, objective: Any, rate: float, model: str | None) -> SFTModule:
    return SFTModule(
        objective, pretrained=model, architecture=None if model else cell.architecture,
        lora=cell.setting.lora if model else None, forgetting=bool(model and cell.setting.forgetting), head=cell.head,
        optimizer=partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=0.01),
        generation=Generation(max_new_tokens=cell.setting.max_new_tokens),
    )  # fmt: skip


def _trainer(cell: Cell, steps: int, root: Path, folder: Path | None, looks: int = 1) -> Trainer:
    logger = False if folder is None else TensorBoardLogger(folder.parent, name="", version=folder.name)
    monitors: list[Any] = [
        GateMonitor(histograms=False),
        EntropyMonitor(histograms=False),
        NoiseMonitor(),
        NoiseEstimate(),
    ]
    # Curves have the looks that were asked for, and nothing else.
    watches: list[Any] = [FirstLastValidation(before=False, after=False), *(monitors if folder else [])]
    return Trainer(
        accelerator=cell.setting.accelerator, devices=1, logger=logger, callbacks=watches, max_steps=steps,
        gradient_clip_val=1.0, log_every_n_steps=max(1, steps // POINTS), val_check_interval=max(1, steps // looks),
        check_val_every_n_epoch=None, num_sanity_val_steps=0, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(root), use_distributed_sampler=False, monitors=False,
    )  # fmt: skip


def _score(
    cell: Cell,
    root: Path,
    trainer: Trainer,
    module: SFTModule,
    data: InstructionDataModule,
    rows: Path,
    model: str | None,
) -> dict[str, float]:
    """Return exact match of greedy answers, or the plain NLL of the answers that are there."""
    if cell.setting.judge == "nll":
        clean = _data(cell, root, rows, rows, cell.setting.batch_size, cell.seed, 0.0, model)
        if model is None:
            clean.use_tokenizer(data.tokenizer)  # not one that is built from the rows it is judged on
        judge = _trainer(cell, 1, root, None)  # the run's own would log the result as one more step of its validation
        judge.validate(module, datamodule=clean, verbose=False)
        return {name: float(judge.callback_metrics[f"val/{name}"]) for name in ("nll", "token_accuracy")}
    data.test_source = str(rows)
    trainer.test(module, datamodule=data, verbose=False)
    return {name: float(trainer.callback_metrics[f"test/{name}"]) for name in ("exact_match", "truncated")}


def _forgetting(cell: Cell, root: Path, module: SFTModule, model: str | None) -> dict[str, float]:
    """Return how far predictions on rows of another kind are from those before training, in nats per token."""
    rows = rows_apart(cell, root)
    if rows is None or model is None:
        return {}
    data = _data(cell, root, rows, rows, cell.setting.batch_size, cell.seed, 0.0, model)
    judge = _trainer(cell, 1, root, None)
    judge.validate(module, datamodule=data, verbose=False)
    return {"forgetting/kl": float(judge.callback_metrics["forgetting/kl"])}


def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_utilities.core.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
