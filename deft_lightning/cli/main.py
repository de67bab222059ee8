"""Command line: LightningCLI with verbs of our own, defaults of the paper's recipe, and errors of one line."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from deft_lightning.callbacks import (
    Checkpoint,
    Dashboard,
    EntropyMonitor,
    FirstLastValidation,
    GateMonitor,
    GracefulStop,
    MetricCheck,
    NoiseEstimate,
    NoiseMonitor,
    PredictionWriter,
    RankWatch,
    RunSummary,
    SFTProgressBar,
)
from deft_lightning.cli.after_fit import AfterFit, log_folder, run_after_fit, saved
from deft_lightning.cli.compared import tell_change, tested
from deft_lightning.cli.crash import RUN, mistakes
from deft_lightning.cli.parser import DeftParser
from deft_lightning.cli.subclasses import class_path, find_class, take_classes
from deft_lightning.cli.trainer_options import (
    check_optimizer,
    check_options,
    complaint_of_lightning,
    complete,
    made_in_vain,
    trainer_error,
)
from deft_lightning.data import InstructionDataModule
from deft_lightning.deferred import deferred
from deft_lightning.errors import UserError
from deft_lightning.models import tokenizer_from_checkpoint
from deft_lightning.training.module import SFTModule
from deft_lightning.training.quiet import hush
from deft_lightning.training.recipe import TRAINER_DEFAULTS
from deft_lightning.training.resume import refuse, run_folder
from deft_lightning.training.trainer import Trainer

OPTIMIZER = {
    "class_path": "torch.optim.AdamW",
    "init_args": {"lr": 5e-5, "betas": [0.9, 0.95], "weight_decay": 0.01},
}
SCHEDULER = {"class_path": "deft_lightning.training.optim.CosineWithWarmup"}


class DeftCLI(LightningCLI):
    """Lightning's verbs, export, preview and probe for :class:`SFTModule` and :class:`InstructionDataModule`.

    Args:
        args: A command line, or parsed options; default: that of the process.
        module: A subclass of :class:`SFTModule` in its place, unless ``--model_class`` names one.
        data: A subclass of :class:`InstructionDataModule` in its place, unless ``--data_class`` names one.
    """

    trainer: Trainer

    def __init__(
        self, args: ArgsType = None, module: type[SFTModule] | None = None,
        data: type[InstructionDataModule] | None = None,
    ) -> None:  # fmt: skip
        words = sys.argv[1:] if args is None else args
        self._given, asked = take_classes(words) if isinstance(words, list) else ([], {})
        self._words = words if isinstance(words, list) else None
        self.tested: dict[str, float] = {}  # before training
        # The parsers of the other verbs would take a second to build; behind options the verb is not known yet.
        self._asked = self._given[0] if self._given and self._given[0] in self.subcommands() else None
        self._classes = {
            "model_class": _class_of(asked.get("model_class"), module, SFTModule, "--model"),
            "data_class": _class_of(asked.get("data_class"), data, InstructionDataModule, "--data"),
        }
        super().__init__(
            self._classes["model_class"],
            self._classes["data_class"],
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            trainer_class=Trainer,
            # The data module shards by itself; from Python loaders may be anybody's, which Lightning then shards.
            trainer_defaults={**TRAINER_DEFAULTS, "use_distributed_sampler": False},
            seed_everything_default=0,
            parser_class=DeftParser,
            parser_kwargs={"description": "Fine-tune causal language models on imperfect instruction data."},
            auto_configure_optimizers=False,  # it would build the optimizer before the model exists
            load_from_checkpoint_support=False,
            args=self._given if isinstance(words, list) else args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the verbs and what the command line does not set of each."""
        own = {name: {"model", "datamodule"} for name in ("export", "preview", "probe")}
        return {**LightningCLI.subcommands(), **own}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        # Ninety lines of brackets say less than the groups below them.
        kwargs.setdefault("usage", f"python -m deft_lightning {subcommand} [--config FILE] [options]")
        if self._asked not in (None, subcommand):
            return self.init_parser(**kwargs)  # keeps the verb's place
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give our callbacks keys of their own, so that a user's ``trainer.callbacks`` does not replace them."""
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(SFTProgressBar, "progress_bar")
        parser.add_lightning_class_args(FirstLastValidation, "validation")
        parser.add_lightning_class_args(GateMonitor, "gate_monitor")
        parser.add_lightning_class_args(EntropyMonitor, "entropy_monitor")
        parser.add_lightning_class_args(NoiseMonitor, "noise_monitor")
        parser.add_lightning_class_args(NoiseEstimate, "noise_estimate")
        parser.add_lightning_class_args(Dashboard, "dashboard")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_class_arguments(AfterFit, "after_fit")
        parser.set_defaults({"model.optimizer": OPTIMIZER, "model.scheduler": SCHEDULER})
        for name, cls in self._classes.items():
            if cls not in (SFTModule, InstructionDataModule):
                key = name.removesuffix("_class")
                about = f"Class that --{key} names, instead of the package's; its options follow --{key}."
                parser.add_argument(f"--{name}", type=str, default=class_path(cls), help=about)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: what a checkpoint was trained with must not override the command line."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and refuse what no type refuses."""
        # Not Lightning's own, which warns of arguments from within Python: they may be those of the process.
        self.config = parser.parse_args(args) if isinstance(args, list) else parser.parse_object(args)
        if verb := self.config.get("subcommand"):
            check_options(self.config[verb], verb)
            complete(self.config[verb])

    def instantiate_classes(self) -> None:
        """Build everything; what a class refuses in its arguments is the user's to change."""
        try:
            super().instantiate_classes()
        except MisconfigurationException as error:  # raised by the one class of Lightning that has a key of its own
            raise UserError(f"--checkpoint: {error}") from None
        except ValueError as error:
            if isinstance(error, UserError) or "Does not validate" not in str(error):
                raise
            raise made_in_vain(error) from None
        if self.subcommand == "fit":
            check_optimizer(self.model.optimizer_callable)
            self._get(self.config_init, "after_fit").check()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Leave out the callbacks that the trainer's switches turn off; Lightning would refuse them."""
        config, parser = self._get(self.config_init, "trainer"), self._parser(self.subcommand)
        off = {"checkpoint": config.get("enable_checkpointing"), "progress_bar": config.get("enable_progress_bar")}
        if any(isinstance(callback, ProgressBar) for callback in _as_list(config.get("callbacks"))):
            off["progress_bar"] = False  # Lightning refuses two
        parser.callback_keys = [key for key in parser.callback_keys if off.get(key) is not False]
        self.stop, self.summary = GracefulStop(), RunSummary()
        self.summary.deferred = True  # until it is known where the export lies
        config.callbacks = [*_as_list(config.get("callbacks")), self.stop, RankWatch(), MetricCheck(), self.summary]
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:  # Lightning's own checks
            raise error if isinstance(error, UserError) else trainer_error(error) from None

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        path = kwargs.get("ckpt_path")
        if subcommand == "fit" and self.config.fit.get("weights_only", False) is None:
            del self.config.fit["weights_only"]  # the other verbs read the config of a run too, and do not know it
        if path is not None:
            kwargs["ckpt_path"] = path = self._settle_checkpoint(subcommand, path)
        if path is not None and subcommand != "export":
            checkpoint = self.trainer.read_checkpoint(path)
            data = self.datamodule
            if data.tokenizer_name is None and self.model.pretrained is None:
                # It was built from the training rows, which may have changed since.
                data.use_tokenizer(tokenizer_from_checkpoint(checkpoint))
        if subcommand == "test" and self.datamodule.benchmarks:
            kwargs["verbose"] = False  # Lightning's table would say everything once for each loader
        if path is None and subcommand in ("validate", "test", "predict", "probe") and self.model.pretrained is None:
            rank_zero_warn(f"{subcommand} of random weights: set --ckpt_path FILE or last, or --model.pretrained")
        return kwargs

    def _settle_checkpoint(self, subcommand: str, path: str) -> str:
        """Return the file that is meant, and write it into the run's config, which so repeats the run."""
        config = self.config[subcommand]
        written = [folder for file in config.get("config") or [] if (folder := run_folder(str(file))) is not None]
        if path == "last":
            path = str(self.trainer.last_checkpoint(written[-1] if written else None))
        elif (
            written and subcommand != "fit" and not any(arg.startswith("--ckpt_path") for arg in map(str, self._given))
        ):
            rank_zero_warn(
                f"{subcommand} of {path}, from which the run in {written[-1]} was resumed; set --ckpt_path last for its"
                " own newest checkpoint"
            )
        if "://" not in path:
            config.ckpt_path = str(Path(path).resolve())
        if subcommand == "fit":
            refuse(path, self.trainer, self.model)
        return path

    def before_instantiate_classes(self) -> None:
        """Keep the configuration for a report of what goes wrong from here on."""
        RUN.config = partial(self.parser.dump, self.config, skip_none=False)

    def _run_subcommand(self, subcommand: str) -> None:
        RUN.folders = [partial(log_folder, self.trainer), partial(getattr, self.trainer, "default_root_dir")]
        if subcommand == "fit":
            RUN.saved = partial(saved, self.trainer)
        if subcommand != "preview":  # which loads no model
            with deferred():
                import_module("transformers.modeling_utils")
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            if user_error := complaint_of_lightning(error):
                raise user_error from None
            raise

    def before_fit(self) -> None:
        """Test before training, where the run is to say what it changed; one that is resumed began elsewhere."""
        config = self.config_init[self.subcommand]
        if not config.after_fit.compare or config.trainer.fast_dev_run:  # Lightning names what that leaves out
            return
        if config.ckpt_path is not None:
            rank_zero_info("--after_fit.compare: skipped for a resumed run, whose training began elsewhere")
        elif not config.after_fit.test:
            rank_zero_info("--after_fit.compare: nothing is compared without a test (--after_fit.test true)")
        else:
            self.tested = tested(self.trainer, self.model, self.datamodule)

    def after_fit(self) -> None:
        """Test and export what was trained, unless training was cut short; sum the run up."""
        if self.stop.stopped:
            self.summary.tell(self.trainer)
            rank_zero_info(f"stopped at step {self.trainer.global_step}; resume with --ckpt_path last")
            return
        if self.trainer.interrupted or self._get(self.config_init, "trainer").get("fast_dev_run"):
            return
        wanted, tell = self._get(self.config_init, "after_fit"), partial(self.summary.tell, self.trainer)
        run_after_fit(self.trainer, self.model, self.datamodule, wanted, tell)
        if self.tested:
            tell_change(self.trainer, self.model, self.tested, self._words)


def _as_list(callbacks: Any) -> list[Any]:
    return callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]


def _class_of(path: str | None, given: type | None, base: type, option: str) -> Any:
    """Return the class that a path names, else the one given by a script, else the package's."""
    if path is None or (given is not None and path == class_path(given)):
        return given or base
    return find_class(path, base, option)


def parsers() -> dict[str, list[LightningArgumentParser]]:
    """Return the parsers of the trainer's verbs."""

    class Built(DeftCLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
            raise StopIteration

    built = Built.__new__(Built)
    with suppress(StopIteration):
        built.__init__([])  # type: ignore[misc]
    return {verb: [built._parser(verb)] for verb in built.subcommands()}


def run(
    args: ArgsType = None, module: type[SFTModule] | None = None, data: type[InstructionDataModule] | None = None
) -> None:
    """Run the command line; a user's mistake ends with one line on stderr and status 2.

    Args:
        args: As for :class:`DeftCLI`.
        module: As for :class:`DeftCLI`.
        data: As for :class:`DeftCLI`.
    """
    hush()
    with mistakes():
        DeftCLI(args, module, data)
