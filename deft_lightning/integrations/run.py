"""Where the run of another trainer stands, as far as its objective has to know, and what the run keeps for it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenContext, TokenStats
from deft_lightning.objectives import Objective, RunState
from deft_lightning.objectives.context import ContextSource, unigram_log_prob

CALLBACK = "deft_lightning.integrations.GateCallback() to the trainer's callbacks"
FROM_COUNTS = {"unigram", "least"}  # chances for which the labels of the training data are counted
FROM_MODEL = {"marginal", "least"}  # those for which the model's mean prediction is followed


class ObjectiveRun:
    """The state of a run that is told to its objective: the same for all micro-batches and ranks of an optimizer step.

    :class:`GateCallback` calls :meth:`begin`, :meth:`advance` and :meth:`fold`; the loss calls the rest.

    Args:
        objective: The one that trains.
        counts: How often each token is a label of the training data, shape ``(n,)``; None where nobody has counted.

    Attributes:
        counts_given: Whether `counts` were given, so that nobody is to count.
        state: In force; None until a callback has told it.
        attached: Whether a callback is there that will.
        memory: What the objective tracks, over the steps so far; empty before the first.
        position_ids: Of the batch in hand, where the model was given any.
        router_factor: Factor on the auxiliary loss of a mixture of experts; None where nobody has told it.
        stats: Statistics of the micro-batches of the step in hand, detached.
        divisor: What the trainer divides the step in hand by.
        since: Sum of the NLL and number of tokens since the last logged step, float64; None before the first token.
        evaluated: The same of the evaluation in hand.
    """

    def __init__(self, objective: Objective, counts: Tensor | None = None) -> None:
        self.objective, self.counts, self.counts_given = objective, counts, counts is not None
        self.state: RunState | None = None
        self.attached = False
        self.position_ids: Tensor | None = None
        self.router_factor: float | None = None
        self.begin()

    def begin(self) -> None:
        """Stand before the first step of a run."""
        self.memory: tuple[float, ...] = ()
        self.stats: list[TokenStats] = []
        self.divisor: Tensor | None = None
        self.since: Tensor | None = None
        self.evaluated: Tensor | None = None
        self._sums: Tensor | None = None
        self._context: ContextSource | None = None
        self._mean: Tensor | None = None

    @property
    def current(self) -> Objective:
        """Return the objective in force; before a run that of the end of one.

        Raises:
            UserError: It changes as training goes on, and nobody has told how far that is.
        """
        if self.state is not None:
            return self.objective.at(self.state)
        if not self.attached and (self.objective.scheduled or self.objective.tracks is not None):
            raise UserError(f"compute_loss_func: {self.objective!r} changes during training: add {CALLBACK}")
        return self.objective.at(RunState())

    @property
    def counts_labels(self) -> bool:
        """Return whether the objective compares with how frequent labels are in the training data."""
        return bool({self.objective.needs.chance, self.objective.needs.answer_chance} & FROM_COUNTS)

    def advance(self, step: int, steps: int) -> None:
        """Stand before an optimizer step, of which there have been ``step`` of ``steps``."""
        progress = min(step / max(steps, 1), 1.0) if self.objective.scheduled else 1.0
        tracked = self.objective.tracks
        self.state = RunState(progress) if tracked is None else tracked.told(self.memory, progress)
        self.stats, self._sums, self.divisor = [], None, None

    def context(self, batch: dict[str, Any], vocabulary: int) -> TokenContext:
        """Return what is known of the tokens of a batch beside the prediction.

        Args:
            batch: As for :class:`~deft_lightning.objectives.context.ContextSource`.
            vocabulary: Number of tokens.

        Raises:
            UserError: The objective looks at word frequencies, and nobody has counted; or at whole answers, and nobody
                tells where they begin.
        """
        if self._context is None:
            if self.counts is None and self.counts_labels:
                raise UserError(
                    f"compute_loss_func: {self.objective!r} compares with label frequencies: add {CALLBACK},"
                    " which counts them when training begins, or give compute_loss_func(objective, label_counts=...)"
                )
            counts = None if self.counts is None or not self.counts.sum() else self.counts.cpu()
            unigram = None if counts is None else unigram_log_prob(counts, vocabulary)
            self._context = ContextSource(self.objective, unigram, vocabulary)
            if self._mean is not None:
                self._context.load_state_dict({"marginal": self._mean.tolist()})
        return self._context(batch)

    def add(self, stats: TokenStats, logits: Tensor, keep: Tensor, divisor: Tensor | None) -> None:
        """Take note of a micro-batch of training, of its N learnt tokens.

        Args:
            stats: Detached.
            logits: Shape ``(..., V)``.
            keep: Which of them are those of learnt tokens, shape ``(...)``.
            divisor: What the trainer divides the step by.
        """
        predictions = None if self._context is None else self._context.prediction_sum
        if predictions is not None:
            predictions += logits.detach()[keep].float().softmax(-1).sum(0)
        if self.state is None:
            return  # nobody tells when a step begins
        self.stats.append(stats)
        self.divisor = divisor
        self.since = _added(self.since, nll_sums(stats))
        if (tracked := self.current.tracks) is not None:
            self._sums = _added(self._sums, tracked.sums(stats))

    def note_positions(self, module: Any, given: Any, named: Mapping[str, Any]) -> None:
        """Take note of the positions that the model is given, before its forward pass: a hook of the model."""
        self.position_ids = named.get("position_ids")

    def add_evaluated(self, stats: TokenStats) -> None:
        """Take note of a batch of an evaluation."""
        self.evaluated = _added(self.evaluated, nll_sums(stats))

    def fold(self, skipped: bool) -> None:
        """End an optimizer step; every rank has to call it.

        Args:
            skipped: Whether the weights were left as they are, as a loss scaler does.
        """
        tracked = self.current.tracks
        if tracked is not None and self._sums is not None:
            sums = summed(self._sums)
            if not skipped and bool(torch.isfinite(sums).all()):
                self.memory = tracked.fold(self.memory, sums.tolist())
        if self._context is not None:
            self._context.end_step(skipped)

    def logged(self) -> dict[str, float]:
        """Return what is logged of what the run keeps for its objective, by tag."""
        tracked = self.objective.tracks
        return {} if tracked is None or self.state is None else tracked.logged(self.state)

    def tags(self) -> tuple[str, ...]:
        """Return the tags of what is logged of what the run keeps, before there is anything to log."""
        tracked = self.objective.tracks
        return () if tracked is None else tuple(tracked.logged(tracked.told((), 1.0)))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, in JSON's types; floats are kept to the bit."""
        mean = self._mean if self._context is None else self._context.state_dict().get("marginal")
        packed = None if mean is None else torch.as_tensor(mean, dtype=torch.float64).numpy().tobytes()
        return {
            "objective": repr(self.objective), "memory": list(self.memory),
            "marginal": None if packed is None else base64.b64encode(packed).decode(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> str:
        """Go on from a checkpoint.

        Returns:
            Why what the run keeps for its objective begins anew, in words; empty if it does not, or nothing is kept.

        Raises:
            UserError: The checkpoint says something that cannot be used.
        """
        self.begin()
        needs = self.objective.needs
        if self.objective.tracks is None and not FROM_MODEL & {needs.chance, needs.answer_chance}:
            return ""
        if state.get("objective") != repr(self.objective):
            return f"the checkpoint is of {state.get('objective', 'a run without GateCallback')}"
        try:
            self.memory = tuple(float(value) for value in state["memory"])
            if (packed := state["marginal"]) is not None:
                raw = bytearray(base64.b64decode(packed, validate=True))
                self._mean = torch.frombuffer(raw, dtype=torch.float64).clone()
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise UserError(f"GateCallback: its state in trainer_state.json cannot be used ({error})") from None
        return ""


def nll_sums(stats: TokenStats) -> Tensor:
    """Return the sum of the plain NLL of tokens, in nats, and their number: shape ``(2,)``, float64."""
    count = torch.full((), len(stats.log_prob), dtype=torch.float64, device=stats.log_prob.device)
    return torch.stack([-stats.log_prob.sum(dtype=torch.float64), count])


def summed(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks; every rank has to call it."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def _added(sums: Tensor | None, more: Tensor) -> Tensor:
    return more if sums is None else sums + more
