"""Checkpoints of adapters hold what trains; the rest is read from the base again, which must be what it was."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.annotations import CausalLM, Settings, State
from deft_lightning.errors import UserError
from deft_lightning.models.fingerprint import weights_fingerprint
from deft_lightning.models.quantized import quantization_of, quantized_layers

BASE = "base"  # of what a checkpoint says of itself: name and weights of the model that it leaves out
OWNER = "model."  # what names in a checkpoint begin with
COPIED = ".original_module."  # in the name of what peft keeps beside a module that is trained whole
UNQUANTIZED = "unquantised"  # weights of a quantised base that stay as they are, in bfloat16
LOW = "bfloat16"  # the dtype that every base can be compared in, whatever it was loaded in


def frozen_entries(model: CausalLM) -> set[str]:
    """Return the names in a model's state of the weights that do not train, and of scales of quantised ones.

    Buffers are not among them.
    """
    state = model.state_dict(keep_vars=True)
    frozen = {id(weight) for weight in model.parameters() if not weight.requires_grad}
    return {name for name, value in state.items() if id(value) in frozen} | _beside(model, state)


def _beside(model: CausalLM, state: State) -> set[str]:
    """Return the names in a model's state of what is neither parameter nor buffer: scales, which bitsandbytes adds."""
    if not any(True for _ in quantized_layers(model)):
        return set()
    own = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return state.keys() - {name for name, _ in own}


def left_out(model: CausalLM) -> set[str]:
    """Return the names in the state of a model with adapters that a checkpoint leaves out: the base's files have them.

    An embedding that is trained whole may have got rows that the base does not have: it is kept as it was, too.
    """
    return {name for name in frozen_entries(model) if COPIED not in name}


def describe_base(model: CausalLM, name: str, names: Collection[str]) -> Settings:
    """Return what a checkpoint says of the weights that it leaves out; of a sharded model every rank has to call it.

    Args:
        model: With adapters.
        name: Folder or hub id of the base.
        names: As :func:`left_out` returns them.
    """
    if quantization_of(model) is not None:
        return {"name": name, "weights": _of_quantized(model, names)}
    own = str(model.dtype).removeprefix("torch.")
    return {"name": name, "weights": {dtype: _fingerprint(model, names, dtype) for dtype in dict.fromkeys([own, LOW])}}


def check_base(model: CausalLM, about: Settings, held: Collection[str], where: str) -> None:
    """Refuse to put adapters onto another base than theirs; of a sharded model every rank has to call it.

    Weights that were loaded in two dtypes are compared in bfloat16, to which both round alike.

    Args:
        model: With adapters, whose base is looked at.
        about: What the checkpoint says of itself; without an entry of a base nothing is compared.
        held: Names of the weights in the checkpoint.
        where: The model that is looked at, for the message.

    Raises:
        UserError: The weights differ.
    """
    known = about.get(BASE)
    if known is None:
        return
    names = frozen_entries(model) - {name.removeprefix(OWNER) for name in held}
    differs = UserError(
        f"{where}: its weights are not those that the adapters of the checkpoint were trained on, of"
        f" {known['name']}; they fit no others (--model.pretrained, --ckpt_path)"
    )
    if quantization_of(model) is not None:
        now, before = _of_quantized(model, names), known["weights"]
        if any(before.get(key) != value for key, value in now.items() if key in before or key == UNQUANTIZED):
            raise differs
        if not now.keys() <= before.keys():
            made, other = (", ".join(sorted(side.keys() - {UNQUANTIZED})) for side in (now, before))
            rank_zero_info(
                f"{where}: its base is quantised to {made}, and was to {other} in training; the weights that are not"
                " quantised are compared alone"
            )
        return
    own = str(model.dtype).removeprefix("torch.")
    dtype = own if own in known["weights"] else LOW
    if known["weights"].get(dtype) != _fingerprint(model, names, dtype):
        raise differs


def completed(model: CausalLM, about: Settings, state: State) -> State:
    """Return a checkpoint's weights with those of the base, which it leaves out, as the model has them."""
    if about.get(BASE) is None:
        return state
    own = model.state_dict()
    frozen = frozen_entries(model) - _beside(model, own)
    return {**{f"{OWNER}{name}": own[name] for name in own if name in frozen}, **state}


def _of_quantized(model: CausalLM, names: Collection[str]) -> dict[str, str]:
    """Return fingerprints of a quantised base: of the weights that are not quantised, and of those that are.

    How weights are rounded to few bits depends on the dtype they were loaded in, and may depend on the device.
    """
    layers = dict(quantized_layers(model))
    packed = {f"{name}.weight": layer.weight.data for name, layer in layers.items()}
    (device,) = {weight.device.type for weight in packed.values()}
    rest = [name for name in names if name not in packed]
    key = f"{quantization_of(model)} from {str(model.dtype).removeprefix('torch.')} on {device}"
    stored = {name: weight.view(torch.uint8) for name, weight in packed.items() if name in names}
    return {UNQUANTIZED: _fingerprint(model, rest, LOW), key: weights_fingerprint(stored, torch.uint8)}


def _fingerprint(model: CausalLM, names: Collection[str], dtype: str) -> str:
    weights: dict[str, Any] = {name: weight.detach() for name, weight in model.named_parameters() if name in names}
    return weights_fingerprint(weights, getattr(torch, dtype))
