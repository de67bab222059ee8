"""What follows training: whatever fails there leaves the checkpoint, and the line of the error names it."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from deft_lightning.cli.crash import RUN, explain
from deft_lightning.errors import UserError
from deft_lightning.models.card import write_card
from deft_lightning.models.hub import check_push, push
from deft_lightning.models.merge import Merge, stand_alone
from deft_lightning.training.card_facts import facts_of_run
from deft_lightning.training.logs import folder_of
from deft_lightning.training.trainer import Trainer

PROGRAM = "python -m deft_lightning"
Outputs = dict[str, tuple[str, Merge]]  # what is written: folder, and how adapters are merged


@dataclass(frozen=True)
class AfterFit:
    """What follows training.

    Args:
        test: Generate for the held-out examples and report exact match, or run the benchmarks of the data.
        compare: With `test`, also test before training, and report what changed and how to train with NLL.
        export: Write a Hugging Face folder, `export` in the run's log folder; adapters also go to `adapter`.
        merge: How adapters are merged in `export`: `float32`, `base` (the dtype of the base, with its rounding error
            reported), or `none` (no `export`).
        push_to_hub: Hub repository, ORG/NAME, to upload `export` to, or `adapter` if only that is written.
            Name and token are checked before training.
        private: Whether a new repository is private.

    Raises:
        UserError: A push without an export.
    """

    test: bool = False
    compare: bool = False
    export: bool = True
    merge: Merge = "float32"
    push_to_hub: str | None = None
    private: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be pushed."""
        if self.push_to_hub is not None and not self.export:
            raise UserError(f"--after_fit.push_to_hub {self.push_to_hub}: nothing is exported (--after_fit.export)")

    @rank_zero_only
    def check(self) -> None:
        """Refuse a push that would fail, while nothing has been computed for it; on rank zero alone.

        Raises:
            UserError: As for :func:`~deft_lightning.models.hub.check_push`.
        """
        if self.push_to_hub is not None:
            check_push(self.push_to_hub, self.private, "--after_fit.push_to_hub")


def run_after_fit(
    trainer: Trainer,
    module: Any,
    datamodule: Any,
    wanted: AfterFit,
    tell: Callable[[str | None], None],
) -> None:
    """Export a trained module, sum the run up, and test; after an export that has failed the rest is done all the same.

    Args:
        trainer: Of the run.
        module: What was trained.
        datamodule: Its data.
        wanted: What to write, and whether to generate and grade.
        tell: Sums the run up; called with the folder of the export, or None.

    Raises:
        Exception: What has failed first. What is told of it names the checkpoint and the command that repeats it.
    """
    actions: list[tuple[str, Callable[[], Any]]] = []
    failed: dict[str, Exception] = {}
    folder, outputs = trainer.log_dir, Outputs()
    if wanted.export and folder is not None:
        adapted = hasattr(module.model, "merge_and_unload")
        if adapted and not stand_alone(module.model):
            rank_zero_info("no adapter folder: the initialisation of these adapters changed the base weights")
        elif adapted:
            outputs["adapter"] = _free(Path(folder), "adapter"), "none"
        if not adapted or wanted.merge != "none":
            outputs["export"] = _free(Path(folder), "export"), wanted.merge
    for name, (output, merge) in outputs.items():
        actions.append((name, partial(trainer.export, module, output=output, merge=merge, datamodule=datamodule)))

    def summary() -> None:
        written = [output for name, (output, _) in outputs.items() if name not in failed]
        tell(written[-1] if written else None)

    actions.append(("summary", summary))
    if wanted.test:
        quiet = bool(datamodule.benchmarks)
        actions.append(("test", partial(trainer.test, module, datamodule=datamodule, verbose=not quiet)))
        actions.append(("model card", partial(_cards, trainer, module, outputs, failed)))
    pushed = _pushed(wanted, outputs)
    if pushed is not None:
        actions.append(("push", partial(_push, trainer, module, wanted, pushed, outputs, failed)))
    for name, action in actions:
        try:
            action()
        except Exception as error:
            failed[name] = error
    if failed:
        kept = newest(trainer) or _rescued(trainer, folder)
        again = _commands(failed, kept, folder, outputs, wanted)
        RUN.saved = partial(_repeat, failed, kept, again)
        raise next(iter(failed.values()))


