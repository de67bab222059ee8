"""TensorBoard as a dashboard: a page of charts, the gate's curve, and examples marked by gate."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from deft_lightning._lightning import is_logging_step, logged_step
from deft_lightning.annotations import Batch
from deft_lightning.callbacks.drawings import gate_curve, pixels_of
from deft_lightning.callbacks.marked import marked
from deft_lightning.callbacks.monitor import add_figure, writers
from deft_lightning.callbacks.sinks import sinks
from deft_lightning.callbacks.watched import (
    WatchedModule,
    injects_noise,
    is_watched,
    noisy_sources_of,
    sources_of,
    tracked_tags,
    watched,
)
from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.objectives import Objective

Charts = dict[str, dict[str, list[Any]]]


class Dashboard(Callback):
    """Arranges what the monitors log, for loggers that take figures and texts; the layout is for TensorBoard alone.

    When `fit` starts: the layout of the Custom Scalars page. After the first batch, with matplotlib: `objective/gate`,
    the curve of the gate against p as it was at the start. The curve again before each validation by which a schedule
    has moved on. After each validation: `examples/val` (and `examples/val_noisy`), the first examples with their tokens
    marked by gate, always the same ones, so that the slider of the Text page shows what became of them. On the first,
    second, fourth, eighth ... logged step: `examples/train`, the first rows of that step, marked by the gate with which
    they trained.

    Args:
        layout: Write the layout.
        curve: Draw the curve.
        examples: Examples to show of a validation set or a training step; 0 for none.
        tokens: Supervised tokens to show of each example.

    Raises:
        UserError: A negative number.
    """

    def __init__(self, layout: bool = True, curve: bool = True, examples: int = 3, tokens: int = 200) -> None:
        if examples < 0:
            raise UserError(f"dashboard.examples must not be negative, got {examples}")
        if tokens < 1:
            raise UserError(f"dashboard.tokens must be at least 1, got {tokens}")
        self.layout, self.curve, self.examples, self.tokens = layout, curve, examples, tokens
        self.drawn: Objective | None = None
        self.at_start: tuple[Objective, int] | None = None  # to be drawn, and the step beside it
        self.steps, self.last = 0, -1  # logged ones that were seen, and the newest of them

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout and the curve, on rank zero alone."""
        self.steps, self.last, self.at_start = 0, -1, None
        if not is_watched(pl_module):
            return
        module = watched(pl_module)
        # A schedule may have a focus index at one end of the run only.
        focus = any(objective.deformed is not None for objective in (module.objective, module.current_objective))
        charts = chart_layout(injects_noise(trainer), focus, "objective/scale" in tracked_tags(module.objective))
        if sources := sources_of(trainer, "train"):
            held_out = sources_of(trainer, "validation")
            charts["By source"] = charts_by_source(sources, held_out, noisy_sources_of(trainer) if held_out else ())
        if self.layout:
            for writer in writers(trainer):
                writer.add_custom_scalars(charts)
        self.drawn = module.current_objective
        self.at_start = module.current_objective, logged_step(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the curve where a run ends before its first batch."""
        self._draw_start(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the curve again if the run has reached another objective; another scale of the same is none."""
        if not is_watched(pl_module) or trainer.state.fn != "fit":
            return
        module = watched(pl_module)
        if module.objective.scheduled and module.current_objective != self.drawn:
            self.drawn = module.current_objective
            self._draw(trainer, module.current_objective, logged_step(trainer))

    def _draw_start(self, trainer: Trainer) -> None:
        if self.at_start is not None:
            self._draw(trainer, *self.at_start)
            self.at_start = None

    def _draw(self, trainer: Trainer, objective: Objective, step: int) -> None:
        if self.curve and has_matplotlib():
            add_figure(trainer, "objective/gate", lambda: pixels_of(gate_curve(objective)), step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Write the first rows of a logged step, ever less often, on rank zero alone."""
        self._draw_start(trainer)
        step = logged_step(trainer)
        if not self.examples or not is_watched(pl_module) or not is_logging_step(trainer) or step == self.last:
            return
        self.steps, self.last = self.steps + 1, step  # of its micro-batches the first alone is shown
        if not self.steps & (self.steps - 1):
            self._write(trainer, watched(pl_module), outputs["stats"], batch, "examples/train")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the first examples of a validation set, on rank zero alone."""
        if batch_idx or not self.examples or not is_watched(pl_module):
            return
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            name = "examples/val_noisy" if dataloader_idx else "examples/val"
            self._write(trainer, watched(pl_module), outputs["stats"], batch, name)

    def _write(self, trainer: Trainer, module: WatchedModule, stats: TokenStats, batch: Batch, name: str) -> None:
        if (tokenizer := module.tokenizer) is None:
            return
        if taking := [sink for sink in sinks(trainer) if "texts" in sink.kinds]:
            gate = module.current_objective.gate(stats)
            text = marked(tokenizer, batch, gate, self.examples, self.tokens)
            for sink in taking:
                sink.text(name, text, logged_step(trainer))


def has_matplotlib() -> bool:
    """Return whether the curve can be drawn: matplotlib is an extra (`figures`), and training does without."""
    return importlib.util.find_spec("matplotlib") is not None


def chart_layout(noise: bool, focus: bool, scale: bool) -> Charts:
    """Return the pages of the Custom Scalars tab, in the form of ``SummaryWriter.add_custom_scalars``.

    Tags are regular expressions from the start of a tag; `Margin` is a line between two others.

    Args:
        noise: Whether labels are corrupted on purpose; charts of clean against noisy are empty otherwise.
        focus: Whether the objective has a focus index.
        scale: Whether it is divided by its mean gate.
    """
    gate: dict[str, list[Any]] = {
        "Focus curves: mean alpha, mean p" if focus else "Mean p": _lines("focus/mean", "prob/mean"),
        "Gate: mean and effective sample size": _lines("gate/mean", "gate/ess"),
        "Gate: median between 10 % and 90 %": ["Margin", ["gate/q50", "gate/q10", "gate/q90"]],
        "Locked: sure, wrong, and the gate nearly shut": _lines("gate/locked"),
        "Share of the gradient by p": _lines(
            "gradient/p0_10", "gradient/p10_50", "gradient/p50_90", "gradient/p90_100"
        ),
        "Entropy of the predictions (nats)": _lines("entropy/shannon", "entropy/renyi2"),
    }
    if scale:
        gate["Scale: 1 / mean gate"] = _lines("objective/scale")
    losses = {
        "Plain NLL (nats per token)": _lines("train/nll", "val/nll", "val_noisy/nll"),
        "Objective": _lines("train/loss", "val/loss"),
        "Token accuracy": _lines("train/token_accuracy", "val/token_accuracy"),
    }
    charts: Charts = {"Gate": gate}
    true = ("noise/true", "noise/true_tokens") if noise else ()
    gate["Noise rate: of answers, of tokens"] = _lines("noise/estimated", "noise/estimated_tokens", *true)
    if noise:
        charts["Clean against noisy labels"] = {
            "Gate": _lines("gate/clean", "gate/noisy"),
            "Plain NLL": _lines("nll/clean", "nll/noisy"),
            "Locked: all labels, and the clean ones": _lines("gate/locked", "gate/locked_clean"),
            "Noisy tokens' share of the gradient": _lines("noise/gradient_share"),
            "Noisy labels: memorised, recovered": _lines("noise/memorised", "noise/recovered"),
            "Detection of noise (AUROC)": _lines("noise/auroc_gate", "noise/auroc_prob"),
        }
    charts["Losses"] = losses
    return charts


def charts_by_source(
    train: Sequence[str], validation: Sequence[str], noisy: Sequence[str] = ()
) -> dict[str, list[Any]]:  # fmt: skip
    """Return the page of figures by source.

    Args:
        train: Names of the sources of the training rows.
        validation: Of those held out; none where they are of one source, or where there are none.
        noisy: Of the corrupted examples that are validated on; none without label noise.
    """
    charts = {
        "Gate": _lines(*(f"gate/{re.escape(name)}/mean" for name in train)),
        "Plain NLL, training": _lines(*(f"train/{re.escape(name)}/nll" for name in train)),
    }
    if validation:
        charts["Plain NLL, validation"] = _lines(*(f"val/{re.escape(name)}/nll" for name in validation))
    if noisy:
        charts["Plain NLL, corrupted tokens"] = _lines(*(f"val_noisy/{re.escape(name)}/nll" for name in noisy))
    return charts


def _lines(*tags: str) -> list[Any]:
    return ["Multiline", [f"{tag}$" for tag in tags]]
