"""Sums of training and validation, and the means that are logged of them: exact over micro-batches, steps and ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX
from deft_lightning.metrics import SourceSums, TokenMeter, TokenSources
from deft_lightning.ops import ColumnSparsity
from deft_lightning.training.head_sparsity import log_head
from deft_lightning.training.loss import StepOutput, TokenFacts

Log = Callable[..., None]  # LightningModule.log


class Meters:
    """What is added up between two logged steps, and over a validation.

    No part of the module: casting that to bfloat16 leaves these float64 sums alone.
    """

    def __init__(self) -> None:
        self.train, self.val, self.val_noisy, self.recovered = (TokenMeter() for _ in range(4))
        self.router = MeanMetric()
        self.train_by_source: SourceSums | None = None
        self.val_by_source: SourceSums | None = None
        self.val_noisy_by_source: SourceSums | None = None
        self.forgetting: SourceSums | None = None  # None until predictions are compared with a reference's
        self.sparsity: ColumnSparsity | None = None  # of the head, where it leaves columns out
        self._routed = self._weighted = False

    def to(self, device: torch.device) -> None:
        """Put the sums where the tokens are."""
        for name, meter in vars(self).items():
            if isinstance(meter, Metric):
                setattr(self, name, meter.to(device))

    def add_training(self, output: StepOutput, facts: TokenFacts) -> None:
        """Add a micro-batch of training."""
        self.train.update(output.loss, output.stats)
        self.train_by_source = _added(self.train_by_source, output, facts.get("sources"))
        self._weighted |= output.stats.weight is not None
        if output.router is not None:
            self._routed = True
            weight = output.stats.weight
            count = max(len(output.stats.log_prob), 1e-9) if weight is None else weight.sum().clamp_min(1e-9)
            self.router.update(output.router.mean, count)

    def add_validation(self, output: StepOutput, facts: TokenFacts, corrupted: bool) -> None:
        """Add a batch of validation examples; the NLL is plain whatever the objective.

        Args:
            output: Of the batch.
            facts: What is known of its tokens.
            corrupted: Whether the examples are corrupted ones: of them the corrupted tokens alone count.
        """
        if not corrupted:
            self.val.update(output.loss, output.stats)
            self.val_by_source = _added(self.val_by_source, output, facts.get("sources"))
            self._add_forgetting(output)
            return
        codes, clean = facts["noise_code"], facts["clean_labels"]
        stats, zero = output.stats, output.loss.new_zeros(())
        assert codes is not None and stats.arg_max is not None
        clean = torch.full_like(codes, IGNORE_INDEX) if clean is None else clean
        self.val_noisy.update(zero, stats.select(codes > 0))
        self.val_noisy_by_source = _added(self.val_noisy_by_source, output, facts.get("sources"), codes > 0)
        # The same sums with the clean label in place of the corrupted one, where it is known.
        seen_through = stats._replace(correct=stats.arg_max == clean)
        self.recovered.update(zero, seen_through.select((codes > 0) & (clean != IGNORE_INDEX)))

    def _add_forgetting(self, output: StepOutput) -> None:
        """Add the KL of every token to the reference, if there is one."""
        if (apart := output.stats.reference_kl) is None:
            return
        if self.forgetting is None:
            self.forgetting = SourceSums(("all",), 2).to(apart.device)
        places = torch.zeros_like(apart, dtype=torch.long)
        self.forgetting.update(places, apart, torch.ones_like(apart), counted=torch.isfinite(output.loss.detach()))

    def log_training(self, log: Log, step: int) -> dict[str, float]:
        """Log the means over tokens since the last call, on every rank alike, and begin anew.

        Returns:
            What is to be written for this step alone, by tag: Lightning would repeat a logged mean of a source on steps
            that have no token of it.

        Raises:
            UserError: They are not finite.
        """
        means = _taken(self.train)
        means.pop("tokens")
        weight = means.pop("weight")
        if not bool(torch.isfinite(means["nll"]) & torch.isfinite(means["loss"])):
            raise UserError(
                f"the loss is not finite at step {step}: lower --model.optimizer.lr, or use"
                " --trainer.precision bf16-mixed instead of 16 bits"
            )
        for name in ("loss", "nll"):
            log(f"train/{name}", means.pop(name), prog_bar=True)
        for name, value in means.items():
            log(f"train/{name}", value)
        if self._weighted:
            log("train/weight", weight)
        if self._routed:
            log("train/router_loss", _taken(self.router))
        log_head(log, self.sparsity)
        return _by_source("train", self.train_by_source)

    def log_validation(self, log: Log, corrupted: bool) -> dict[str, Tensor]:
        """Log the validation means, and return them by tag; they are already global, so no rank averages them again.

        Args:
            log: Of the module.
            corrupted: Whether there is a loader of corrupted examples.
        """
        means = _taken(self.val)
        values = {f"val/{name}": means[name] for name in ("loss", "nll", "ppl", "token_accuracy")}
        if corrupted:
            noisy, recovered = _taken(self.val_noisy), _taken(self.recovered)
            if noisy["tokens"] > 0:
                # Share of the corrupted labels that the model gives as its first choice: what it has memorised.
                values |= {"val_noisy/nll": noisy["nll"], "val_noisy/reproduced": noisy["token_accuracy"]}
            if recovered["tokens"] > 0:
                # Share of them whose clean label is the first choice: what it has seen through.
                values["val_noisy/recovered"] = recovered["token_accuracy"]
        if self.forgetting is not None:
            ((apart, tokens),) = _taken(self.forgetting)
            if tokens > 0:
                values["forgetting/kl"] = apart / tokens
        by_source = _by_source("val", self.val_by_source)
        if corrupted:
            by_source |= _by_source("val_noisy", self.val_noisy_by_source)
        values |= {tag: means["nll"].new_tensor(nll) for tag, nll in by_source.items()}
        for tag, value in values.items():
            log(tag, value, prog_bar=tag == "val/nll", sync_dist=True)
        return values


def _added(
    sums: SourceSums | None, output: StepOutput, sources: TokenSources | None, among: Tensor | None = None
) -> SourceSums | None:
    """Add NLL and count of tokens to the sums of their sources, which are made when the first tokens have some.

    Args:
        sums: So far.
        output: Of a batch.
        sources: Of its tokens.
        among: Shape ``(N,)``: the tokens that count; default: all.
    """
    if sources is None:
        return sums
    if sums is None or sums.names != sources.names:
        sums = SourceSums(sources.names, 2).to(output.loss.device)
    nll = -output.stats.log_prob
    # As in the means over all: such a micro-batch is not counted, its step is skipped.
    ones = torch.ones_like(nll)
    if among is not None:
        nll, ones = torch.where(among, nll, 0), ones * among
    sums.update(sources.places, nll, ones, counted=torch.isfinite(output.loss.detach()))
    return sums


def _by_source(prefix: str, sums: SourceSums | None) -> dict[str, float]:
    """Return the mean NLL of every source that has tokens, by tag, and begin anew."""
    if sums is None:
        return {}
    rows = zip(sums.names, _taken(sums).tolist(), strict=True)
    return {f"{prefix}/{name}/nll": nll / tokens for name, (nll, tokens) in rows if tokens}


def _taken(meter: Metric) -> Any:
    """Return what a meter has added up, and empty it."""
    value = meter.compute()
    meter.reset()
    return value
