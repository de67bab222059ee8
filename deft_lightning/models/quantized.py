"""A frozen base in 4 or 8 bits under adapters (QLoRA): what is refused, how it is loaded, and what it holds."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from deft_lightning.annotations import CausalLM, Record, Settings
from deft_lightning.errors import UserError
from deft_lightning.models.head import base_causal_lm

Quantization = Literal["nf4", "int8"]
BLOCK, NESTED = 64, 256  # weights of a block with one scale, scales of a block with one scale of their own
PACKAGES = ("bitsandbytes", "accelerate")  # transformers asks for the second
LAYERS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}  # of bitsandbytes


def check_quantization(quantization: object, compute_dtype: object, lora: Any) -> None:
    """Refuse a quantised base that could not be trained, or not be loaded.

    Args:
        quantization: `nf4`, `int8`, or None.
        compute_dtype: What was asked for; None is the default.
        lora: Adapters to be trained, None without any.

    Raises:
        UserError: Names the option.
    """
    if quantization is None:
        if compute_dtype is not None:
            raise UserError(f"--model.compute_dtype {compute_dtype} is of a 4-bit base: add --model.quantization nf4")
        return
    if quantization not in get_args(Quantization):
        raise UserError(f"--model.quantization must be {' or '.join(get_args(Quantization))}, not {quantization!r}")
    option = f"--model.quantization {quantization}"
    if compute_dtype is not None and quantization != "nf4":
        raise UserError(f"--model.compute_dtype {compute_dtype} is of a 4-bit base, and {option} has none")
    if compute_dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"--model.compute_dtype must be float32 or bfloat16, not {compute_dtype!r}")
    if lora is None:
        raise UserError(f"{option}: a quantised base does not train; train adapters over it with --model.lora.r 16")
    if lora.changes_base:
        raise UserError(
            f"{option}: --model.lora.init_lora_weights {lora.init_lora_weights} changes the weights below the adapters,"
            " and a quantised base stays as it is"
        )
    if lora.use_dora:
        raise UserError(f"{option}: --model.lora.use_dora reads the norms of weights that are quantised; leave it out")
    if lora.target_parameters:
        raise UserError(f"{option}: --model.lora.target_parameters adapts weights that bitsandbytes does not quantise")


def check_installed(option: str) -> None:
    """Refuse a quantised base where the packages that it needs are not installed.

    Raises:
        UserError: Names them, and how they are installed.
    """
    missing = []
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise UserError(f"{option} needs {' and '.join(missing)}: pip install 'deft-lightning[qlora]'")


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """Return what transformers loads a quantised model by.

    `nf4` has blocks of 64 weights and quantised scales (double quantisation), 4.13 bits a weight. `int8` has one scale
    a row, and no outlier columns: which columns these are depends on all rows of a batch, and with them the loss of a
    row would depend on the rows beside it.

    Args:
        quantization: `nf4` or `int8`.
        dtype: Of the products with a 4-bit base.
    """
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def quantization_of(model: CausalLM) -> Quantization | None:
    """Return how the weights of a model are quantised, None where they are not.

    Raises:
        UserError: In a way that cannot be loaded again by :func:`quantization_config`.
    """
    config = getattr(base_causal_lm(model).config, "quantization_config", None)
    if config is None or not any(True for _ in quantized_layers(model)):
        return None
    held: Record = config if isinstance(config, dict) else config.to_dict()
    if held.get("load_in_8bit") and not held.get("llm_int8_threshold"):
        return "int8"
    if held.get("load_in_4bit") and held.get("bnb_4bit_quant_type") == "nf4" and held.get("bnb_4bit_use_double_quant"):
        return "nf4"
    raise UserError(
        "the model that was given is quantised in another way than nf4 with double quantisation, or int8 with"
        " llm_int8_threshold 0: give its name with quantization='nf4', or quantise it so"
    )


def check_unquantized(settings: Record, name: str, asked: str | None) -> None:
    """Refuse files that hold quantised weights: adapters are trained over what :func:`quantization_config` makes.

    Args:
        settings: Of the model's config.json.
        name: Folder or hub id.
        asked: Value of the option, None without.

    Raises:
        UserError: Says how the weights are quantised.
    """
    held = settings.get("quantization_config")
    if not isinstance(held, dict):
        return
    method = str(held.get("quant_method", "unknown"))
    if asked is not None or method in ("bitsandbytes", "torchao"):
        raise UserError(
            f"{name}: its weights are quantised already ({method}); name the model that they were made from, with"
            f" --model.quantization {asked or 'nf4'} (--model.pretrained)"
        )


def check_trained_whole(model: nn.Module, names: Iterable[str] | None) -> None:
    """Refuse modules to be trained whole whose weights are quantised.

    Args:
        model: Loaded, without adapters.
        names: Of ``modules_to_save``.

    Raises:
        UserError: Names one.
    """
    places = [f".{place}." for place, _ in quantized_layers(model)]
    for name in names or ():
        if any(f".{name}." in place for place in places):
            raise UserError(
                f"--model.lora.modules_to_save: the weights of {name} are quantised, so they cannot be trained; adapt"
                " them with --model.lora.target_modules"
            )


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield names and modules of a model whose weights bitsandbytes has quantised, without its adapters."""
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__name__ in LAYERS.values() and kind.__module__.startswith("bitsandbytes."):
            yield name, module