def _cards(trainer: Trainer, module: Any, outputs: Outputs, failed: Mapping[str, Exception]) -> None:
    """Add what the test has found to the cards of what is written already."""
    for name, (output, _) in outputs.items():
        if not {name, "test"} & failed.keys() and trainer.is_global_zero:
            write_card(output, facts_of_run(module))


def _pushed(wanted: AfterFit, outputs: Outputs) -> str | None:
    """Return which of the folders is pushed: the merged model, or the adapters where they alone are written."""
    if wanted.push_to_hub is None:
        return None
    if not outputs:
        rank_zero_warn(f"--after_fit.push_to_hub {wanted.push_to_hub}: there is nothing to push")
    return next(reversed(outputs), None)


def _push(
    trainer: Trainer, module: Any, wanted: AfterFit, name: str, outputs: Outputs, failed: Mapping[str, Exception]
) -> None:
    """Push what was exported; nothing where that failed, which is told anyway."""
    if name in failed or not trainer.is_global_zero or wanted.push_to_hub is None:
        return
    write_card(outputs[name][0], facts_of_run(module), wanted.push_to_hub)
    push(outputs[name][0], wanted.push_to_hub, wanted.private)


def _free(folder: Path, name: str) -> str:
    """Return a folder to write: an earlier export is not overwritten, and not a reason to fail."""
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(1)))
    return str(next(path for one in names if not (path := folder / one).exists()))


def _repeat(failed: Mapping[str, Exception], kept: Path | None, commands: str) -> str:
    """Return what a user can do about it."""
    first, *others = failed
    also = "".join(f"; {name}: {explain(failed[name]) or repr(failed[name])}" for name in others)
    if kept is None:
        return f"; {first} failed after training was complete{also}, and no checkpoint was requested"
    return f"; {first} failed{also}, training is complete and saved in {kept}{commands}"


def _commands(
    failed: Mapping[str, Exception], kept: Path | None, folder: str | None, outputs: Outputs, wanted: AfterFit
) -> str:
    """Return the commands that repeat what has failed; the error of a push has its own."""
    config = Path(folder or ".") / "config.yaml"
    options = f"--config {shlex.quote(str(config))}" if config.is_file() else "with the options of this run,"
    commands = {"test": f"{PROGRAM} test {options} --ckpt_path {shlex.quote(str(kept))}"}
    for name, (output, merge) in outputs.items():
        way = "" if merge == "float32" else f" --merge {merge}"
        if wanted.push_to_hub is not None and name == next(reversed(outputs)):
            way += f" --push_to_hub {wanted.push_to_hub}{'' if wanted.private else ' --private false'}"
        commands[name] = f"{PROGRAM} export --ckpt_path {shlex.quote(str(kept))} --output {shlex.quote(output)}{way}"
    again = "; ".join(commands[name] for name in failed if name in commands)
    return f": repeat it with {again}" if again else ""


def newest(trainer: Trainer) -> Path | None:
    """Return the newest checkpoint that a run has written, or goes on from."""
    candidates: list[tuple[float, Path]] = []
    for callback in trainer.checkpoint_callbacks:
        for name in ("best_model_path", "last_model_path"):
            with suppress(OSError):
                path = Path(getattr(callback, name, "") or "?")
                candidates.append((path.stat().st_mtime, path))
    # `last.ckpt` is a link to another file, whose name says the step; the first of equals is taken.
    return max(candidates, key=lambda pair: pair[0])[1] if candidates else None


def _rescued(trainer: Trainer, folder: str | None) -> Path | None:
    """Save a run that was to leave an export alone; in one process, for other ranks have gone on."""
    if trainer.world_size > 1:
        return None
    for place in (folder, trainer.default_root_dir):
        with suppress(Exception):
            path = Path(place or ".") / "checkpoints" / f"step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            return path
    return None


def saved(trainer: Trainer) -> str:
    """Return for the line of an error where a run's state is kept; nothing before the first checkpoint."""
    path = newest(trainer)
    return "" if path is None else f"; the newest checkpoint is {path}: resume from it, or export it, with --ckpt_path"


def log_folder(trainer: Trainer) -> Path | None:
    """Return a run's log folder without asking other ranks, which may be gone; None if there is none."""
    places = [folder_of(logger) for logger in trainer.loggers]
    for place in (trainer.run_folder.known, *places):
        if place is not None and Path(place).is_dir():
            return Path(place)
    return None
