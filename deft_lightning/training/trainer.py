"""Trainer with the verbs ``export``, ``preview``, ``probe``; the paper's defaults belong to the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO

from deft_lightning.training import fsdp2, verbs  # noqa: F401 - the first makes --trainer.strategy fsdp2 known
from deft_lightning.training.checkpoint_io import AtomicCheckpointIO
from deft_lightning.training.logs import lasting
from deft_lightning.training.resume import CheckpointFinder, Restoring


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
        Restoring.install(self)
        self.finder = CheckpointFinder(self)
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
        return verbs.export(self, model, ckpt_path, output, merge, datamodule)

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
        return verbs.preview(self, model, datamodule, output, split, examples)

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
        return verbs.probe(self, model, datamodule, examples, output, audit, truth, ckpt_path)

    def read_checkpoint(self, ckpt_path: str) -> dict[str, Any]:
        """Read a checkpoint of this package, `last` included.

        Raises:
            UserError: It cannot be read; if `last` meant it, the message names the one before it too.
        """
        return self.finder.read(ckpt_path)

    def last_checkpoint(self, run: Path | None = None) -> Path:
        """Return the newest checkpoint of the newest run under ``default_root_dir``, and say which it is.

        That is the highest ``version_N`` and in it the highest step, whatever the dates of the files; checkpoints in
        folders of their own (``--checkpoint.dirpath``) are found too, and those this trainer has written itself win.

        Args:
            run: Folder of a run: then the newest of that run, or of a run that goes back to it.

        Raises:
            UserError: There is none, or the newest is damaged; nothing older is taken in its place.
        """
        return self.finder.last(run)