def settle_layers(model: CausalLM, name: str) -> None:
    """Make the layers of a model that was loaded ready to train.

    Raises:
        UserError: A layer is stored transposed: what is merged into it could not be saved under its name.
    """
    for place, layer in quantized_layers(model):
        if getattr(layer, "source_cls", nn.Linear).__name__ == "Conv1D":
            raise UserError(
                f"{name}: {place} is a Conv1D, which cannot be merged once it is quantised (--model.quantization)"
            )
        # Such a CPU packs weights anew in validation, for products without a gradient.
        layer.support_avx512bf16_for_cpu = False
    inside = {id(layer.weight) for _, layer in quantized_layers(model)}
    for weight in model.parameters():
        if id(weight) not in inside and weight.device.type == "cpu":
            # It is a view of its file, which would stay in memory as a whole: what was quantised with it.
            weight.data = weight.data.clone()


def base_line(model: CausalLM, quantization: Quantization) -> str:
    """Return the line of a base that was loaded: how much of it is quantised, and what that takes."""
    packed = [layer.weight for _, layer in quantized_layers(model)]
    inside = {id(weight) for weight in packed}
    rest = [weight for weight in model.parameters() if id(weight) not in inside]
    counts = [sum(map(parameter_count, weights)) for weights in (packed, rest)]
    sizes = [sum(w.numel() * w.element_size() for w in weights) for weights in ((*packed, *scales(model)), rest)]
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"base: {counts[0]:,} parameters in {quantization} ({sizes[0] / 1e6:,.1f} MB), {counts[1]:,} in {dtype}"
        f" ({sizes[1] / 1e6:,.1f} MB): embedding, head and norms are not quantised"
    )


def compute_in(model: CausalLM, dtype: torch.dtype) -> None:
    """Let the products with a 4-bit base be made in a dtype; autocast does not reach them."""
    for _, layer in quantized_layers(model):
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype = dtype


def scales(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of a quantised model that are neither parameters nor buffers: scales and tables."""
    for _, layer in quantized_layers(model):
        state = getattr(layer.weight, "quant_state", None)
        if state is not None:
            nested = () if state.state2 is None else (state.offset, state.state2.absmax, state.state2.code)
            yield from (state.absmax, state.code, *nested)
        for owner in (layer.weight, getattr(layer, "state", None)):
            scale = getattr(owner, "SCB", None)
            if isinstance(scale, Tensor):
                yield scale


def parameter_count(weight: Tensor) -> int:
    """Return how many numbers a weight holds: two in each byte of a 4-bit one."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else int(torch.Size(state.shape).numel())


def describe_quantization(model: CausalLM) -> Settings:
    """Return what a checkpoint says of a quantised base: kind, and dtype of its products."""
    kind = quantization_of(model)
    if kind is None:
        return {}
    dtypes = {str(getattr(layer, "compute_dtype", None)) for _, layer in quantized_layers(model)}
    compute = dtypes.pop().removeprefix("torch.") if len(dtypes) == 1 else "None"
    return {"quantization": {"kind": kind, **({} if compute == "None" else {"compute_dtype": compute})}}
