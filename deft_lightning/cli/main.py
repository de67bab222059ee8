"""Command line: LightningCLI with verbs of our own, defaults of the paper's recipe, and errors of one line."""

from __future__ import annotations

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from deft_lightning.callbacks import (
    Checkpoint,
    Dashboard,
    EntropyMonitor,
    GateMonitor,
    GracefulStop,
    MetricCheck,
    NoiseMonitor,
    PredictionWriter,
    RankWatch,
    SFTProgressBar,
)
from deft_lightning.cli.after_fit import AfterFit, log_folder, run_after_fit, saved
from deft_lightning.cli.config_files import MODE, bounded
from deft_lightning.cli.crash import RUN, mistakes
from deft_lightning.cli.messages import one_line
from deft_lightning.cli.trainer_options import (
    check_optimizer,
    check_options,
    complaint_of_lightning,
    complete,
    made_in_vain,
    trainer_error,
)
from deft_lightning.data import InstructionDataModule, known_noise
from deft_lightning.errors import UserError
from deft_lightning.evaluation import BENCHMARKS
from deft_lightning.models import tokenizer_from_checkpoint
from deft_lightning.objectives import known_objectives
from deft_lightning.training.module import SFTModule
from deft_lightning.training.resume import refuse, run_folder
from deft_lightning.training.trainer import Trainer

TRAINER_DEFAULTS: dict[str, Any] = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "default_root_dir": "logs",
    "use_distributed_sampler": False,  # the data module shards by itself
}
OPTIMIZER = {
    "class_path": "torch.optim.AdamW",
    "init_args": {"lr": 5e-5, "betas": [0.9, 0.95], "weight_decay": 0.01},
}
SCHEDULER = {"class_path": "deft_lightning.training.optim.CosineWithWarmup"}


def _choices() -> str:
    return (
        f"Objectives (--model.objective): {', '.join(known_objectives())}, or the class path of your own. "
        f"Label noise (--data.noise.ops+=): {', '.join(known_noise())}. "
        "Strategies (--trainer.strategy): auto (one device), ddp (one process a device), fsdp2 (sharded). "
        "Sources (--data.source): .jsonl, .json, .csv, .tsv, .parquet, .arrow (also .gz, .zst), a folder or pattern of"
        " them, a hub id, reasoning_gym:<task>; several with --data.source '{a.jsonl: 1, b.jsonl: 0.5}'. "
        f"Benchmarks (--data.benchmarks, for test and predict): {', '.join(BENCHMARKS)}. "
        "Details of a class: --model.objective.help NAME, --data.noise.ops.help NAME. "
        "What predict wrote is graded later by: score FILE [--benchmark NAME] [--output FILE]. "
        "Figures of runs, probes and objectives: python -m deft_lightning figures --help. "
        "Objectives compared over regimes of prior and noise: python -m deft_lightning study --help."
    )


class DeftParser(LightningArgumentParser):
    """A parser whose errors are one line that names the option and what comes close."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # an abbreviation that is unique today is ambiguous tomorrow
        kwargs.setdefault("prog", "python -m deft_lightning")
        kwargs.setdefault("parser_mode", MODE)
        kwargs["description"] = f"{kwargs.get('description') or ''} {_choices()}".strip()
        super().__init__(*args, **kwargs)

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse a command line; files that it names are bounded, and no key in them is lost."""
        try:
            with bounded():
                found = super().parse_args(*args, **kwargs)
        except ImportError as error:  # of what opens an address such as s3://
            raise UserError(f"{error} (named by an option or a configuration)") from None
        for group in self.groups or {}:
            if group in found and not isinstance(found[group], Namespace):
                raise UserError(f"{group}: expected options below it, as NAME: VALUE, not {found[group]!r}")
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parsers: list[Any] = [getattr(ex, "subcommand_parser", None) or self]
        for action in parsers[0]._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers.extend(action.choices.values())
        options = {option for parser in parsers for option in parser._option_string_actions}
        sys.stderr.write(f"error: {UserError(one_line(message, sorted(options)))}\n")
        self.exit(2)


class DeftCLI(LightningCLI):
    """Lightning's verbs, export, preview and probe for :class:`SFTModule` and :class:`InstructionDataModule`."""

    trainer: Trainer

    def __init__(self, args: ArgsType = None) -> None:
        self._given = sys.argv[1:] if args is None else args if isinstance(args, list) else []
        super().__init__(
            SFTModule,
            InstructionDataModule,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            trainer_class=Trainer,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=DeftParser,
            parser_kwargs={"description": "Fine-tune causal language models on imperfect instruction data."},
            auto_configure_optimizers=False,  # it would build the optimizer before the model exists
            load_from_checkpoint_support=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the verbs and what the command line does not set of each."""
        own = {name: {"model", "datamodule"} for name in ("export", "preview", "probe")}
        return {**LightningCLI.subcommands(), **own}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        # Ninety lines of brackets say less than the groups below them.
        kwargs.setdefault("usage", f"python -m deft_lightning {subcommand} [--config FILE] [options]")
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give our callbacks keys of their own, so that a user's ``trainer.callbacks`` does not replace them."""
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(SFTProgressBar, "progress_bar")
        parser.add_lightning_class_args(GateMonitor, "gate_monitor")
        parser.add_lightning_class_args(EntropyMonitor, "entropy_monitor")
        parser.add_lightning_class_args(NoiseMonitor, "noise_monitor")
        parser.add_lightning_class_args(Dashboard, "dashboard")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_class_arguments(AfterFit, "after_fit")
        parser.set_defaults({"model.optimizer": OPTIMIZER, "model.scheduler": SCHEDULER})

    def _parse_ckpt_path(self) -> None:
        """Do nothing: what a checkpoint was trained with must not override the command line."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and refuse what no type refuses."""
        super().parse_arguments(parser, args)
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

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Leave out the callbacks that the trainer's switches turn off; Lightning would refuse them."""
        config, parser = self._get(self.config_init, "trainer"), self._parser(self.subcommand)
        off = {"checkpoint": config.get("enable_checkpointing"), "progress_bar": config.get("enable_progress_bar")}
        if any(isinstance(callback, ProgressBar) for callback in _as_list(config.get("callbacks"))):
            off["progress_bar"] = False  # Lightning refuses two
        parser.callback_keys = [key for key in parser.callback_keys if off.get(key) is not False]
        self.stop = GracefulStop()
        config.callbacks = [*_as_list(config.get("callbacks")), self.stop, RankWatch(), MetricCheck()]
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
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            if said := complaint_of_lightning(error):
                raise said from None
            raise

    def after_fit(self) -> None:
        """Test and export what was trained, unless training was cut short."""
        if self.stop.stopped:
            rank_zero_info(f"stopped at step {self.trainer.global_step}; go on with --ckpt_path last")
            return
        if self.trainer.interrupted or self._get(self.config_init, "trainer").get("fast_dev_run"):
            return
        wanted = self._get(self.config_init, "after_fit")
        run_after_fit(self.trainer, self.model, self.datamodule, export=wanted.export, test=wanted.test)


def _as_list(callbacks: Any) -> list[Any]:
    return callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]


def run(args: ArgsType = None) -> None:
    """Run the command line; a user's mistake ends with one line on stderr and status 2."""
    # Loader processes do not help tokens that are in memory already; the tree-spec notice is Lightning's own.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*treespec.*")
    # Every run has a folder of its own, so a resumed one always checkpoints to another.
    warnings.filterwarnings("ignore", message="The dirpath has changed from.*")
    with mistakes():
        DeftCLI(args)
