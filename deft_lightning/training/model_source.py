"""Where the model of a run comes from: loaded, or built with random weights; adapted, placed, its head found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deft_lightning.errors import UserError
from deft_lightning.models import (
    LoRA,
    add_adapters,
    build_sharded,
    check_fits,
    check_pretrained,
    compile_body,
    find_head,
    from_architecture,
    load_pretrained,
    router_loss_factor,
    vocabulary_digest,
)
from deft_lightning.models.load import Dtype
from deft_lightning.ops import Backend
from deft_lightning.training.loss import BatchLoss
from deft_lightning.training.protocols import shards
from deft_lightning.trust import check_attention


@dataclass(frozen=True)
class ModelSource:
    """Builds or loads the model of a run; arguments as those of :class:`deft_lightning.SFTModule`."""

    pretrained: str | None
    architecture: dict[str, Any] | None
    dtype: Dtype
    attention: str | None
    lora: LoRA | None
    gradient_checkpointing: bool
    trust_remote_code: bool
    head: str
    head_backend: Backend
    compile: bool

    def __post_init__(self) -> None:
        """Refuse what cannot be loaded, and must not be, before data is prepared."""
        if self.head not in ("fused", "dense"):
            raise UserError(f"--model.head must be fused or dense, not {self.head!r}")
        if self.head_backend not in ("auto", "torch", "triton"):
            raise UserError(f"--model.head_backend must be auto, torch or triton, not {self.head_backend!r}")
        check_attention(self.attention, self.trust_remote_code, "--model.attention")
        if self.pretrained is not None:
            check_pretrained(self.pretrained, self.trust_remote_code, self.attention)

    def build(self, tokenizer: Any | None, longest: int) -> Any:
        """Return the model in train mode; on the meta device its weights hold nothing.

        Args:
            tokenizer: Of the data, if there is one: gives the vocabulary of a model with random weights.
            longest: Tokens of the longest example; 0 where that is not known.

        Raises:
            UserError: No model is named, or the data does not fit it.
        """
        if self.pretrained is not None:
            model = load_pretrained(self.pretrained, self.dtype, self.attention, self.trust_remote_code)
        elif self.architecture is not None:
            model = from_architecture(self.architecture, tokenizer, self.dtype, self.attention)
        else:
            raise UserError("no model: set --model.pretrained ID_OR_DIR, or --model.architecture.* for random weights")
        check_fits(model, tokenizer, longest)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model if self.lora is None else add_adapters(model, self.lora)

    def place(self, build: Callable[[], Any], strategy: Any | None) -> tuple[Any, BatchLoss]:
        """Return the model where a strategy wants it, and what makes a loss of it.

        Args:
            build: Builds the model, :meth:`build` with the data's tokenizer; called under the meta device as well.
            strategy: Of the trainer; None without one.

        Raises:
            UserError: The fused head cannot read this model's, or its layers cannot be found.
        """
        if shards(strategy):
            mesh = strategy.device_mesh["data_parallel"]
            model = build_sharded(build, mesh, strategy.root_device, strategy.low_precision)
        else:
            model = build()
        seam = find_head(model, self.head_backend) if self.head == "fused" else None
        loss = BatchLoss(model, seam, router_loss_factor(model))
        if self.compile:
            compile_body(model)
        return model, loss


def check_vocabulary(tokenizer: Any | None, digest: str | None) -> None:
    """Refuse another tokenizer than the one a checkpoint was trained with.

    Args:
        tokenizer: Of the data, None without any.
        digest: Of the checkpoint's, None where it is not known.

    Raises:
        UserError: They differ.
    """
    if tokenizer is not None and digest is not None and digest != vocabulary_digest(tokenizer):
        raise UserError(
            "the tokenizer is not the one the checkpoint was trained with: a tokenizer built from the data changes"
            " with --data.source and its split; name one with --data.tokenizer, for example the run's export folder"
        )
