"""Where the model of a run comes from: loaded, or built with random weights; adapted, placed, its head found."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.annotations import CausalLM, Record, Tokenizer
from deft_lightning.errors import UserError
from deft_lightning.models import (
    LoRA,
    adapter_folder,
    add_adapters,
    base_causal_lm,
    build_sharded,
    check_fits,
    check_pretrained,
    compile_body,
    find_head,
    fit_vocabulary,
    from_architecture,
    load_pretrained,
    lora_of,
    make_reference,
    router_loss_factor,
    shapes_of,
    sharded_copy,
)
from deft_lightning.models.load import Dtype, ready, recompute_activations
from deft_lightning.models.quantized import (
    Quantization,
    check_installed,
    check_quantization,
    check_trained_whole,
    check_unquantized,
    quantization_of,
)
from deft_lightning.ops import Backend
from deft_lightning.training.head_sparsity import Sparsity, check_sparsity, sparsity_of
from deft_lightning.training.loss import BatchLoss
from deft_lightning.training.model_checks import check_base, check_causal_lm, check_precision, check_tokens, compute_as
from deft_lightning.training.protocols import shards
from deft_lightning.trust import check_attention, read_settings


@dataclass(frozen=True)
class ModelSource:
    """Builds or loads the model of a run; arguments as those of :class:`deft_lightning.SFTModule`."""

    pretrained: Any
    architecture: dict[str, Any] | None
    dtype: Dtype
    attention: str | None
    lora: LoRA | None
    gradient_checkpointing: bool
    trust_remote_code: bool
    head: str
    head_backend: Backend
    head_sparsity: Sparsity
    compile: bool
    add_tokens: list[str] | None = None
    resize_vocabulary: bool = False
    quantization: Quantization | None = None
    compute_dtype: Dtype | None = None

    @classmethod
    def of(cls, settings: Record) -> Self:
        """Return the source that the arguments of a module describe, whatever else is among them."""
        source = cls(**{field.name: settings[field.name] for field in fields(cls)})
        lora = source.lora
        if source.given and lora is None:
            lora = lora_of(source.pretrained)
        elif (adapters := adapter_folder(source.pretrained)) is not None:
            lora = adapters.agreed(lora)
        elif source.widens and lora is not None:
            lora = replace(lora, embeddings=True)  # rows that are new have to be trained
        own = quantization_of(source.pretrained) if source.given else None
        if source.given and source.quantization not in (None, own):
            raise UserError("quantization: the model that was given is loaded already; give its name instead")
        quantization = own or source.quantization
        check_quantization(quantization, source.compute_dtype, lora)
        if quantization is not None and not source.given:
            check_installed(f"--model.quantization {quantization}")
        return replace(source, lora=lora, quantization=quantization)

    def __post_init__(self) -> None:
        """Refuse what cannot be loaded, and must not be, before data is prepared."""
        if self.head not in ("fused", "dense"):
            raise UserError(f"--model.head must be fused or dense, not {self.head!r}")
        if self.head_backend not in ("auto", "torch", "triton"):
            raise UserError(f"--model.head_backend must be auto, torch or triton, not {self.head_backend!r}")
        check_sparsity(self.head_sparsity)
        check_attention(self.attention, self.trust_remote_code, "--model.attention")
        check_tokens(self.add_tokens)
        if self.given:
            check_causal_lm(self.pretrained)
            if self.attention is not None:
                raise UserError("attention is a setting of the model that was given: set it there")
        elif self.pretrained is not None:
            adapters = adapter_folder(self.pretrained)
            if adapters is not None and self.widens:
                raise UserError(
                    f"--model.add_tokens, --model.resize_vocabulary: {self.pretrained} holds adapters, whose model"
                    " keeps its tokens; leave both out, or merge the adapters first"
                )
            check_base(self.pretrained, adapters.base if adapters else self.pretrained, self._check)
        elif self.quantization is not None:
            raise UserError(
                f"--model.quantization {self.quantization}: random weights have no file to quantise; name a model with"
                " --model.pretrained"
            )

    def _check(self, name: str) -> None:
        if Path(source := check_pretrained(name, self.trust_remote_code, self.attention)).is_dir():
            check_unquantized(read_settings(source, "config.json"), name, self.quantization)

    @property
    def given(self) -> bool:
        """Return whether the model itself was given, rather than its name."""
        return self.pretrained is not None and not isinstance(self.pretrained, str)

    @property
    def widens(self) -> bool:
        """Return whether the model may get rows for tokens that it has none for."""
        return self.resize_vocabulary or bool(self.add_tokens)

    @property
    def name(self) -> str | None:
        """Return the hub id or folder of the model; of a given one the folder it was loaded from, if that exists."""
        if not self.given:
            adapters = adapter_folder(self.pretrained)
            own = adapters is None or (Path(adapters.folder).expanduser() / "tokenizer_config.json").is_file()
            return self.pretrained if adapters is None or own else adapters.base
        folder = str(getattr(base_causal_lm(self.pretrained).config, "_name_or_path", "") or "")
        return folder if folder and (Path(folder) / "tokenizer_config.json").is_file() else None

    def settle_tokenizer(self, data: Any | None, own: Tokenizer | None) -> None:
        """Give the data the tokenizer of a model that was given, and say which that is.

        Args:
            data: The data module, None without one.
            own: Tokenizer of the checkpoint that the model comes from.

        Raises:
            UserError: There is none: one that is built from the data is no tokenizer of this model.
        """
        if not self.given or data is None or not hasattr(data, "use_tokenizer"):
            return
        if getattr(data, "tokenizer_name", None) is not None or getattr(data, "tokenizer", None) is not None:
            return
        if own is not None:
            data.use_tokenizer(own)
            rank_zero_info("tokenizer: the checkpoint's")
        elif self.name is not None:
            rank_zero_info(f"tokenizer: loaded from {self.name}, as the model was")
        else:
            raise UserError(
                "the model that was given names no folder with a tokenizer: give InstructionDataModule(tokenizer=...)"
            )

    def build(self, tokenizer: Tokenizer | None, longest: int, added: Sequence[int] = ()) -> CausalLM:
        """Return the model in train mode; on the meta device its weights hold nothing.

        Args:
            tokenizer: Of the data, if there is one: gives the vocabulary of a model with random weights.
            longest: Tokens of the longest example; 0 where that is not known.
            added: Ids of tokens that were added to the tokenizer for this run.

        Raises:
            UserError: No model is named, or the data does not fit it.
        """
        adapters = adapter_folder(self.pretrained)
        if self.pretrained is not None and self.architecture is not None:
            rank_zero_info(f"--model.architecture is not used: --model.pretrained {self.name} brings its own")
        if self.given:
            model = self._given()
        elif adapters is not None:
            model = check_base(self.pretrained, adapters.base, self._load)
            adapters.widen(model)
        elif self.pretrained is not None:
            model = self._load(self.pretrained)
        elif self.architecture is not None:
            model = from_architecture(self.architecture, tokenizer, self.dtype, self.attention)
        else:
            raise UserError("no model: set --model.pretrained ID_OR_DIR, or --model.architecture.* for random weights")
        if self.widens:
            if tokenizer is None:
                raise UserError("--model.add_tokens, --model.resize_vocabulary: there is no data, so no tokenizer")
            fit_vocabulary(model, tokenizer, added)
        check_fits(model, tokenizer, longest)
        if self.gradient_checkpointing:
            recompute_activations(model)
        if self.lora is not None and not hasattr(model, "get_base_model"):
            check_trained_whole(model, self.lora.modules_to_save)
            model = add_adapters(model, self.lora)
        if adapters is not None:
            adapters.load_into(model)
        return model

    def _load(self, name: str) -> CausalLM:
        return load_pretrained(
            name, self.dtype, self.attention, self.trust_remote_code, self.quantization, self.compute_dtype
        )

    def _given(self) -> CausalLM:
        """Return the model that was given, itself; under the meta device its shapes."""
        if torch.get_default_device().type != "meta":
            return ready(self.pretrained)
        causal = base_causal_lm(self.pretrained)
        if causal is not self.pretrained:
            return ready(shapes_of(self.pretrained))
        # Not a copy: rank 0 has put the adapters that a run adds into the model itself.
        return ready(type(causal)(copy.deepcopy(causal.config)).to(causal.dtype))

    def place(self, build: Callable[[], Any], strategy: Any | None, reference: bool = False) -> tuple[Any, BatchLoss]:
        """Return the model where a strategy wants it, and what makes a loss of it.

        Args:
            build: Builds the model, :meth:`build` with the data's tokenizer; called under the meta device as well.
            strategy: Of the trainer; None without one.
            reference: Whether predictions will be compared with those of the model as it is now.

        Raises:
            UserError: The fused head cannot read this model's, or its layers cannot be found.
        """
        copied: Callable[[], Any] | None = None
        check_precision(self.quantization, strategy)
        if shards(strategy):
            model = build_sharded(build, strategy.sharding)
            copied = partial(sharded_copy, model, build, strategy.sharding)
        else:
            model = build()
        compute_as(model, strategy, self.compute_dtype)
        seam = find_head(model, self.head_backend) if self.head == "fused" else None
        if seam is not None:
            device = "cpu" if strategy is None else strategy.root_device.type
            seam = replace(seam, sparsity=sparsity_of(self.head_sparsity, seam, device))
        loss = BatchLoss(model, seam, router_loss_factor(model))
        if reference:
            loss.reference = make_reference(model, seam, copied)
        if self.compile:
            compile_body(model)
            if loss.reference is not None and loss.reference.frozen:
                compile_body(loss.reference.model)
        return model, loss
