"""The callback beside a loss: it tells the objective where the run stands, and the user what the gate does."""

from __future__ import annotations

import warnings
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from deft_lightning.errors import UserError
from deft_lightning.integrations.calling import calling_trainer
from deft_lightning.integrations.counting import has_places, label_counts
from deft_lightning.integrations.figures import SIZE, WatchedNoise, gate_figures, gate_sums
from deft_lightning.integrations.loss import ObjectiveLoss
from deft_lightning.integrations.run import ObjectiveRun, summed
from deft_lightning.integrations.sample import sample_stats
from deft_lightning.objectives import Tracked
from deft_lightning.objectives.noise_rates import LOWEST
from deft_lightning.objectives.run_state import Begun

WHOLE_ROWS = "bfd"  # the way to pack that keeps each row together


class GateCallback(TrainerCallback, ExportableState):
    """Tells the objective of `compute_loss_func` the step, and logs what its gate does to the tokens.

    Give it to ``transformers.Trainer`` or TRL's ``SFTTrainer`` among the ``callbacks``. Objectives that change as
    training goes on need it; their state goes into the trainer's checkpoints, and a resume is exact.

    It adds to the log of the trainer, and so to TensorBoard and whatever else ``report_to`` names: `nll`, the plain NLL
    per token since the last logged step, whatever the objective; and of the tokens of the logged step, over all
    micro-batches and ranks, `gate/mean`, `gate/ess` (effective sample size), `gate/locked`, `prob/mean` and, for the
    deformed-log family, `focus/mean`. The trainer puts `train/` in front for TensorBoard. An evaluation gets
    `eval_nll`; on several ranks the rows that fill up its last batch count twice.

    `noise/estimated` is the share of answers that chance explains better than the model does, as the noise model of
    `Contaminated` sees it, and `noise/estimated_tokens` that of single tokens in the others. Under `Contaminated` they
    are its own rates, which begin with what a sample of the training answers says; otherwise word frequencies stand for
    chance: labels are counted when training begins.

    Nothing is computed for the log on steps that are not logged.

    Args:
        noise: Estimate the noise, whatever the objective.
    """

    def __init__(self, noise: bool = True) -> None:
        self.noise = noise
        self.saved: dict[str, Any] = {}  # a trainer that restores callbacks sets it; read from its state all the same
        self.watched: WatchedNoise | None = None
        self._run: ObjectiveRun | None = None
        self._hooked: Any = None
        self._unchecked = True

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, in JSON's types."""
        saved = {} if self._run is None else self._run.state_dict()
        if self.watched is not None:
            saved["noise"] = self.watched.state()
        return {"args": {"noise": self.noise}, "attributes": {"saved": saved}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Meet the trainer, whose loss may be asked for an evaluation before any training."""
        self._meet(args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stand before the first step, or where a checkpoint stood; count labels where they are asked for.

        Raises:
            UserError: The trainer's loss is another one, or an option of the trainer goes against it.
        """
        run = self._meet(args)
        _refuse(args, run)
        name, tell = type(self).__name__, state.is_world_process_zero
        saved = _saved(state.stateful_callbacks.get(name)) if state.global_step else {}
        # A run that goes on from a checkpoint without this callback would fail at its next save.
        state.stateful_callbacks.setdefault(name, self.state())
        self.watched, self._unchecked = self._watch(args, run, tell), True
        run.begin()
        if state.global_step:
            anew = run.load_state_dict(saved)
            if anew and tell:
                warnings.warn(f"GateCallback: {anew}; what {run.objective!r} keeps starts over", stacklevel=2)
            if self.watched is not None and "noise" in saved:
                self.watched.load(saved["noise"])
        if not run.counts_given and (run.counts_labels or self.watched is not None):
            self._count(run, kwargs["train_dataloader"], args.device, tell)
        run.advance(state.global_step, state.max_steps)
        tracked = run.current.tracks
        if not state.global_step and tracked is not None and tracked.sampled:
            self._sample(run, tracked, args, tell, **kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the objective how far the run is."""
        self._known.advance(state.global_step, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check on the first step that the trainer divides by what is learnt.

        Raises:
            UserError: It divides by something else.
        """
        if not self._unchecked:
            return
        self._unchecked, run = False, self._known
        own = sum((_weight(stats) for stats in run.stats), torch.zeros((), dtype=torch.float64, device=args.device))
        whole = float(summed(own))
        divisor = None if run.divisor is None else float(run.divisor)
        if divisor is None or abs(divisor - whole) > 1e-4 * whole:
            raise UserError(
                f"GateCallback: the trainer divides a step by {divisor}, but {whole:g} is what its tokens count on all"
                " ranks: keep average_tokens_across_devices=True, and put `labels` into batches"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Add up what the objective keeps of the step, over all ranks."""
        self._known.fold(skipped=bool(getattr(optimizer, "step_was_skipped", False)))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the figures of the step, or the NLL of an evaluation, to what is logged."""
        logs, run = {} if logs is None else logs, self._run
        if run is None:
            return
        more: dict[str, float] = {}
        if "loss" in logs:
            more = self._figures(run, args.device)
        elif (prefix := _prefix(logs)) not in (None, "train"):  # the summary at the end of training has a loss too
            more = _evaluated(run, f"{prefix}_nll", args.device)
        logs.update(more)
        if state.log_history:
            state.log_history[-1].update(more)  # which has a copy of the logs already

    def on_predict(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **kwargs: Any) -> None:
        """Add the NLL to the metrics of a prediction."""
        if self._run is not None and (prefix := _prefix(metrics)) is not None:
            metrics.update(_evaluated(self._run, f"{prefix}_nll", args.device))

    def _figures(self, run: ObjectiveRun, device: torch.device) -> dict[str, float]:
        """Return what is logged of a step, by tag; one all-reduce, which every rank has to make."""
        objective, parts = run.current, [_or_zeros(run.since, 2, device), torch.zeros(SIZE + 4).double().to(device)]
        for stats in run.stats:
            parts[1][:SIZE] += gate_sums(objective, stats)
            if self.watched is not None and stats.chance is not None and len(stats.log_prob):
                parts[1][SIZE:] += self.watched.sums(stats)
        sums = summed(torch.cat(parts)).tolist()
        run.since = None
        (nll, tokens), gates, noise = (sums[end - size : end] for size, end in _ends(2, SIZE, 4))
        figures = ({"nll": nll / tokens} if tokens else {}) | gate_figures(gates)
        return figures | ({} if self.watched is None else self.watched.fold(noise)) | run.logged()

    @property
    def _known(self) -> ObjectiveRun:
        assert self._run is not None  # a step comes after on_train_begin
        return self._run

    def _meet(self, args: Any) -> ObjectiveRun:
        """Find trainer, loss and model; stand in front of the loggers."""
        trainer = calling_trainer(self)
        loss = getattr(trainer, "compute_loss_func", None)
        if trainer is None or not isinstance(loss, ObjectiveLoss):
            raise UserError(
                "GateCallback: the trainer's loss is not from compute_loss_func: give both,"
                " compute_loss_func=compute_loss_func(DEFT()) and callbacks=[GateCallback()]"
            )
        callbacks, self._run, self._loss = trainer.callback_handler.callbacks, loss.run, loss
        if sum(isinstance(one, GateCallback) for one in callbacks) > 1:
            raise UserError("GateCallback: the trainer has two of them, and each would end every step; leave one out")
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))
        loss.run.attached = True
        if self._hooked is not trainer.model:
            self._hooked, run = trainer.model, loss.run
            config = getattr(trainer.model, "config", None)
            run.router_factor = (
                None if config is None else getattr(config.get_text_config(), "router_aux_loss_coef", None)
            )
            trainer.model.register_forward_pre_hook(run.note_positions, with_kwargs=True)
        parallel = getattr(trainer.accelerator, "parallelism_config", None)
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled or parallel.tp_enabled):
            raise UserError("GateCallback: context, sequence and tensor parallel are not supported; use data parallel")
        return loss.run

    def _watch(self, args: Any, run: ObjectiveRun, tell: bool) -> WatchedNoise | None:
        if not self.noise or "noise/estimated" in run.tags():
            return None
        if _whole_rows(args):
            return WatchedNoise()
        if tell:
            warnings.warn(
                f"noise/estimated is not logged: packing_strategy={args.packing_strategy!r} cuts answers into pieces",
                stacklevel=2,
            )
        return None

    def _count(self, run: ObjectiveRun, loader: Any, device: torch.device, tell: bool) -> None:
        """Count the labels; where that is not possible and only the estimate wants it, do without."""
        try:
            run.counts = label_counts(loader, device)
        except UserError as error:
            how = "give compute_loss_func(objective, label_counts=...)"
            if run.counts_labels:
                raise UserError(
                    f"GateCallback: {run.objective!r} compares with word frequencies: {error}; {how}"
                ) from None
            self.watched = None
            if tell:
                warnings.warn(f"noise/estimated is not logged: {error}; {how}", stacklevel=2)

    def _sample(self, run: ObjectiveRun, tracked: Tracked, args: Any, tell: bool, **given: Any) -> None:
        """Begin with what a sample of the training answers says, where one can be had."""
        loader = given["train_dataloader"]
        if has_places(loader.dataset):
            size = args.per_device_train_batch_size
            stats = sample_stats(self._loss, given["model"], loader, size, args.device)
            begun = Begun((), {}) if stats is None else tracked.begin(stats)
            run.memory = begun.memory
            for tag, sample in begun.found.items():
                if sample.rate is None and tell:
                    warnings.warn(sample.line(tag), stacklevel=2)
        elif tell:
            warnings.warn(f"noise rates begin at {LOWEST}: a stream has no sample of its answers", stacklevel=2)


