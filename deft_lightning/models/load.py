"""Build or load a Hugging Face causal language model, ready to train."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from deft_lightning.annotations import CausalLM, Record, Settings, Tokenizer
from deft_lightning.config_sizes import check_sizes
from deft_lightning.errors import UserError, did_you_mean, reason_of
from deft_lightning.models.contents import DTYPES
from deft_lightning.models.quantized import (
    Quantization,
    base_line,
    check_installed,
    check_unquantized,
    quantization_config,
    settle_layers,
)
from deft_lightning.models.quantized_shape import quantize_shapes
from deft_lightning.models.shard import layers_of
from deft_lightning.models.sizes import check_memory
from deft_lightning.models.weights import check_loaded, damaged, renaming, without_report
from deft_lightning.shipped_models import model_path
from deft_lightning.trust import check_attention, check_model, check_tokenizer, weight_files

Dtype = Literal["float32", "bfloat16"]


def check_pretrained(name: str, trust: bool = False, attention: str | None = None) -> str:
    """Return the folder or hub id to load; refuse what cannot or must not be loaded before anything else is done.

    Args:
        name: Folder or hub id; of a hub id nothing is fetched here.
        trust: Code of the model's own may run.
        attention: What was asked for in place of the attention that the model's config names.

    Raises:
        UserError: The path does not exist, is no model, or wants to run code.
    """
    path = model_path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                check_model(name, trust)
            raise UserError(
                f"{name}: has no config.json, so it is not a Hugging Face model folder (--model.pretrained)"
            )
        check_sizes(check_model(name, trust, attention), f"{name}: config.json: ", "--model.pretrained")
        check_tokenizer(name, trust)
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise UserError(f"{name}: no such model folder (--model.pretrained)")
    return name


def load_pretrained(
    name: str,
    dtype: Dtype,
    attention: str | None = None,
    trust: bool = False,
    quantization: Quantization | None = None,
    compute_dtype: Dtype | None = None,
) -> CausalLM:
    """Load a causal language model from a folder or the hub in train mode; under the meta device, its shapes alone.

    Args:
        name: Folder or hub id.
        dtype: Dtype of the weights, of those that are not quantised.
        attention: transformers' ``attn_implementation``; None lets it choose.
        trust: Code of the model's own may run.
        quantization: Of all linear layers but the head; None leaves them as they are.
        compute_dtype: Of the products with a 4-bit base; None is ``dtype``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = check_pretrained(name, trust, attention)
    settings = check_model(source, trust, attention)
    check_sizes(settings, f"{name}: config.json: ", "--model.pretrained")
    check_unquantized(settings, name, quantization)
    products = DTYPES[compute_dtype or dtype]
    options: Settings = {"attn_implementation": attention} if attention else {}
    # Never None: transformers asks on standard input then.
    options |= {"dtype": DTYPES[dtype], "trust_remote_code": trust}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
        if torch.get_default_device().type == "meta":
            model = AutoModelForCausalLM.from_config(config, **options)
            if quantization is not None:
                quantize_shapes(model, quantization, products)
            return ready(model)
        check_memory(config, options["dtype"], name, "--model.pretrained", trust, quantization)
        if quantization is not None:
            check_installed(f"--model.quantization {quantization}")
            options["quantization_config"] = quantization_config(quantization, products)
        model = ready(_with_weights(name, source, options))
        if quantization is not None:
            settle_layers(model, name)
            rank_zero_info(base_line(model, quantization))
        return model
    except UserError:
        raise
    except Exception as error:  # configs validate themselves, and weights unpickle, with many kinds of exception
        reason = damaged(weight_files(source, settings.get("transformers_weights")))
        reason = reason or reason_of(error)
        raise UserError(f"{name}: cannot load the model: {reason} (--model.pretrained)") from None


def load_base(name: str, about: Settings) -> CausalLM:
    """Load the base of a checkpoint's adapters in the dtype that it had in training, quantised if it was.

    Args:
        name: Folder or hub id.
        about: What the checkpoint says of itself.
    """
    held = about.get("quantization", {})
    if held:
        check_installed(f"the checkpoint, whose base was quantised to {held['kind']},")
    compute = held.get("compute_dtype")
    return load_pretrained(name, about["dtype"], quantization=held.get("kind"), compute_dtype=compute)


