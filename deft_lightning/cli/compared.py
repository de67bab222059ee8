"""What training changed, as the test sees it: ``--after_fit.compare`` tests before the first step too."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng

from deft_lightning.cli.verbs import PROGRAM
from deft_lightning.objectives import NLL
from deft_lightning.terminal import visible
from deft_lightning.training.trainer import Trainer

OBJECTIVE = "--model.objective"
COUNTS = ("_se", "/examples", "/skipped_prompts", "/truncated")  # ends of tags that are no score


def tested(trainer: Trainer, module: Any, datamodule: Any) -> dict[str, float]:
    """Test a model before it is trained, and return the figures by tag; the training that follows is the same.

    The model is built or loaded once more for training, so that random weights and references begin as without a test.

    Args:
        trainer: Of the run.
        module: What will be trained.
        datamodule: Its data.
    """
    with isolate_rng():
        trainer.test(module, datamodule=datamodule, verbose=False)
        found = {tag: float(value) for tag, value in trainer.callback_metrics.items()}
    module.model = module.batch_loss = None
    lines = [f"{tag}: {value:.3f} before training" for tag, value in figures(found).items()]
    _tell(trainer, lines)
    return found


def figures(tests: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of a test, without what describes them."""
    return {tag: value for tag, value in tests.items() if tag.startswith("test/") and not tag.endswith(COUNTS)}


def tell_change(trainer: Trainer, module: Any, before: Mapping[str, float], words: Sequence[str] | None) -> None:
    """Write what training changed, and the command that trains the same with NLL; on rank 0, to standard output.

    Args:
        trainer: Of the run, after its test.
        module: What was trained.
        before: Figures of the test before training.
        words: Command line of the run; None where it was none.
    """
    after = {tag: float(value) for tag, value in trainer.callback_metrics.items()}
    lines = [
        f"{tag}: {value:.3f} before training, {after[tag]:.3f} at step {trainer.global_step:,}"
        for tag, value in figures(before).items()
        if tag in after
    ]
    if words is not None and not isinstance(module.objective, NLL):
        lines.append(f"the same with NLL, to compare: {PROGRAM} {shlex.join(with_nll(words))}")
    _tell(trainer, lines)


def with_nll(words: Sequence[str]) -> list[str]:
    """Return a command line with NLL in place of the objective that it names, and of the options of that."""
    kept, skip = [], False
    for word in map(str, words):
        if skip:
            skip = False
        elif word.partition("=")[0] == OBJECTIVE or word.startswith(f"{OBJECTIVE}."):
            skip = "=" not in word
        else:
            kept.append(word)
    return [*kept, OBJECTIVE, "NLL"]


def _tell(trainer: Trainer, lines: Sequence[str]) -> None:
    if trainer.is_global_zero:
        sys.stdout.write("".join(f"{visible(line)}\n" for line in lines))
        sys.stdout.flush()