def _refuse(args: Any, run: ObjectiveRun) -> None:
    """Refuse options of the trainer with which the objective would not be what trains."""
    if args.label_smoothing_factor:
        raise UserError("GateCallback: label_smoothing_factor does nothing beside compute_loss_func; leave it at 0")
    if run.objective.needs.example and not _whole_rows(args):
        raise UserError(
            f"GateCallback: {run.objective!r} judges whole answers, which packing_strategy="
            f"{args.packing_strategy!r} cuts into pieces; use packing_strategy={WHOLE_ROWS!r}, or"
            " Contaminated(level='token')"
        )


def _whole_rows(args: Any) -> bool:
    """Return whether every row that a model sees holds whole examples; plain trainers do not pack."""
    packing = getattr(args, "packing", False) or getattr(args, "eval_packing", False)
    return not packing or args.packing_strategy == WHOLE_ROWS


def _saved(kept: Any) -> dict[str, Any]:
    """Return what `state` gave, of what a trainer keeps for a callback; nothing where it keeps something else."""
    attributes = kept.get("attributes") if isinstance(kept, dict) else None
    saved = attributes.get("saved") if isinstance(attributes, dict) else None
    return saved if isinstance(saved, dict) else {}


def _prefix(metrics: dict[str, Any]) -> str | None:
    """Return `eval` of metrics with an `eval_loss`; every rank has the same metrics."""
    return next((name.removesuffix("_loss") for name in metrics if name.endswith("_loss")), None)


def _evaluated(run: ObjectiveRun, tag: str, device: torch.device) -> dict[str, float]:
    """Return the NLL of the evaluation that ends here, over all ranks; every rank has to call it."""
    nll, tokens = summed(_or_zeros(run.evaluated, 2, device)).tolist()
    run.evaluated = None
    return {tag: nll / tokens} if tokens else {}


def _weight(stats: Any) -> Tensor:
    if stats.weight is not None:
        return stats.weight.double().sum()
    return torch.full((), len(stats.log_prob), dtype=torch.float64, device=stats.log_prob.device)


def _or_zeros(sums: Tensor | None, size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=torch.float64, device=device) if sums is None else sums


def _ends(*sizes: int) -> list[tuple[int, int]]:
    return list(zip(sizes, accumulate(sizes), strict=True))