def _with_weights(name: str, source: str, options: Settings) -> CausalLM:
    """Load a model with all its weights; names that a wrapper has made longer are read as well."""
    from transformers import AutoModelForCausalLM

    # Shapes that differ are listed by check_loaded.
    options = {**options, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with without_report():
        model, info = AutoModelForCausalLM.from_pretrained(source, **options)
    mapping = renaming(info["missing_keys"], info["unexpected_keys"])
    if mapping:
        with without_report():
            model, info = AutoModelForCausalLM.from_pretrained(source, **options, key_mapping=mapping)
        prefixes = ", ".join(pattern.lstrip("^").replace("\\", "") for pattern in mapping)
        rank_zero_info(f"{name}: the names of its weights are read without {prefixes}")
    check_loaded(name, model, info)
    return model


def from_architecture(
    architecture: Record, tokenizer: Tokenizer | None, dtype: Dtype, attention: str | None = None
) -> CausalLM:
    """Build a causal language model with random weights.

    Args:
        architecture: ``model_type`` (llama, qwen3, gpt2, ...) and any option of its transformers config. A
            ``vocab_size`` that is left out is the tokenizer's.
        tokenizer: Gives the vocabulary size and the special token ids; None without a data module.
        dtype: Dtype of the weights.
        attention: transformers' ``attn_implementation``.

    Raises:
        UserError: Unknown model type or option, or a vocabulary smaller than the tokenizer's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    options = dict(architecture)
    kind = str(options.pop("model_type", "llama"))
    known = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if kind not in known:
        raise UserError(
            f"--model.architecture.model_type: transformers has no causal model {kind!r}.{did_you_mean(kind, known)}"
        )
    check_sizes(options, "--model.architecture.", "--model.architecture")
    check_attention(options.get("attn_implementation"), False, "--model.architecture.attn_implementation")
    # A transformers config takes any keyword and ignores those it does not know.
    default = AutoConfig.for_model(kind)
    if "rope_theta" in options and not hasattr(default, "rope_theta"):
        # Some have frequencies for each kind of attention.
        parts = [name for name, value in (default.rope_parameters or {}).items() if isinstance(value, dict)]
        part = f".{'full_attention' if 'full_attention' in parts else parts[0]}" if parts else ""
        raise UserError(
            f"rope_theta moved into rope_parameters: --model.architecture.rope_parameters{part}.rope_theta"
            f" {options['rope_theta']} (--model.architecture.rope_theta)"
        )
    names = {*default.to_dict(), *default.attribute_map, "attn_implementation", "dtype"}
    for name in options:
        if name not in names and not hasattr(default, name):
            raise UserError(f"--model.architecture.{name}: {kind} has no such option.{did_you_mean(name, names)}")
    if tokenizer is not None:
        size = options.setdefault("vocab_size", len(tokenizer))
        if size < len(tokenizer):
            raise UserError(
                f"--model.architecture.vocab_size {size} is smaller than the tokenizer's vocabulary of {len(tokenizer)}"
            )
        for special in ("bos", "eos", "pad"):
            options.setdefault(f"{special}_token_id", getattr(tokenizer, f"{special}_token_id"))
    try:
        config = AutoConfig.for_model(kind, **options)
        extra: Settings = {"attn_implementation": attention} if attention else {}
        check_memory(config, DTYPES[dtype], f"--model.architecture {kind}", "--model.architecture.*")
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False, **extra)
    except UserError:
        raise
    except Exception as error:  # configs validate themselves with many kinds of exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--model.architecture: {kind} cannot be built from these options: {reason}") from None
    return ready(model)


def ready(model: CausalLM) -> CausalLM:
    """Put a model into the state training needs: train mode, no cache, rotary frequencies that stay float32."""
    model.train()  # from_pretrained returns eval mode, in which dropout and gradient checkpointing are off
    model.config.use_cache = False
    keep_rotary_fp32(model)
    return model


def recompute_activations(model: CausalLM) -> None:
    """Let the layers of a model recompute their activations in backward."""
    # transformers before 5.24 knows the older name alone, later ones warn of it.
    known = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if known else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compile_body(model: CausalLM) -> None:
    """Compile each layer of a model's body with torch.compile; names of weights stay.

    Layers alike share one compilation, where a whole body takes minutes.

    Raises:
        UserError: The layers cannot be found.
    """
    for layer in layers_of(model):
        layer.compile()


def keep_rotary_fp32(model: nn.Module) -> None:
    """Keep rotary frequencies in float32 through ``model.to(bfloat16)``.

    Rounded to bfloat16 they are off by 0.73 rad at position 4095; Lightning's ``bf16-true`` casts every buffer.
    """
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
        if names:
            module._apply = types.MethodType(_apply_keeping(names), module)  # type: ignore[method-assign]


def _apply_keeping(names: list[str]) -> Callable[..., nn.Module]:
    def apply(self: nn.Module, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        kept = {name: self.get_buffer(name) for name in names}
        nn.Module._apply(self, fn, recurse)
        for name, old in kept.items():
            new = self.get_buffer(name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self

    return apply


def check_fits(model: CausalLM, tokenizer: Tokenizer | None, longest: int) -> None:
    """Refuse data the model has no embedding for.

    Raises:
        UserError: The vocabulary or the number of positions is too small.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and rows < len(tokenizer):
        raise UserError(
            f"the model's vocabulary of {rows} is smaller than the tokenizer's of {len(tokenizer)}; give it the missing"
            " rows with --model.resize_vocabulary true (--model.pretrained, --data.tokenizer)"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise UserError(
            f"the longest example has {longest} tokens, the model {positions} positions; set --data.max_length"
            f" {positions}"
        )
