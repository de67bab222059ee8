"""The training data through the eyes of the model, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deft_lightning._lightning import attach
from deft_lightning.annotations import JsonObject
from deft_lightning.atomic import check_output, check_output_file
from deft_lightning.errors import UserError
from deft_lightning.probe import probe_data, write
from deft_lightning.training.protocols import shards


def probe(
    trainer: Any,
    module: Any | None,
    datamodule: Any | None,
    examples: int | None,
    output: str | None,
    audit: str | None,
    truth: str | None,
    ckpt_path: str | None,
    unprompted: bool,
) -> JsonObject:
    """Write the report and return it; arguments as those of :meth:`deft_lightning.Trainer.probe`.

    Raises:
        UserError: Model or data is missing, there are many ranks, or a file cannot be written.
    """
    if module is None or datamodule is None:
        raise UserError("probe: needs a model and data")
    if examples is not None and examples < 1:
        raise UserError(f"probe: --examples must be at least 1, got {examples}")
    if trainer.world_size > 1 or shards(trainer.strategy):
        raise UserError("probe: runs on one device; set --trainer.devices 1 --trainer.strategy auto")
    folder, target = Path(output or Path(trainer.default_root_dir) / "probe"), Path(audit) if audit else None
    check_output(folder / "probe.json", "probe: --output")
    if target is not None:
        check_output_file(target, "probe: --audit")
    attach(trainer, module, datamodule)
    datamodule.prepare_data()
    datamodule.setup("fit")
    load(trainer, module, ckpt_path)
    report, suspects, sample = probe_data(
        module, datamodule, trainer.precision_plugin, trainer.strategy.root_device, examples=examples, truth=truth,
        unprompted=unprompted, output=folder,
    )  # fmt: skip
    report["checkpoint"] = ckpt_path
    write(report, suspects, sample, datamodule, folder, target)
    return report


def load(trainer: Any, module: Any, ckpt_path: str | None) -> None:
    """Build a module's model on this process's device, with the weights of a checkpoint if one is given."""
    with trainer.precision_plugin.module_init_context():
        module.configure_model()
    if ckpt_path is not None:
        checkpoint = trainer.read_checkpoint(ckpt_path)
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
    trainer.precision_plugin.convert_module(module).to(trainer.strategy.root_device)
