"""Trainer with the verbs ``export``, ``preview``, ``probe``; the paper's defaults belong to the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.data.prepared.build import title
from deft_lightning.data.preview import page
from deft_lightning.errors import UserError
from deft_lightning.models import (
    describe,
    gathered,
    is_sharded,
    load_checkpoint,
    model_from_checkpoint,
    save_hugging_face,
)
from deft_lightning.models.contents import KEY
from deft_lightning.outputs import check_output, check_output_file
from deft_lightning.probe import probe_data, write
from deft_lightning.training.logs import lasting
from deft_lightning.training.resume import Restoring, last_checkpoint
from deft_lightning.training.strategy import AtomicCheckpointIO


class Trainer(LightningTrainer):
    """Lightning's Trainer; runs go to ``<default_root_dir>/version_N`` and can be exported.

    Without ``max_epochs`` it stops after ``max_steps`` or ``max_time``, or after one epoch if neither is given.

    Args:
        args: As Lightning's.
        kwargs: As Lightning's. No ``logger``, or True, is TensorBoard.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("logger") in (None, True):
            kwargs["logger"] = TensorBoardLogger(kwargs.get("default_root_dir") or ".", name="")
        if kwargs.get("max_epochs") is None and not args:
            limited = kwargs.get("max_steps") not in (None, -1) or kwargs.get("max_time") is not None
            kwargs["max_epochs"] = -1 if limited else 1
        plugins = kwargs.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        super().__init__(*args, **kwargs)
        self._checkpoint_connector = Restoring(self)
        self._older: tuple[str, Path] | None = None  # a checkpoint that `last` has meant, and the one before it
        for logger in self.loggers:
            lasting(logger)

    def export(
        self,
        model: LightningModule | None = None,
        ckpt_path: str | None = None,
        output: str | None = None,
        merge: bool = True,
        datamodule: LightningDataModule | None = None,
    ) -> Path:
        """Write a Hugging Face folder from a checkpoint, or from the model as it is.

        Args:
            model: A module whose model is exported when no checkpoint is given.
            ckpt_path: Checkpoint file, or `last` for the newest of the newest run under `trainer.default_root_dir`. It
                holds all that is needed: neither data nor configuration is read.
            output: Folder to create.
            merge: Merge LoRA adapters into the weights; otherwise only the adapters are written.
            datamodule: Gives the tokenizer when no checkpoint is given.

        Returns:
            The folder.
        """
        if output is None:
            raise UserError("export: set --output DIR")
        if self.is_global_zero and ckpt_path is not None:
            check_output(output, "export: --output")
        if ckpt_path is not None:
            network, tokenizer, stops = model_from_checkpoint(self.read_checkpoint(ckpt_path))
        elif getattr(model, "model", None) is not None:
            network = self._whole(model)
            tokenizer, stops = (datamodule.tokenizer, datamodule.stop_token_ids) if datamodule else (None, [])  # type: ignore[attr-defined]
        else:
            raise UserError("export: set --ckpt_path FILE, or last")
        folder = Path(output)
        if self.is_global_zero:
            folder = save_hugging_face(network, tokenizer, stops, output, merge=merge)
            rank_zero_info(f"exported: {folder}")
        return folder

    def _whole(self, module: Any) -> Any:
        """Return a module's model with whole weights; of one that is sharded, a copy in the memory of rank 0."""
        if not is_sharded(module.model):
            return module.model
        state = gathered(module.model)
        if not self.is_global_zero:
            return None
        about = describe(module.model, None, module.lora, [])
        named = {f"model.{name}": value for name, value in state.items()}
        return model_from_checkpoint({KEY: about, "state_dict": named})[0]

    def preview(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        output: str = "preview.html",
        split: str = "train",
        examples: int = 20,
    ) -> Path:
        """Show the data as the model will see it, before anything is trained: printed, and as a page to open.

        Args:
            model: Names the tokenizer, if the data does not; its weights are not loaded.
            datamodule: The data.
            output: Page to write.
            split: `train`, `validation`, or `validation_noisy`.
            examples: How many examples, spread over the split; two of them are printed.

        Returns:
            The page.
        """
        if datamodule is None or examples < 1:
            raise UserError("preview: needs data and at least one example (--examples)")
        check_output_file(output, "preview: --output")
        self.strategy._lightning_module = model
        datamodule.trainer = self
        datamodule.prepare_data()
        datamodule.setup("fit")
        found = datamodule.samples(split, examples)  # type: ignore[attr-defined]
        if not found:
            raise UserError(f"preview: there are no {split} examples (--split, --data.validation_fraction)")
        reports = [str(report) for report in datamodule.reports.values()]  # type: ignore[attr-defined]
        named = f"{title(datamodule.source)}: {split}"  # type: ignore[attr-defined]
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(named, found, reports), encoding="utf-8")
        rank_zero_info(f"preview: {path.resolve()}")
        return path

    def probe(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        examples: int | None = None,
        output: str | None = None,
        audit: str | None = None,
        truth: str | None = None,
        ckpt_path: str | None = None,
    ) -> dict[str, Any]:
        """Look at the training data through the model as it is, in one pass without gradients.

        Prints what the model believes, what each objective would do to the tokens, and the most suspicious examples;
        writes `probe.json`, `probe.png`, `probe.svg`, and `tokens.npz`, a sample of tokens for the verb `figures`.

        Args:
            model: The module, pretrained, from an architecture, or with the weights of `ckpt_path`.
            datamodule: The data.
            examples: How many, spread over the training split; default: all.
            output: Folder for the report; default: `probe` under `trainer.default_root_dir`.
            audit: File for every example as a line of JSON, ranked by confident conflict.
            truth: Column of the rows that is true where a row is wrong; the audit is scored against it.
            ckpt_path: Checkpoint, or `last` for the newest of the newest run under `trainer.default_root_dir`.

        Returns:
            The report, as in `probe.json`.
        """
        if model is None or datamodule is None:
            raise UserError("probe: needs a model and data")
        if examples is not None and examples < 1:
            raise UserError(f"probe: --examples must be at least 1, got {examples}")
        if self.world_size > 1 or getattr(self.strategy, "shards_weights", False):
            raise UserError("probe: runs on one device; set --trainer.devices 1 --trainer.strategy auto")
        folder, target = Path(output or Path(self.default_root_dir) / "probe"), Path(audit) if audit else None
        check_output(folder / "probe.json", "probe: --output")
        if target is not None:
            check_output_file(target, "probe: --audit")
        self._data_connector.attach_data(model, datamodule=datamodule)
        self.strategy._lightning_module = model
        datamodule.prepare_data()
        datamodule.setup("fit")
        self._load(model, ckpt_path)
        report, found, sample = probe_data(
            model, datamodule, self.precision_plugin, self.strategy.root_device, examples=examples, truth=truth
        )
        report["checkpoint"] = ckpt_path
        write(report, found, sample, datamodule, folder, target)
        return report

    def _load(self, module: Any, ckpt_path: str | None) -> None:
        """Build a module's model on this process's device, with the weights of a checkpoint if one is given."""
        with self.precision_plugin.module_init_context():
            module.configure_model()
        if ckpt_path is not None:
            checkpoint = self.read_checkpoint(ckpt_path)
            module.on_load_checkpoint(checkpoint)
            module.load_state_dict(checkpoint["state_dict"])
        self.precision_plugin.convert_module(module).to(self.strategy.root_device)

    def read_checkpoint(self, ckpt_path: str) -> dict[str, Any]:
        """Read a checkpoint of this package, `last` included.

        Raises:
            UserError: It cannot be read; if `last` meant it, the message names the one before it too.
        """
        path = str(self.last_checkpoint()) if ckpt_path == "last" else ckpt_path
        try:
            return load_checkpoint(path)
        except UserError as error:
            raise self.naming_older(path, error) from None

    def naming_older(self, path: Any, error: UserError) -> UserError:
        """Return an error of reading a checkpoint; if `last` meant that one, with the one before it."""
        if self._older is None or self._older[0] != str(path):
            return error
        return UserError(f"{error}; the newest before it: --ckpt_path {self._older[1]}")

    def last_checkpoint(self, run: Path | None = None) -> Path:
        """Return the newest checkpoint of the newest run under ``default_root_dir``, and say which it is.

        That is the highest ``version_N`` and in it the highest step, whatever the dates of the files; checkpoints in
        folders of their own (``--checkpoint.dirpath``) are found too, and those this trainer has written itself win.

        Args:
            run: Folder of a run: then the newest of that run, or of a run that goes back to it.

        Raises:
            UserError: There is none, or the newest is damaged; nothing older is taken in its place.
        """
        savers = [saver for saver in self.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
        own = [
            Path(saver.last_model_path or saver.best_model_path).resolve() for saver in savers if saver.best_model_path
        ]
        if run is None and own and own[0].exists():
            return own[0]
        folders = [self.default_root_dir, *(saver.dirpath for saver in savers if saver.dirpath)]
        roots = dict.fromkeys(Path(folder) for folder in folders if "://" not in str(folder))
        if run is not None:
            roots[run] = None
        found = last_checkpoint(roots, run)
        if found is None:
            where = (
                f"of {run} (--config)"
                if run is not None
                else f"under {self.default_root_dir} (--trainer.default_root_dir)"
            )
            raise UserError(f"--ckpt_path last: no checkpoint {where}")
        self._older = None if found.older is None else (str(found.path), found.older)
        rank_zero_info(f"--ckpt_path last: {'; '.join([str(found.path), *found.said])}")
        return found.path
