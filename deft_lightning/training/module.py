"""SFTModule: a causal language model, a token objective and an optimizer, with one owner of normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from deft_lightning.errors import UserError
from deft_lightning.evaluation import Completion, Generation, Tested, complete
from deft_lightning.functional import IGNORE_INDEX, TokenStats, token_stats
from deft_lightning.metrics import TokenMeter
from deft_lightning.models import (
    HeadSeam,
    LoRA,
    add_adapters,
    base_causal_lm,
    build_sharded,
    check_causal,
    check_fits,
    check_head,
    check_packing,
    check_pretrained,
    check_state,
    compile_body,
    describe,
    find_head,
    from_architecture,
    fused_forward,
    is_sharded,
    load_pretrained,
    router_loss_factor,
    vocabulary_digest,
)
from deft_lightning.models.contents import KEY
from deft_lightning.objectives import DEFT, Objective, RunState
from deft_lightning.ops import Backend
from deft_lightning.training.optim import CosineWithWarmup, adamw
from deft_lightning.training.step import RunningMean, StepTotals, ranks
from deft_lightning.training.stepping import Stepping
from deft_lightning.trust import check_attention

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
SchedulerCallable = Callable[[Optimizer], LRScheduler]


class _Watch(NamedTuple):
    """Stands in for an objective where the statistics alone are wanted."""

    topk: int

    def __call__(self, stats: TokenStats) -> Tensor:
        return -stats.log_prob


class SFTModule(Stepping, Tested):
    """Supervised fine-tuning of a Hugging Face causal language model with any token objective.

    The gradient of an optimizer step is that of the mean loss over all its supervised tokens: all micro-batches, all
    ranks, whatever their lengths. `training_step` returns a sum; the division happens once.

    Args:
        objective: Token objective; a name of this package's, or the class path of your own.
        pretrained: Hub id or folder of a causal language model; wins over `architecture`.
        architecture: `model_type` and options of a transformers config, for random weights.
        optimizer: Called with parameter groups; biases and norms are exempt from weight decay.
        scheduler: Called with the optimizer; stepped each optimizer step.
        head: `fused` never holds the logits of a batch; `dense` uses the model's own.
        head_backend: Row kernel of the fused head: `triton` (CUDA), `torch`, or `auto`, Triton where it runs.
        lora: Train low-rank adapters only; `--model.lora.r 16` switches them on.
        dtype: Dtype the weights are loaded in. For bf16 with float32 weights use `--trainer.precision bf16-mixed`.
        attention: transformers' `attn_implementation` (sdpa, eager, flash_attention_2); default: its choice.
        gradient_checkpointing: Recompute activations in backward, to save memory.
        compile: Compile the layers of the body with torch.compile; the head stays as it is.
        on_nonfinite: What is done when a loss or gradient is not finite: `raise` stops, `skip` leaves the step out.
        generation: How `test` and `predict` generate.
        trust_remote_code: Run code that the folder or hub id of the model or the tokenizer brings along.

    Raises:
        UserError: Neither `pretrained` nor `architecture`, or a combination that would not train what was asked for.
    """

    def __init__(
        self,
        objective: Objective = DEFT(),  # noqa: B008 - frozen
        pretrained: str | None = None,
        architecture: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = adamw,
        scheduler: SchedulerCallable = CosineWithWarmup,
        head: Literal["fused", "dense"] = "fused",
        head_backend: Backend = "auto",
        lora: LoRA | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: str | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        generation: Generation = Generation(),  # noqa: B008 - frozen
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if head not in ("fused", "dense"):
            raise UserError(f"--model.head must be fused or dense, not {head!r}")
        if head_backend not in ("auto", "torch", "triton"):
            raise UserError(f"--model.head_backend must be auto, torch or triton, not {head_backend!r}")
        if on_nonfinite not in ("raise", "skip"):
            raise UserError(f"--model.on_nonfinite must be raise or skip, not {on_nonfinite!r}")
        self.on_nonfinite = on_nonfinite
        self.trust_remote_code = trust_remote_code
        check_attention(attention, trust_remote_code, "--model.attention")
        if pretrained is not None:
            check_pretrained(pretrained, trust_remote_code, attention)
        self.objective, self.pretrained, self.architecture = objective, pretrained, architecture
        self.optimizer_callable, self.scheduler_callable = optimizer, scheduler
        self.head, self.head_backend, self.compile_layers = head, head_backend, compile
        self.lora, self.dtype_name, self.attention = lora, dtype, attention
        self.gradient_checkpointing, self.generation = gradient_checkpointing, generation
        self.model: Any = None
        self._seam: HeadSeam | None = None
        self._router: float | None = None
        self._checked = False
        self._about: dict[str, Any] | None = None
        # In a plain dict, so that casting the module to bfloat16 leaves their float64 sums alone.
        self._meters = {
            "train": TokenMeter(), "val": TokenMeter(), "val_noisy": TokenMeter(), "recovered": TokenMeter(),
            "router": MeanMetric(),
        }  # fmt: skip

    # ---------------------------------------------------------------- the model

    @property
    def _datamodule(self) -> Any | None:
        return getattr(self._trainer, "datamodule", None) if self._trainer is not None else None

    @property
    def tokenizer(self) -> Any | None:
        """The data module's tokenizer, if there is one."""
        return getattr(self._datamodule, "tokenizer", None)

    @property
    def current_objective(self) -> Objective:
        """The objective in force: the chosen one as it is at this point of the run.

        It is the same for all micro-batches of an optimizer step, and for a validation after it. Outside a fit it is
        that of the end of a run, or of the checkpoint that was loaded.
        """
        return self.objective.at(self._training)

    def setup(self, stage: str) -> None:
        """Refuse strategies under which the head would not see its whole weight."""
        # A checkpoint that is loaded after this knows better.
        self._training = RunState(0.0 if stage == "fit" and self.objective.scheduled else 1.0, self._gates.mean)
        strategy = self.trainer.strategy
        known = isinstance(strategy, DDPStrategy) or getattr(strategy, "shards_weights", False)
        if not known and not type(strategy).__name__.startswith("SingleDevice"):
            raise UserError(
                f"{type(strategy).__name__} is not supported: use --trainer.strategy auto, ddp, or fsdp2 (sharded)"
            )

    def configure_model(self) -> None:
        """Build or load the model; Lightning calls this once the data is known."""
        if self.model is not None:
            return
        strategy: Any = self._trainer.strategy if self._trainer is not None else None
        if getattr(strategy, "shards_weights", False):
            mesh = strategy.device_mesh["data_parallel"]
            model = build_sharded(self._build, mesh, strategy.root_device, strategy.low_precision)
        else:
            model = self._build()
        self._seam = find_head(model, self.head_backend) if self.head == "fused" else None
        self._router = router_loss_factor(model)
        if self.compile_layers:
            compile_body(model)
        self.model = model

    def _build(self) -> Any:
        """Build or load the model, in train mode; on the meta device its weights hold nothing."""
        if self.pretrained is not None:
            model = load_pretrained(self.pretrained, self.dtype_name, self.attention, self.trust_remote_code)
        elif self.architecture is not None:
            model = from_architecture(self.architecture, self.tokenizer, self.dtype_name, self.attention)
        else:
            raise UserError("no model: set --model.pretrained ID_OR_DIR, or --model.architecture.* for random weights")
        check_fits(model, self.tokenizer, getattr(self._datamodule, "longest", 0))
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model if self.lora is None else add_adapters(model, self.lora)

    # ---------------------------------------------------------------- loss

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Return the model's own output, logits included."""
        return self.model(input_ids=input_ids, use_cache=False, **kwargs)

    def loss_and_stats(self, batch: dict[str, Any]) -> tuple[Tensor, TokenStats, Tensor]:
        """Return the summed loss, the statistics of the supervised tokens, and where they are.

        Args:
            batch: ``input_ids`` and ``labels`` of shape ``(B, T)``, right-padded; ``labels[:, t]`` is what the model
                should have said before token t, -100 where nothing is learnt. ``position_ids`` that start again keep
                examples of a packed row apart.

        Returns:
            The sum of the objective over the N supervised tokens, their detached statistics, and the mask
            ``(B, T - 1)`` of positions whose next token is supervised. Without any, the sum is a zero that is part of
            the graph. The router's loss of a mixture of experts is added, times its factor and N.
        """
        loss, stats, keep, router = self._terms(batch)
        return (loss if router is None else loss + router), stats, keep

    @torch.no_grad()
    def statistics(self, batch: dict[str, Any], topk: int = 0) -> tuple[TokenStats, Tensor]:
        """Return the statistics of the supervised tokens and where they are, whatever the objective; no gradient.

        Args:
            batch: As for :meth:`loss_and_stats`.
            topk: Also the entropy of that many largest probabilities.
        """
        _, stats, keep, _ = self._terms(batch, _Watch(topk))
        return stats, keep

    def _terms(
        self, batch: dict[str, Any], watch: _Watch | None = None
    ) -> tuple[Tensor, TokenStats, Tensor, Tensor | None]:
        """Objective, statistics, their places, and the router's loss if there is one: all sums over tokens."""
        objective: Any = self.current_objective if watch is None else watch
        input_ids, targets = batch["input_ids"], batch["labels"][:, 1:]
        if not self._checked:
            _check_batch(batch)
            # Repeated, lest a short batch pass unchecked, or one rank run the model less often than the others.
            few = input_ids.repeat(1, 4)[:, : max(4, input_ids.shape[1])]
            check_causal(self.model, few)
            if "position_ids" in batch:
                check_packing(self.model, few)
            if self._seam is not None:
                check_head(self.model, self._seam, few, self.current_objective)
            self._checked = True
        keep = targets != IGNORE_INDEX
        # No attention mask: behind right padding causal attention cannot see it, and SDPA takes its fast path. A
        # router would count the padding.
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if "position_ids" in batch:
            inputs["position_ids"] = batch["position_ids"]
        elif self._router is not None:
            inputs["attention_mask"] = batch.get("attention_mask")
        if self._seam is None:
            output = self.model(**inputs)
            stats = token_stats(output.logits[:, :-1][keep], targets[keep], topk=objective.topk)
            loss, aux = objective(stats).sum(), getattr(output, "aux_loss", None)
        else:
            shifted = torch.nn.functional.pad(targets, (0, 1), value=IGNORE_INDEX)
            loss, stats, aux = fused_forward(self.model, self._seam, inputs, shifted, objective)
        if self._router is None:
            return loss, stats.detach(), keep, None
        if aux is None:
            raise UserError(
                f"{type(base_causal_lm(self.model)).__name__} gives no auxiliary loss though its config says"
                " output_router_logits; set it to false (--model.architecture.output_router_logits false)"
            )
        tokens = len(stats.log_prob)
        if torch.is_grad_enabled():
            self._meters["router"].update(aux.detach(), max(tokens, 1e-9))
        return loss, stats.detach(), keep, self._router * tokens * aux

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return the summed loss, and detached statistics for the callbacks that watch."""
        loss, stats, keep, router = self._terms(batch)
        self._meters["train"].update(loss, stats)
        if (tracked := self.current_objective.tracks) is not None:
            self._totals.weigh(tracked.objective.gate(stats))
        self._totals.watch(batch.get("example_id", ()), loss)
        return {"loss": loss if router is None else loss + router, "stats": stats, **_noise_of(batch, keep)}

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Add a batch to the validation sums; the NLL is plain whatever the objective.

        A second loader has corrupted examples: of them the corrupted tokens alone count.
        """
        loss, stats, keep, _ = self._terms(batch)
        if dataloader_idx == 0:
            self._meters["val"].update(loss, stats)
        else:
            codes, clean = _noise_of(batch, keep).values()
            assert codes is not None and stats.arg_max is not None
            zero, clean = loss.new_zeros(()), torch.full_like(codes, IGNORE_INDEX) if clean is None else clean
            self._meters["val_noisy"].update(zero, stats.select(codes > 0))
            # The same sums with the clean label in place of the corrupted one, where it is known.
            found = stats._replace(correct=stats.arg_max == clean).select((codes > 0) & (clean != IGNORE_INDEX))
            self._meters["recovered"].update(zero, found)
        return {"stats": stats}

    # ---------------------------------------------------------------- what is logged

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the exact token-weighted means since the last logged step, on every rank alike."""
        loop = self.trainer.fit_loop
        if loop._should_accumulate() or not self.trainer._logger_connector.should_update_logs:
            return
        means = self._meters["train"].compute()
        self._meters["train"].reset()
        means.pop("tokens")
        if not bool(torch.isfinite(means["nll"]) & torch.isfinite(means["loss"])):
            raise UserError(
                f"the loss is not finite at step {self.trainer.global_step}: lower --model.optimizer.lr, or use"
                " --trainer.precision bf16-mixed instead of 16 bits"
            )
        self.log_dict({"train/loss": means.pop("loss"), "train/nll": means.pop("nll")}, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in means.items()})
        if self._router is not None:
            self.log("train/router_loss", self._meters["router"].compute())
            self._meters["router"].reset()
        self.log("train/tokens", float(self.tokens_seen))
        if self.on_nonfinite == "skip":
            self.log("train/skipped_steps", float(self.skipped))
        self.log("train/lr", self._rate)
        if self.objective.tracks is not None:
            self.log("objective/scale", self._training.scale)
        if self._grad_norm is not None:
            self.log("train/grad_norm", self._grad_norm)

    def on_validation_epoch_end(self) -> None:
        """Log the validation means; they are already global, so no rank averages them again."""
        means = self._meters["val"].compute()
        self._meters["val"].reset()
        for name in ("loss", "nll", "ppl", "token_accuracy"):
            self.log(f"val/{name}", means[name], prog_bar=name == "nll", sync_dist=True)
        if len(self.trainer.num_val_batches) < 2:
            return
        noisy = self._meters["val_noisy"].compute()
        self._meters["val_noisy"].reset()
        if noisy["tokens"] > 0:
            self.log("val_noisy/nll", noisy["nll"], sync_dist=True)
            # Share of the corrupted labels that the model gives as its first choice: what it has memorised.
            self.log("val_noisy/reproduced", noisy["token_accuracy"], sync_dist=True)
        found = self._meters["recovered"].compute()
        self._meters["recovered"].reset()
        if found["tokens"] > 0:
            # Share of them whose clean label is the first choice: what it has seen through.
            self.log("val_noisy/recovered", found["token_accuracy"], sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and the schedule; plan the schedule over the trainer's optimizer steps."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim >= 2]},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        try:
            optimizer = self.optimizer_callable([group for group in groups if group["params"]])
        except (ValueError, TypeError) as error:
            raise UserError(f"--model.optimizer: {error}") from None
        try:
            scheduler = self.scheduler_callable(optimizer)
        except (ValueError, TypeError) as error:
            raise UserError(f"--model.scheduler: {error}") from None
        if isinstance(scheduler, CosineWithWarmup) and scheduler.total_steps is None:
            scheduler.plan(self._planned_steps("the schedule"))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _planned_steps(self, what: str) -> int:
        """Return the number of optimizer steps of the run, for something that needs it."""
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps) or steps < 0:
            raise UserError(f"{what} needs an end: set --trainer.max_epochs or --trainer.max_steps")
        return int(steps)

    # ---------------------------------------------------------------- generation

    def generate(self, batch: dict[str, Any], longest: int = 0) -> list[list[Completion]]:
        """Complete the left-padded prompts of a batch; one list of samples for each, none for a filler."""
        if self.tokenizer is None or self._datamodule is None:
            raise UserError("generation needs the data module's tokenizer")
        stops, together = self._datamodule.stop_token_ids, ranks() > 1 and is_sharded(self.model)
        found = complete(self.model, self.tokenizer, batch, self.generation, stops, longest=longest, together=together)
        return [] if batch.get("filler") else found

    # ---------------------------------------------------------------- state

    def _meters_to_device(self) -> None:
        self._meters = {name: meter.to(self.device) for name, meter in self._meters.items()}

    def on_fit_start(self) -> None:
        """Put the sums where the tokens are; forget the micro-batches of a fit that was interrupted."""
        self._meters_to_device()
        self._totals = StepTotals()
        if self.objective.scheduled:
            self._steps = self._planned_steps(repr(self.objective))

    def on_validation_start(self) -> None:
        """Put the sums where the tokens are."""
        self._meters_to_device()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `export` needs, so that a checkpoint stands alone."""
        if self._about is None:
            stops = self._datamodule.stop_token_ids if self._datamodule is not None else []
            self._about = describe(self.model, self.tokenizer, self.lora, stops)
        checkpoint[KEY] = {
            **self._about, "objective": repr(self.objective), "tokens_seen": self.tokens_seen,
            "training": list(self._training), "gates": [self._gates.total, self._gates.tokens],
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another model or vocabulary than the checkpoint's; go on counting tokens and steps."""
        if "state_dict" in checkpoint:  # a sharded model has loaded its weights already
            check_state(self.model, checkpoint["state_dict"])
        known = checkpoint.get(KEY, {}).get("vocabulary")
        if self.tokenizer is not None and known is not None and known != vocabulary_digest(self.tokenizer):
            raise UserError(
                "the tokenizer is not the one the checkpoint was trained with: a tokenizer built from the data changes"
                " with --data.source and its split; name one with --data.tokenizer, for example the run's export folder"
            )
        self._training = RunState(*checkpoint.get(KEY, {}).get("training", self._training))
        self._gates = RunningMean(*checkpoint.get(KEY, {}).get("gates", ()))
        self._seen_before, self._seen = int(checkpoint.get(KEY, {}).get("tokens_seen", 0)), None


def _noise_of(batch: dict[str, Any], keep: Tensor) -> dict[str, Tensor | None]:
    """Return noise codes and clean labels of the supervised tokens; None where the batch has none."""
    found = {name: batch.get(name) for name in ("noise_code", "clean_labels")}
    if all(field is None for field in found.values()):
        return found
    at = keep.nonzero(as_tuple=True)  # a device is waited for once
    return {name: None if field is None else field[:, 1:][at] for name, field in found.items()}


def _check_batch(batch: dict[str, Any]) -> None:
    """Refuse what this version would ignore in a batch of a user's own loader."""
    mask = batch.get("attention_mask")
    if mask is not None and bool((mask.diff(dim=1) > 0).any()):
        raise UserError("the batch is left-padded: training wants right padding (padding_side='right')")
