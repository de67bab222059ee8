"""What a run was, in a few lines at its end: time, tokens, memory, what training changed, where everything lies."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.types import STEP_OUTPUT
from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.callbacks.pace import Pace, clock_time, gibibytes, over_ranks, peak_memory, steps_of
from deft_lightning.callbacks.record import ESTIMATED, Point, RunRecord
from deft_lightning.callbacks.sinks import sinks
from deft_lightning.models.quantized import parameter_count
from deft_lightning.terminal import visible

SHARES = (ESTIMATED, "gate/locked")


class RunSummary(RunRecord):
    """Says at the end of a fit what it took, what it changed, and where its files lie; on rank 0, to standard output.

    Attributes:
        deferred: Whether somebody else calls :meth:`tell` once more is known, such as where the export lies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.deferred = False
        self.pace = Pace()
        self._begun, self._lines = 0.0, list[str]()
        self._supervised = 0  # tokens before this fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a run; a checkpoint is read after this."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.pace, self._begun, self._lines = Pace(), time.perf_counter(), []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of training."""
        self.pace.begin(trainer.global_step)
        self._supervised = getattr(pl_module, "tokens_seen", 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Count."""
        self.pace.batch(trainer, batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of training."""
        self.pace.validate()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of a validation."""
        self.pace.validated()
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather what was done, on every rank."""
        super().on_train_end(trainer, pl_module)
        tokens = over_ranks(trainer, pl_module, self.pace.tokens)
        audited: list[str] = getattr(getattr(trainer, "datamodule", None), "audited", [])
        self._lines = [self._took(trainer, pl_module, tokens), *audited, *self._changed(trainer)]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it, unless there is more to come."""
        if not self.deferred:
            self.tell(trainer)

    def tell(self, trainer: Trainer, export: str | None = None) -> None:
        """Write the summary; nothing where no step was made, and in a `fast_dev_run`.

        Args:
            trainer: Of the run.
            export: Folder of the exported model, if there is one.
        """
        if not self._lines or getattr(trainer, "fast_dev_run", False):
            return
        lines = [*self._lines, *_places(trainer), *([f"export: {export}"] if export else []), *_looked_at(trainer)]
        self._lines = []
        if trainer.is_global_zero:
            sys.stdout.write("".join(f"{visible(line)}\n" for line in lines))
            sys.stdout.flush()

    def _took(self, trainer: Trainer, module: LightningModule, tokens: float) -> str:
        pace, total = self.pace, steps_of(trainer)
        of = "" if total in (None, pace.step) else f" of {total:,}"
        done = f"{pace.step - pace.first:,}{'' if pace.first else of} optimizer steps"
        done += f" ({pace.first:,} to {pace.step:,}{of})" if pace.first else ""
        seconds = time.perf_counter() - self._begun
        aside = f" (validation {clock_time(sum(pace.validating))})" if pace.validating else ""
        learnt = getattr(module, "tokens_seen", 0) - self._supervised
        supervised = f" ({learnt:,} supervised)" if learnt else ""
        rate = f", {tokens / pace.training:,.0f} tokens/s" if pace.training else ""
        memory = peak_memory(module)
        peak = "" if memory is None else f", peak memory {gibibytes(memory)}"
        peak += " on rank 0" if peak and trainer.world_size > 1 else ""
        return f"trained: {done} in {clock_time(seconds)}{aside}; {tokens:,.0f} tokens{supervised}{rate}{peak}"

    def _changed(self, trainer: Trainer) -> list[str]:
        lines = []
        if self.first is None or self.last is None or self.best is None:
            lines.append("val/nll: there was no validation (--data.validation_fraction, --data.validation_source)")
        elif self.first == self.last == self.best:
            lines.append(f"val/nll: {_shown(self.last)}, the only validation")
        else:
            best = "the best" if self.best.nll == self.last.nll else f"best {_shown(self.best)}"
            lines.append(f"val/nll: {_shown(self.first)}, {_shown(self.last)}, {best}")
        values = {tag: trainer.callback_metrics[tag] for tag in SHARES if tag in trainer.callback_metrics}
        if values:
            about = {ESTIMATED: _injected(trainer)}
            told = (f"{tag} {float(value):.3f}{about.get(tag, '')}" for tag, value in values.items())
            lines.append("last logged step: " + ", ".join(told))
        return lines


def _injected(trainer: Trainer) -> str:
    """Return what share of the training answers was corrupted on purpose, beside an estimate that does not know it."""
    report = getattr(getattr(trainer, "datamodule", None), "reports", {}).get("train")
    noisy, rows = getattr(report, "noisy_examples", 0), getattr(report, "examples", 0)
    return f" (injected: {noisy / rows:.3f} of the answers)" if noisy and rows else ""


def _shown(point: Point) -> str:
    return f"{point.nll:.3f} {'before training' if point.step == 0 else f'at step {point.step:,}'}"


def _places(trainer: Trainer) -> list[str]:
    """Return where checkpoints lie, the newest and the best where they differ."""
    lines = []
    for callback in trainer.checkpoint_callbacks:
        best, last = getattr(callback, "best_model_path", ""), getattr(callback, "last_model_path", "")
        if best and getattr(callback, "monitor", None):
            lines += [f"checkpoint, best {callback.monitor}: {best}"]  # type: ignore[attr-defined]
            lines += [f"checkpoint, newest: {last}"] if last else []
        elif best or last:
            lines.append(f"checkpoint: {best or last}")
    return lines


def _looked_at(trainer: Trainer) -> list[str]:
    """Return how to look at what was logged."""
    return [f"look at it: {look}" for sink in sinks(trainer) if (look := sink.look)]


class ModelLine(ModelSummary):
    """Says in one line what model is trained, in place of Lightning's table of a single row."""

    packed: tuple[int, float] | None = None  # of a base in 4 bits: numbers beside those that are counted, and MB

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count what a 4-bit weight holds: two numbers a byte."""
        weights = list(pl_module.parameters())
        if more := sum(parameter_count(weight) - weight.numel() for weight in weights):
            self.packed = more, sum(weight.numel() * weight.element_size() for weight in weights) * 1e-6
        super().on_fit_start(trainer, pl_module)

    def summarize(  # type: ignore[override]  # Lightning calls it on the instance
        self, summary_data: list[tuple[str, list[str]]], total_parameters: int, trainable_parameters: int,
        model_size: float, total_training_modes: dict[str, int], total_flops: int, **summarize_kwargs: Any,
    ) -> None:  # fmt: skip
        """Write the line; the table has modes and operations too, which say nothing of a language model."""
        if self.packed is not None:
            total_parameters, model_size = total_parameters + self.packed[0], self.packed[1]
        kinds = ", ".join(dict(summary_data).get("Type", []))
        share = "all of them" if trainable_parameters == total_parameters else f"{trainable_parameters:,} of them"
        rank_zero_info(f"model: {kinds}, {total_parameters:,} parameters ({model_size:,.1f} MB), {share} trained")
