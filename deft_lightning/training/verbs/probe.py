"""The training data through the eyes of the model, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deft_lightning._lightning import attach
from deft_lightning.annotations import JsonObject
from deft_lightning.atomic import check_output, check_output_file
from deft_lightning.errors import UserError
from deft_lightning.figures.tokens import TokenSample
from deft_lightning.probe import probe_data, write
from deft_lightning.probe.audit import Suspect
from deft_lightning.probe.kept import FOLDER
from deft_lightning.probe.page import Look, TokenSpool, write_page
from deft_lightning.probe.run import numbered
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
    page: str | None,
    compare: str | None,
    folds: int | None,
) -> JsonObject:
    """Write the report and return it; arguments as those of :meth:`deft_lightning.Trainer.probe`.

    Raises:
        UserError: Model or data is missing, there are many ranks, or a file cannot be written.
    """
    if module is None or datamodule is None:
        raise UserError("probe: needs a model and data")
    if examples is not None and examples < 1:
        raise UserError(f"probe: --examples must be at least 1, got {examples}")
    if folds is not None and folds < 2:
        raise UserError(f"probe: --folds must be at least 2, got {folds}: an adapter learns the rows of other folds")
    if trainer.world_size > 1 or shards(trainer.strategy):
        raise UserError("probe: runs on one device; set --trainer.devices 1 --trainer.strategy auto")
    if compare is not None and page is None:
        raise UserError("probe: --compare shows two models on a page; set --page FILE")
    folder, target = Path(output or Path(trainer.default_root_dir) / "probe"), Path(audit) if audit else None
    check_output(folder / "probe.json", "probe: --output")
    if target is not None:
        check_output_file(target, "probe: --audit")
    if page is not None:
        check_output_file(page, "probe: --page")
    if compare is not None:
        compare = str(trainer.last_checkpoint()) if compare == "last" else compare
        try:
            trainer.read_checkpoint(compare)  # what cannot be read is refused before the first pass
        except UserError as error:
            raise UserError(f"probe: --compare: {str(error).removesuffix(' (--ckpt_path)')}") from None
    attach(trainer, module, datamodule)
    datamodule.prepare_data()
    datamodule.setup("fit")

    def look(checkpoint: str | None, kept: Path) -> tuple[JsonObject, list[Suspect], TokenSample, TokenSpool | None]:
        load(trainer, module, checkpoint)
        spool = None if page is None else TokenSpool(Path(page).absolute().parent, module)
        report, suspects, sample = probe_data(
            module, datamodule, trainer.precision_plugin, trainer.strategy.root_device, examples=examples, truth=truth,
            unprompted=unprompted, output=kept, watchers=[] if spool is None else [spool], folds=folds,
        )  # fmt: skip
        report["checkpoint"] = checkpoint
        return report, suspects, sample, spool

    report, suspects, sample, spool = look(ckpt_path, folder)
    if page is not None and spool is not None:
        looks = [Look(report, suspects, spool)]
        if compare is not None:
            other, ranked, _, compared = look(compare, folder / FOLDER / "compared")
            assert compared is not None
            looks.append(Look(other, ranked, compared))
        write_page(Path(page), datamodule, looks, numbered([type(op).__name__ for op in datamodule.noise.ops]))
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
