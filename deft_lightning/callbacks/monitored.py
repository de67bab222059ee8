"""Whether the metrics that callbacks wait for will ever be logged, asked before training rather than after an epoch."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from deft_lightning.callbacks.first_last import FirstLastValidation
from deft_lightning.callbacks.watched import compares, noisy_sources_of, sources_of
from deft_lightning.errors import UserError, did_you_mean

TRAIN = ("loss", "nll", "ppl", "token_accuracy", "tokens", "lr", "grad_norm", "router_loss", "skipped_steps")
VAL = ("loss", "nll", "ppl", "token_accuracy")
NOISY = ("nll", "reproduced", "recovered")
OURS = ("deft_lightning.", "lightning.")


def of_validation(metric: str) -> bool:
    """Return whether only a validation logs a metric."""
    return metric.startswith(("val", "forgetting/"))


class MetricCheck(Callback):
    """Refuses early stopping and checkpoints by a metric that does not exist.

    Raises:
        UserError: Names the option and the metrics that there are.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse names that no run logs, before the model is loaded."""
        if stage == "fit":
            _check(trainer, pl_module, val=True, noisy=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what only a validation would log, once it is known that there is none."""
        sizes = [size for size in trainer.num_val_batches if size]
        _check(trainer, pl_module, val=bool(sizes), noisy=len(sizes) > 1, too_late=_too_late(trainer))


def _too_late(trainer: Trainer) -> str | None:
    """Return why a run ends before its first validation; None where it does not, or where nobody can tell."""
    last = [one for one in trainer.callbacks if isinstance(one, FirstLastValidation)]  # type: ignore[attr-defined]
    batches, every = trainer.num_training_batches, trainer.val_check_batch
    if any(one.after for one in last) or trainer.global_step or not isinstance(batches, int):
        return None  # a run that goes on has the best checkpoint of the one before
    if not isinstance(every, int) or not batches:
        return None  # validation by the clock, or rows without a number
    accumulated, epochs = trainer.accumulate_grad_batches, trainer.check_val_every_n_epoch
    whole, rest = divmod(every - 1, batches) if epochs is None else (epochs - 1, every - 1)
    before = whole * math.ceil(batches / accumulated) + rest // accumulated  # steps before the batch that it follows
    short = trainer.max_epochs not in (None, -1) and whole >= trainer.max_epochs
    if not short and (trainer.max_steps == -1 or before < trainer.max_steps):
        return None
    ends = f"{trainer.max_epochs} epochs" if short else f"{trainer.max_steps:,} optimizer steps"
    return (
        f"the run ends after {ends}, before its first validation, which would follow step {before + 1:,}; "
        "validate after the last step (--validation.after true), or earlier (--trainer.val_check_interval)"
    )


def _check(trainer: Trainer, module: LightningModule, val: bool, noisy: bool, too_late: str | None = None) -> None:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if not all(type(part).__module__.startswith(OURS) for part in (module, *callbacks)):
        return  # a class of the user's may log what it likes; Lightning looks for it later
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str):
            continue
        own = type(callback).__module__.startswith("deft_lightning.")
        option = "--checkpoint.monitor" if own else f"--trainer.callbacks.monitor ({type(callback).__name__})"
        if not val and of_validation(monitor):
            raise UserError(
                f"{option} {monitor}: there is no validation; see --data.validation_fraction,"
                " --data.validation_source and --trainer.limit_val_batches"
            )
        if monitor == "forgetting/kl" and not compares(module):
            raise UserError(f"{option} {monitor}: set --model.forgetting true, which measures it")
        if not noisy and monitor.startswith("val_noisy/"):
            raise UserError(f"{option} {monitor}: no validation example is corrupted, see --data.noise")
        sources = sources_of(trainer, "validation") if val else ()
        known = [*(f"train/{name}" for name in TRAIN), "objective/scale", "noise/estimated"]
        known = [
            *(f"val/{name}" for name in VAL if val),
            *(f"val/{name}/nll" for name in sources),
            *(["forgetting/kl"] if val and compares(module) else []),
            *(f"val_noisy/{name}" for name in NOISY if noisy),
            *(f"val_noisy/{name}/nll" for name in noisy_sources_of(trainer) if noisy),
            *known,
        ]
        if monitor not in known:
            suggested = did_you_mean(monitor, known)
            raise UserError(f"{option} {monitor}: no such metric.{suggested} Known: {', '.join(known)}")
        if too_late and of_validation(monitor):
            raise UserError(f"{option} {monitor}: {too_late}")
