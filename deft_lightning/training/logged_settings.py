"""Settings of a run in its loggers, and TensorBoard's HParams page, where runs are compared by what they led to."""

from __future__ import annotations

import os
from pathlib import PurePath
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.annotations import Record
from deft_lightning.callbacks.sinks import KINDS, sink_of
from deft_lightning.data.prepared.recipe import title
from deft_lightning.terminal import visible
from deft_lightning.training.resume.settings import plain

# Columns of figures in HParams: the newest value of these tags in a run, whoever logs them.
METRICS = ("val/nll", "val/token_accuracy", "noise/estimated", "test/exact_match")
OF_TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "max_steps", "max_epochs", "precision", "world_size")


class LoggedSettings(Callback):
    """Logs the settings of module, data and trainer to every logger, before anything else is logged.

    For TensorBoard it writes a session of the HParams page too: objective, learning rate, label noise and a few more,
    beside the last `val/nll`. Where a logger takes no histograms, figures or texts, a line says so.
    """

    def __init__(self) -> None:
        self._ends: list[tuple[Any, Any]] = []  # writers, and what ends their sessions

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin sessions, log the settings before anything else is logged, and say what is left out."""
        if stage != "fit" or getattr(trainer, "fast_dev_run", False):
            return
        _tell(trainer)
        self._ends = []
        # Before the settings are logged: a logger with Lightning's defaults begins a session of other columns then.
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                from torch.utils.tensorboard.summary import hparams

                columns = hparam_columns(trainer, pl_module)
                begin, values, end = hparams(columns, dict.fromkeys(METRICS, 0.0))
                writer = logger.experiment._get_file_writer()
                writer.add_summary(begin)
                writer.add_summary(values)
                self._ends.append((writer, end))
        # Lightning logs those of the module once more, after the first figures: too late for some loggers.
        values = {**dict(pl_module.hparams), **run_settings(trainer)}
        for logger in trainer.loggers:
            logger.log_hyperparams(values)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the sessions."""
        for writer, end in self._ends:
            writer.add_summary(end)
        self._ends = []


def run_settings(trainer: Any) -> dict[str, Any]:
    """Return what a fit is asked to train on, and how, in plain values: `data`, `trainer`, `seed_everything`."""
    settings = getattr(getattr(trainer, "datamodule", None), "settings", None)
    data: dict[str, Any] = {}
    for name, value in (vars(settings) if settings is not None else {}).items():
        if name == "noise":
            data[name] = noise_text(value)
        else:
            data[name] = title(value) if name in ("source", "validation_source", "test_source") else plain(value)
    own = {name: plain(getattr(trainer, name)) for name in OF_TRAINER}
    own["strategy"] = type(trainer.strategy).__name__
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {"data": data, "trainer": own, "seed_everything": seed if seed is None else int(seed)}


def noise_text(noise: Any) -> str:
    """Return the label noise of a run in a line: its operations, and what is not the default beside them."""
    return " + ".join(visible(repr(op)) for op in noise.ops) or "none"


def hparam_columns(trainer: Any, module: Any) -> dict[str, bool | int | float | str]:
    """Return the columns of a run in HParams, by which runs are told apart."""
    held: Record = dict(module.hparams)
    optimizer, lora = held.get("optimizer") or {}, held.get("lora") or {}
    settings = getattr(getattr(trainer, "datamodule", None), "settings", None)
    base = held.get("pretrained")
    model = PurePath(str(base)).name if base else str((held.get("architecture") or {}).get("model_type", "given"))
    columns = {
        "objective": held.get("objective"),
        "lr": getattr(module, "lr", None) or optimizer.get("lr"),
        "weight_decay": optimizer.get("weight_decay"),
        "optimizer": str(optimizer.get("class", "")).rpartition(".")[2],
        "model": model,
        "lora_r": lora.get("r", 0),
        "max_steps": trainer.max_steps,
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "precision": trainer.precision,
    }
    if settings is not None:
        micro = settings.batch_size * trainer.accumulate_grad_batches * trainer.world_size
        names = (PurePath(name).name for name in title(settings.source).split(", "))
        columns |= {"noise": noise_text(settings.noise), "batch": micro, "data": ", ".join(names)}
        columns |= {"exclude": settings.exclude} if settings.exclude else {}
    return {name: value for name, value in columns.items() if isinstance(value, bool | int | float | str)}


def _tell(trainer: Trainer) -> None:
    """Say which loggers will lack what the callbacks of this run would write."""
    wanted = set()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if getattr(callback, "histograms", False):
            wanted |= {"histograms", "figures"}
        wanted |= {"texts"} if getattr(callback, "examples", 0) else set()
    for logger in trainer.loggers:
        lacking = [kind for kind in KINDS if kind in wanted and kind not in sink_of(logger).kinds]
        if lacking:
            name = type(logger).__name__.removeprefix("Lasting")
            rank_zero_info(f"{name} takes no {' or '.join(lacking)}: they are left out of it (--trainer.logger)")
