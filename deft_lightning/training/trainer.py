"""Trainer that trains as the command line does, with the verbs ``export``, ``preview`` and ``probe``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.loggers import TensorBoardLogger

from deft_lightning.annotations import Checkpoint, JsonObject
from deft_lightning.callbacks import FirstLastValidation
from deft_lightning.models.merge import Merge
from deft_lightning.training import fsdp2, verbs  # noqa: F401 - the first makes --trainer.strategy fsdp2 known
from deft_lightning.training.checkpoint_io import checkpoint_plugins
from deft_lightning.training.logs import lasting
from deft_lightning.training.quiet import hush
from deft_lightning.training.recipe import with_callbacks, with_defaults
from deft_lightning.training.resume import CheckpointFinder, Restoring
from deft_lightning.training.run_folder import RunFolder

MONITORS = "monitors"  # an option for Python alone: on the command line each monitor has a key of its own


class Trainer(LightningTrainer):
    """Lightning's Trainer with the recipe of `fit`; runs go to ``<default_root_dir>/version_N`` and can be exported.

    What is not given is as on the command line: gradients are clipped at 1.0, metrics logged every 10 steps to
    TensorBoard under ``logs``, the newest state is saved, tokens are watched (GateMonitor, EntropyMonitor,
    NoiseMonitor, NoiseEstimate, Dashboard), there is a validation before the first step and after the last, SIGINT and
    SIGTERM end a run with its state saved. On a GPU that computes in bfloat16 the precision is ``bf16-mixed``. A
    callback that is given takes the place of that of its kind; ``enable_checkpointing=False``,
    ``enable_progress_bar=False`` (lines and summary too), ``enable_model_summary=False`` and ``monitors=False`` leave
    theirs out. Without ``max_epochs`` it stops after ``max_steps`` or ``max_time``, or after one epoch if neither is
    given.

    Args:
        args: As Lightning's.
        kwargs: As Lightning's. No ``logger``, or True, is TensorBoard.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        monitors = bool(kwargs.pop(MONITORS, True))
        kwargs.update(with_defaults(kwargs))
        kwargs["callbacks"] = with_callbacks(kwargs, monitors)
        # The model's line is among the callbacks; Lightning would say of it that there is one.
        kwargs["enable_model_summary"] = None if kwargs.get("barebones") else False
        hush()
        asynchronous = any(getattr(one, "asynchronous", False) for one in kwargs["callbacks"])
        kwargs["plugins"] = checkpoint_plugins(kwargs.get("plugins"), asynchronous)
        if kwargs.get("logger") in (None, True) and not kwargs.get("barebones"):
            kwargs["logger"] = TensorBoardLogger(kwargs["default_root_dir"], name="", default_hp_metric=False)
        if kwargs.get("max_epochs") is None and not args:
            limited = kwargs.get("max_steps") not in (None, -1) or kwargs.get("max_time") is not None
            kwargs["max_epochs"] = -1 if limited else 1
        if kwargs.get("num_sanity_val_steps") is None and not kwargs.get("barebones"):
            first = any(isinstance(one, FirstLastValidation) and one.before for one in kwargs["callbacks"])
            # The validation before the first step, which finds what a check would; else one batch, Lightning takes two.
            kwargs["num_sanity_val_steps"] = -1 if first else 1
        super().__init__(*args, **kwargs)
        Restoring.install(self)
        self.finder, self.run_folder = CheckpointFinder(self), RunFolder(self)
        for logger in self.loggers:
            lasting(logger)

    @property
    def num_sanity_val_steps(self) -> int | float:
        """Return how many batches are validated before training: none in a run that is resumed.

        Lightning would check once more, and log a first validation twice, where the checkpoint ends an epoch.
        """
        return 0 if self.ckpt_path is not None else self._num_sanity_val_steps

    @num_sanity_val_steps.setter
    def num_sanity_val_steps(self, count: float) -> None:
        self._num_sanity_val_steps = count

    @property
    def log_dir(self) -> str | None:
        """Return the folder of the run; every rank has to ask. None in a `fast_dev_run`, which keeps nothing."""
        return None if getattr(self, "fast_dev_run", False) else self.run_folder.path

    def export(
        self,
        model: LightningModule | None = None,
        ckpt_path: str | None = None,
        output: str | None = None,
        merge: Merge | bool = "float32",
        datamodule: LightningDataModule | None = None,
        push_to_hub: str | None = None,
        private: bool = True,
    ) -> Path:
        """Write a Hugging Face folder from a checkpoint, or from the model as it is.

        Args:
            model: A module whose model is exported when no checkpoint is given.
            ckpt_path: Checkpoint file, or `last` for the newest of the newest run under `trainer.default_root_dir`. It
                holds all that is needed: neither data nor configuration is read.
            output: Folder to create.
            merge: How adapters are merged into the weights: `float32`, `base` (the dtype of the base, with its
                rounding error reported), or `none`: then only the adapters are written. true is float32, false is none.
            datamodule: Gives the tokenizer when no checkpoint is given.
            push_to_hub: Repository of the hub, ORG/NAME, to upload the folder to; the folder stays.
            private: Whether a new repository is private.

        Returns:
            The folder.
        """
        return verbs.export(self, model, ckpt_path, output, merge, datamodule, push_to_hub, private)

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
        unprompted: bool = True,
        page: str | None = None,
        compare: str | None = None,
        folds: int | None = None,
    ) -> JsonObject:
        """Look at the training data through the model as it is, without gradients; estimate the noise rate.

        Prints what the model believes, what each objective would do to the tokens, how much of the labels looks like
        noise, the most suspicious examples, and which objective to train with;
        writes `probe.json`, `probe.png`, `probe.svg`, and `tokens.npz`, a sample of tokens for the verb `figures`.

        Args:
            model: The module, pretrained, from an architecture, or with the weights of `ckpt_path`.
            datamodule: The data.
            examples: How many, spread over the training split; default: all.
            output: Folder for the report; default: `probe` under `trainer.default_root_dir`.
            audit: File for every example as a line of JSON, the most suspicious first.
            truth: Column of the rows that is true where a row is noisy; every score is measured against it.
            ckpt_path: Checkpoint, or `last` for the newest of the newest run under `trainer.default_root_dir`.
            unprompted: Whether to read the answers without their prompts too, a second and shorter pass: the noise
                estimate then compares with what the model says of an answer anyway, not with word frequencies alone.
            page: HTML file to write: rows with every token coloured by the gate of an objective, or by a statistic; at
                most 2,000 rows, the most suspicious first.
            compare: Checkpoint, or `last`, that the page shows beside the model, in a second pass.
            folds: Split the rows into so many parts, and read each with a small adapter that was trained on the others
                for one epoch: the format of the file is learnt then, and the row that is read is not. At least 2.

        Returns:
            The report, as in `probe.json`.
        """
        return verbs.probe(
            self, model, datamodule, examples, output, audit, truth, ckpt_path, unprompted, page, compare, folds
        )

    def read_checkpoint(self, ckpt_path: str) -> Checkpoint:
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
