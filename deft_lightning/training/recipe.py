"""How a run is trained unless somebody says otherwise: one place for the command line and for Python."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.plugins import Precision
from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.annotations import Settings
from deft_lightning.callbacks import (
    Checkpoint,
    Dashboard,
    EntropyMonitor,
    FirstLastValidation,
    GateMonitor,
    GracefulStop,
    MetricCheck,
    ModelLine,
    NoiseEstimate,
    NoiseMonitor,
    RankWatch,
    RunRecord,
    RunSummary,
    SFTProgressBar,
)
from deft_lightning.training.logged_settings import LoggedSettings

TRAINER_DEFAULTS: Settings = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "default_root_dir": "logs",
}
MONITORS = (GateMonitor, EntropyMonitor, NoiseMonitor, NoiseEstimate, Dashboard)
WATCHES = (GracefulStop, RankWatch, MetricCheck, FirstLastValidation, LoggedSettings)
# Kinds of which a run has one at most: whoever brings another kind of it has chosen.
KINDS: dict[type[Callback], type[Callback]] = {
    Checkpoint: ModelCheckpoint, SFTProgressBar: ProgressBar, ModelLine: ModelSummary,
}  # fmt: skip


def with_defaults(options: Settings) -> Settings:
    """Return the options of a trainer with those of the recipe that were not given.

    Args:
        options: Arguments of the trainer; what is None there is taken as it is.
    """
    settings = {**TRAINER_DEFAULTS, **options}
    if settings["default_root_dir"] is None:
        settings["default_root_dir"] = TRAINER_DEFAULTS["default_root_dir"]
    if settings.get("precision") is None and (precision := device_precision(settings)) is not None:
        settings["precision"] = precision
        rank_zero_info(
            f"precision: {precision}, the default where a GPU has it: matrix products in bfloat16, weights "
            "and optimizer unchanged; --trainer.precision 32-true computes in float32"
        )
    if settings.get("barebones"):
        # Nothing but the loop is to be measured; what the recipe would add there Lightning refuses.
        given = _listed(settings.get("callbacks"))
        left_out = [one for one in given if isinstance(one, (*MONITORS, *KINDS))]
        settings["callbacks"] = [one for one in given if one not in left_out]
        if left_out:
            names = ", ".join(type(one).__name__ for one in left_out)
            rank_zero_info(f"--trainer.barebones: nothing is logged or saved; left out: {names}")
        if settings["log_every_n_steps"] == TRAINER_DEFAULTS["log_every_n_steps"]:
            settings["log_every_n_steps"] = None
    return settings


def device_precision(options: Settings) -> str | None:
    """Return ``bf16-mixed`` where the device of a run computes in bfloat16; None for Lightning's default, float32.

    A CPU is left at float32: most compute in bfloat16 no faster, and many slower.

    Args:
        options: Arguments of the trainer; a plugin for precision has decided already.
    """
    accelerator = options.get("accelerator") or "auto"
    on_cuda = isinstance(accelerator, CUDAAccelerator) or accelerator in ("auto", "gpu", "cuda")
    plugins = options.get("plugins") or ()
    chosen = any(isinstance(one, Precision) for one in (plugins if isinstance(plugins, list | tuple) else [plugins]))
    if chosen or not on_cuda or not torch.cuda.is_available():
        return None
    # Devices before compute capability 8.0 emulate it, slowly.
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else None


def with_callbacks(options: Settings, monitors: bool) -> list[Callback]:
    """Return the callbacks of a run: those that were given, and those of the recipe whose kind is not among them.

    Args:
        options: Arguments of the trainer.
        monitors: Whether those are wanted that watch tokens, and arrange what they log.
    """
    given = _listed(options.get("callbacks"))
    if options.get("barebones"):
        return given
    wanted: list[type[Callback]] = [*(MONITORS if monitors else ()), *WATCHES]
    if options.get("enable_progress_bar") is not False:
        wanted[:0] = [SFTProgressBar, RunSummary]
    else:
        wanted.append(RunRecord)  # which the summary is, too
    if options.get("enable_model_summary") is not False:
        wanted.append(ModelLine)
    if options.get("enable_checkpointing") is not False:
        wanted.insert(0, Checkpoint)
    missing = [kind for kind in wanted if not any(isinstance(one, KINDS.get(kind, kind)) for one in given)]
    return [*given, *(kind() for kind in missing)]


def _listed(callbacks: Callback | Iterable[Callback] | None) -> list[Callback]:
    if callbacks is None:
        return []
    return [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
