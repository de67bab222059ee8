"""SFTModule: a causal language model, a token objective and an optimizer; each hook a line or few to a part it owns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, Self

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from deft_lightning._lightning import is_accumulating, is_logging_step, log_now, trainer_of
from deft_lightning.annotations import Batch, CausalLM, Checkpoint
from deft_lightning.evaluation import Completion, Evaluator, Generation, prediction_records
from deft_lightning.evaluation.ahead import asks_ahead
from deft_lightning.functional import TokenStats
from deft_lightning.models import LoRA, check_state, describe, is_sharded, save_hugging_face
from deft_lightning.models.contents import KEY
from deft_lightning.objectives import DEFT, Needs, Objective
from deft_lightning.objectives.parse import as_objective
from deft_lightning.ops import Backend
from deft_lightning.training.base_weights import BaseWeights
from deft_lightning.training.by_source import by_source
from deft_lightning.training.card_facts import CARD, facts_of_run
from deft_lightning.training.context import context_of
from deft_lightning.training.course import Course
from deft_lightning.training.distributed import ranks
from deft_lightning.training.first_rates import begin_rates
from deft_lightning.training.gradient_hooks import shows_gradients
from deft_lightning.training.head_sparsity import Sparsity, tell_head
from deft_lightning.training.hyper_parameters import hyper_parameters
from deft_lightning.training.loss import NoObjective, facts_of
from deft_lightning.training.memory.advice import tell_memory
from deft_lightning.training.meters import Meters
from deft_lightning.training.model_checks import check_precision, check_vocabulary
from deft_lightning.training.model_source import ModelSource
from deft_lightning.training.nonfinite import OnNonfinite
from deft_lightning.training.normaliser import StepNormaliser
from deft_lightning.training.optim import CosineWithWarmup, adamw
from deft_lightning.training.optimizers import make_optimizer, step_plateaus
from deft_lightning.training.protocols import PromptSource, check_strategy, computes_loss, stop_tokens_of, test_sets_of
from deft_lightning.training.restored import restored
from deft_lightning.training.seeding import reseed
from deft_lightning.training.unprompted import put_in_company, settle_unprompted

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
SchedulerCallable = Callable[[Optimizer], LRScheduler]


class SFTModule(LightningModule):
    """Supervised fine-tuning of a Hugging Face causal language model with any token objective.

    The gradient of an optimizer step is that of the mean loss over all its supervised tokens, by weight where they have
    any: all micro-batches, all ranks, whatever lengths. `training_step` returns a sum; the division happens once.
    From Python, `pretrained` may be a transformers model itself, which is trained in place, and `objective` a name.

    Args:
        objective: Token objective; a name of this package's, or the class path of your own.
        pretrained: Hub id or folder of a causal language model, or `deft:speller`, the quickstart's; wins over
            `architecture`.
        architecture: `model_type` and options of a transformers config, for random weights.
        optimizer: Called with parameter groups; biases and norms are exempt from weight decay.
        scheduler: Called with the optimizer; stepped each optimizer step. `null` is a constant rate.
        head: `fused` never holds the logits of a batch; `dense` uses the model's own.
        head_backend: Row kernel of the fused head: `triton` (CUDA), `torch`, or `auto`, Triton where it runs.
        head_sparsity: `off`, `auto`, or the share of the logits' gradient that may be left out.
        lora: Train low-rank adapters only; `--model.lora.r 16` switches them on.
        dtype: Dtype the weights are loaded in. For bf16 with float32 weights use `--trainer.precision bf16-mixed`.
        attention: transformers' `attn_implementation` (sdpa, eager, flash_attention_2); default: its choice.
        gradient_checkpointing: Recompute activations in backward, to save memory.
        compile: Compile the layers of the body with torch.compile; the head stays as it is.
        on_nonfinite: Action on a loss or gradient that is not finite: `raise` stops, `skip` leaves the step out.
        generation: How `test` and `predict` generate.
        trust_remote_code: Run code that the folder or hub id of the model or the tokenizer brings along.
        add_tokens: Spellings that become tokens, `'[<tool>, </tool>]'`; their rows begin at the mean of the others.
        resize_vocabulary: Give the model rows for tokens of its tokenizer that it has none for.
        quantization: Hold the frozen base of adapters in 4 bits (`nf4`) or 8 bits (`int8`): QLoRA. Needs `lora`, and
            the packages of `deft-lightning[qlora]`.
        compute_dtype: Dtype of the products with a 4-bit base; default: by the precision.
        forgetting: Log `forgetting/kl` with every validation: how far predictions are from those before training.

    Raises:
        UserError: Neither `pretrained` nor `architecture`, or a combination that would not train what was asked for.
    """

    def __init__(
        self,
        objective: Objective = DEFT(),  # noqa: B008 - frozen; from Python also its name
        pretrained: str | None = None,  # or a model: the command line knows names alone
        architecture: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = adamw,
        scheduler: SchedulerCallable | None = CosineWithWarmup,
        head: Literal["fused", "dense"] = "fused",
        head_backend: Backend = "auto",
        head_sparsity: Sparsity = "auto",
        lora: LoRA | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: str | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        on_nonfinite: OnNonfinite = "raise",
        generation: Generation = Generation(),  # noqa: B008 - frozen
        trust_remote_code: bool = False,
        add_tokens: list[str] | None = None,
        resize_vocabulary: bool = False,
        forgetting: bool = False,
        quantization: Literal["nf4", "int8"] | None = None,
        compute_dtype: Literal["float32", "bfloat16"] | None = None,
    ) -> None:
        head_sparsity = "off" if head_sparsity is False else head_sparsity
        given = {**locals(), "objective": (objective := as_objective(objective))}
        super().__init__()
        self.source = ModelSource.of(given)
        self.objective, self.pretrained, self.architecture = objective, self.source.name, architecture
        self.optimizer_callable, self.scheduler_callable = optimizer, scheduler
        self.head, self.head_backend, self.compile_layers = head, head_backend, compile
        self.lora, self.dtype_name, self.attention = self.source.lora, dtype, attention
        self.gradient_checkpointing, self.generation = gradient_checkpointing, generation
        self.on_nonfinite, self.trust_remote_code, self.add_tokens = on_nonfinite, trust_remote_code, add_tokens
        self.forgetting, self.quantization, self.compute_dtype = forgetting, self.source.quantization, compute_dtype
        self.save_hyperparameters(
            hyper_parameters({**given, "pretrained": self.pretrained, "quantization": self.quantization})
        )
        self.normaliser, self.meters, self.evaluator = StepNormaliser(on_nonfinite), Meters(), Evaluator(generation)
        self.base_weights = BaseWeights(self.source)
        self.model: Any = None
        self.batch_loss: Any = None
        self.own_tokenizer: Any = None  # of a checkpoint that the module was made of
        self.card_facts: Any = None  # likewise
        self.lr: float | None = None  # set by Lightning's lr_find: the peak in place of the optimizer's own
        self.stop_asked = self.stop_agreed = False
        self.watched_needs = Needs()  # of callbacks
        self.course, self._about = Course(), dict[str, Any]()

    @property
    def prompts(self) -> PromptSource | None:
        """Return the data module, if there is one."""
        return getattr(trainer_of(self), "datamodule", None)

    @property
    def tokenizer(self) -> Any | None:
        """Return the data module's tokenizer, if there is one, else that of a checkpoint the module was made of."""
        return getattr(self.prompts, "tokenizer", None) or self.own_tokenizer

    @property
    def current_objective(self) -> Objective:
        """Return the objective in force: the chosen one as it is at this point of the run.

        It is the same for all micro-batches of an optimizer step, and for a validation after it. Outside a fit it is
        that of the end of a run, or of the checkpoint that was loaded.
        """
        return self.objective.at(self.course.state)

    @property
    def tokens_seen(self) -> int:
        """Return the number of supervised tokens trained on so far, on all ranks."""
        return self.normaliser.tokens_seen

    @property
    def skipped(self) -> int:
        """Return the number of steps left out so far because their loss or gradient was not finite."""
        return self.normaliser.guard.skipped

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, **arguments: Any) -> Self:  # type: ignore[override]
        """Return a module with the model and the settings of a checkpoint: a file, or a folder of shares.

        Arguments win over its settings. Nothing that it names is imported: give an objective of your own.
        """
        return restored(cls, checkpoint_path, map_location, arguments)

    def configure_callbacks(self) -> list[Callback]:
        """Settle the tokenizer of a model that was given, before data is prepared with another; add no callback."""
        self.source.settle_tokenizer(self.prompts, self.own_tokenizer)
        return []

    def setup(self, stage: str) -> None:
        """Refuse strategies under which the head would not see its whole weight; begin the objective's course."""
        check_strategy(self.trainer.strategy)
        check_precision(self.quantization, self.trainer.strategy)
        if stage in ("fit", "validate"):
            self.objective = by_source(self.objective, self.prompts)
        self.course.begin(self.objective, stage == "fit", self.normaliser.memory)

    def configure_model(self) -> None:
        """Build or load the model; Lightning calls this once the data is known."""
        if self.model is None:
            trainer = trainer_of(self)
            compared = (self.objective.needs.reference or self.forgetting) and computes_loss(trainer)
            strategy = getattr(trainer, "strategy", None)
            self.model, self.batch_loss = self.source.place(self._build, strategy, compared)
            self.batch_loss.forgetting, self.meters.sparsity = self.forgetting, self.batch_loss.sparsity
        before, self.batch_loss.context = (
            self.batch_loss.context,
            context_of(self.objective, self.model, self.prompts, self.watched_needs),
        )
        self.batch_loss.context.go_on_from(before)
        put_in_company(self, self.prompts)
        tell_memory(self)

    def _build(self) -> CausalLM:
        prompts = self.prompts
        return self.source.build(self.tokenizer, getattr(prompts, "longest", 0), getattr(prompts, "added_tokens", ()))

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Return the model's own output, logits included."""
        return self.model(input_ids=input_ids, use_cache=False, **kwargs)

    def loss_and_stats(self, batch: Batch) -> tuple[Tensor, TokenStats, Tensor]:
        """Return the sum of the objective, the statistics of the N supervised tokens, and where they are.

        The router's loss of a mixture of experts is in the sum. The batch is as for
        :class:`~deft_lightning.training.loss.BatchLoss`, the mask ``(B, T - 1)`` of positions whose next token counts.
        """
        output = self.batch_loss(batch, self.current_objective)
        return output.total, output.stats, output.keep

    @torch.no_grad()
    def statistics(self, batch: Batch, topk: int = 0) -> tuple[TokenStats, Tensor]:
        """Return the statistics and where the tokens are, without gradient; also the entropy of the `topk` largest."""
        output = self.batch_loss(batch, self.current_objective, NoObjective(topk))
        return output.stats, output.keep

    def configure_optimizers(self) -> Any:
        """Build the optimizer and the schedule; plan the schedule over the trainer's optimizer steps."""
        return make_optimizer(self.model, self.optimizer_callable, self.scheduler_callable, self.trainer, self.lr)

    def on_fit_start(self) -> None:
        """Put the sums where the tokens are; forget the micro-batches of a fit that was interrupted."""
        tell_head(self.meters.sparsity, self.objective.needs.reference)
        self.meters.to(self.device)
        self.normaliser.forget()
        settle_unprompted(self, self.prompts)
        if not self.normaliser.memory and not self.tokens_seen:
            self.normaliser.memory = begin_rates(self, self.current_objective.tracks)
            self.course.begin(self.objective, True, self.normaliser.memory)
        self.course.plan(self.trainer, self.objective)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Count the supervised tokens of the optimizer step; its first micro-batch settles `current_objective`."""
        if self.normaliser.begins_step:
            self.normaliser.free_gradients(self.trainer.optimizers)
            self.course.advance(self.objective, self.trainer.global_step, self.normaliser.memory)
        self.batch_loss.watching = is_logging_step(self.trainer)
        self.normaliser.count(batch["labels"], batch.get("token_weight"))
        reseed(self.current_epoch, batch_idx, self.global_rank, self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Return the summed loss, and detached statistics for the callbacks that watch."""
        output = self.batch_loss(batch, self.current_objective)
        self.meters.add_training(output, facts := facts_of(batch, output.keep, self.batch_loss.watching))
        self.normaliser.add(output, batch.get("example_id", ()), self.current_objective.tracks)
        return {"loss": output.total, "stats": output.stats, **facts}

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Divide the summed gradients by the supervised tokens of the whole step, then step."""
        given = (optimizer, optimizer_closure, self.trainer.accumulate_grad_batches, lambda: self.stop_asked)
        at_once = shows_gradients(self, SFTModule)
        with self.normaliser.step(*given, self.current_objective.tracks, at_once) as closure:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
        self.stop_agreed = self.normaliser.stop_agreed
        self.batch_loss.context.end_step(self.normaliser.left_out)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Divide and clip, and keep the norm before clipping; a step that is not finite goes no further."""
        self.normaliser.clip(optimizer, gradient_clip_val, gradient_clip_algorithm == "value", self)

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_idx: int) -> None:
        """Log the exact token-weighted means since the last logged step, on every rank alike."""
        if is_logging_step(self.trainer) and not is_accumulating(self.trainer):
            log_now(self.trainer, self.meters.log_training(self.log, self.trainer.global_step))
            self.log_dict(self.normaliser.logged())
            for tag, value in self.course.logged(self.objective).items():
                self.log(tag, value, prog_bar=tag == "noise/estimated")

    def on_validation_start(self) -> None:
        """Put the sums where the tokens are."""
        self.meters.to(self.device)
        self.batch_loss.watching = False
        self.normaliser.free_gradients(self.trainer.optimizers)
        settle_unprompted(self, self.prompts)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Add a batch to the validation sums; of the second loader, the corrupted tokens alone."""
        output = self.batch_loss(batch, self.current_objective)
        self.meters.add_validation(output, facts_of(batch, output.keep), corrupted=dataloader_idx > 0)
        return {"stats": output.stats}

    def on_validation_epoch_end(self) -> None:
        """Log the validation means, and let schedules see them that wait for one."""
        step_plateaus(self.trainer, self.meters.log_validation(self.log, len(self.trainer.num_val_batches) > 1))

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step a schedule; one that waits for a metric has been stepped at the end of the validation."""
        if metric is None:
            scheduler.step()

    def generate(self, batch: Batch, longest: int = 0, loader: int = 0) -> list[list[Completion]]:
        """Complete the left-padded prompts of a batch; one list of samples for each, none for a filler."""
        given = (self.model, self.tokenizer, batch, stop_tokens_of(self.prompts), longest, loader)
        return self.evaluator.complete(*given, lambda: asks_ahead(trainer_of(self), loader))

    def _begin_generation(self) -> None:
        """Check the prompts, and how completions are made."""
        together = ranks() > 1 and is_sharded(self.model)
        given = (self.model, test_sets_of(self.prompts), together, ranks())
        self.evaluator.begin(
            *given, partial(save_hugging_face, self.model, self.tokenizer, stop_tokens_of(self.prompts))
        )

    def on_predict_start(self) -> None:
        """Check the prompts."""
        self._begin_generation()

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Return one record a prompt: what grading it later needs."""
        tests = test_sets_of(self.prompts)[dataloader_idx]
        return prediction_records(self.generate(batch, tests.longest, dataloader_idx), batch, tests)

    def on_test_start(self) -> None:
        """Check the prompts, and start the sums of every loader."""
        self._begin_generation()
        self.evaluator.start(test_sets_of(self.prompts), self.device, self.trainer.num_devices)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Generate and grade."""
        tests = test_sets_of(self.prompts)[dataloader_idx]
        self.evaluator.grade(self.generate(batch, tests.longest, dataloader_idx), batch, tests, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the figures of every loader's prompts over all ranks, and print them as one table."""
        self.evaluator.report(test_sets_of(self.prompts), self.log, self.global_rank, self.trainer.world_size)

    def on_save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Add what `export` needs, and where the run stands; beside adapters leave out what the base's files have."""
        if not self._about:
            stops = self.prompts.stop_token_ids if self.prompts is not None else []
            self._about = describe(self.model, self.tokenizer, self.lora, stops)
        checkpoint["state_dict"] = self.base_weights.leave_out(self.model, checkpoint["state_dict"], self._about)
        run = self.course.state_dict(self.objective) | self.batch_loss.state_dict()
        card = {CARD: facts_of_run(self).plain()}
        checkpoint[KEY] = {**self._about, **run, **self.normaliser.state_dict(), **card}

    def on_load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Refuse another model or vocabulary than the checkpoint's; go on counting tokens and steps."""
        about = checkpoint.get(KEY, {})
        if "state_dict" in checkpoint:  # a sharded model has loaded its weights already
            check_state(self.model, checkpoint["state_dict"], about)
            checkpoint["state_dict"] = self.base_weights.put_back(self.model, checkpoint["state_dict"], about)
        check_vocabulary(self.tokenizer, about.get("vocabulary"))
        about = self.course.load_state_dict(self.objective, about)
        self.normaliser.load_state_dict(about)
        self.batch_loss.load_state_dict(about, None if self.source.given else self.pretrained)
