"""Checkpoints of this package: what they hold beside the weights, how they are read, and a model made of one."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero  # noqa: F401 - sets the rank, without which nothing is told
from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.annotations import CausalLM, Checkpoint, Record, Settings, State, Tokenizer
from deft_lightning.config_sizes import check_sizes
from deft_lightning.errors import UserError, reason_of
from deft_lightning.hashing import key
from deft_lightning.models.base import BASE, COPIED, OWNER, check_base, completed, frozen_entries
from deft_lightning.models.contents import DTYPES, KEY, is_inside, pickled, problem
from deft_lightning.models.head import base_causal_lm
from deft_lightning.models.load import load_base, ready
from deft_lightning.models.lora import LoRA, add_adapters
from deft_lightning.models.quantized import describe_quantization
from deft_lightning.models.seal import DIGESTS, Damaged, check_folder, check_sealed, has_end, is_sealed, unbounded
from deft_lightning.models.shares import METADATA, SHARED, read_weights
from deft_lightning.models.sizes import check_memory
from deft_lightning.trust import check_code

Shape = tuple[int, ...]
A = "lora_A.default.weight"  # ends the name of an adapter's first matrix, which has a row for each rank


def vocabulary_digest(tokenizer: Tokenizer) -> str:
    """Return a hash of a tokenizer's tokens and their ids."""
    items = sorted(tokenizer.get_vocab().items())
    return f"{key(*(part for item in items for part in item)):032x}"


def check_state(model: CausalLM, state: State, about: Settings | None = None) -> None:
    """Refuse weights of another architecture.

    Args:
        model: To put them into.
        state: The weights of a checkpoint.
        about: What it says of itself: of one that names a base, weights of the base may be missing.

    Raises:
        UserError: A weight is missing, too many, or of another shape; the message names one.
    """
    known = frozen_entries(model) if (about or {}).get(BASE) else set()
    own = {f"{OWNER}{name}": tuple(value.shape) for name, value in model.state_dict().items()}
    own = {name: shape for name, shape in own.items() if name in state or name.removeprefix(OWNER) not in known}
    check_shapes(own, {name: tuple(value.shape) for name, value in state.items() if name.startswith(OWNER)})


def check_shapes(own: Mapping[str, Shape], theirs: Mapping[str, Shape], prefix: str = "") -> None:
    """Refuse weights of other names or shapes than a model's own.

    Args:
        own: Shape of each weight of the model.
        theirs: Shape of each weight of the checkpoint.
        prefix: What names begin with, left out of the message.

    Raises:
        UserError: They differ; the message names one.
    """
    wrong = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
    if wrong:
        raise UserError(
            "--ckpt_path: the checkpoint is from a different model, for example "
            f"{wrong[0].removeprefix(prefix)} has shape"
            f" {theirs.get(wrong[0])} in it and {own.get(wrong[0])} here (--model.architecture, --model.pretrained,"
            " --model.lora)"
        )


def describe(
    model: CausalLM, tokenizer: Tokenizer | None, lora: LoRA | None, stop_token_ids: Sequence[int]
) -> Settings:
    """Return what a checkpoint must hold, in plain values, to be exported without its configuration or data."""
    files: dict[str, str] = {}
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for path in Path(folder).rglob("*"):
                if path.is_file():
                    files[str(path.relative_to(folder))] = path.read_text(encoding="utf-8")
    causal = base_causal_lm(model)
    return {
        "config": causal.config.to_json_string(use_diff=False),
        "generation_config": causal.generation_config.to_json_string(use_diff=False),
        "dtype": str(causal.dtype).removeprefix("torch."),
        "lora": None if lora is None else lora.settings(),
        **describe_quantization(model),
        "tokenizer": files,
        "vocabulary": None if tokenizer is None else vocabulary_digest(tokenizer),
        "stop_token_ids": list(stop_token_ids),
    }


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint file, or of a folder of shares what is neither weights nor optimizer; verify every byte first.

    Nothing in it is executed: it is read with ``weights_only``, which makes tensors and plain values alone.

    Args:
        path: A file or folder on this machine.

    Raises:
        UserError: It does not exist, is incomplete, has changed since it was written, or holds other objects.
    """
    source = Path(path)
    if not source.exists():
        raise UserError(f"{path}: no such checkpoint (--ckpt_path)")
    if not is_complete(source):
        raise UserError(f"{path}: is not a complete checkpoint (--ckpt_path)")
    file = source / SHARED if source.is_dir() else source
    if not source.is_dir() and not is_sealed(source):  # its members are about to be read
        try:
            _check_members(source)
        except (zipfile.BadZipFile, OSError, NotImplementedError):
            pass  # damaged, which is told below
    verify(source)
    try:
        _check_members(file)
        checkpoint: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # another archive, or objects of another program: the unpickler fails in any way
        if named := pickled(error):
            what = f"it holds {named}, which is not a plain value"
            raise UserError(f"{path}: is refused: {what}, and loading it would run code (--ckpt_path)") from None
        raise UserError(f"{path}: is not a checkpoint of SFTModule (--ckpt_path)") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: is not a checkpoint of SFTModule (--ckpt_path)")
    return checkpoint


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of this package: a file, or a folder of the shares of many ranks.

    Of a folder everything but the optimizer's state is read, in this process alone.

    Raises:
        UserError: As for :func:`read_checkpoint`; or it was written by something else, or is malformed.
    """
    checkpoint, source = read_checkpoint(path), Path(path)
    if source.is_dir() and KEY in checkpoint:
        checkpoint = {**checkpoint, "state_dict": read_weights(source)}
    if why := problem(checkpoint):
        raise UserError(f"{path}: {why} (--ckpt_path)")
    return checkpoint


def verify(path: Path) -> None:
    """Compare a checkpoint with the digests it was written with.

    Raises:
        UserError: It has changed since; names the file, and the member of it that is damaged.
    """
    try:
        if not path.is_dir():
            check_sealed(path)
        elif not check_folder(path):
            rank_zero_info(f"{path}: has no {DIGESTS}, so its shards cannot be verified")
    except Damaged as error:
        raise UserError(f"{path}: is damaged: {error}; use another checkpoint (--ckpt_path)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}) (--ckpt_path)") from None


def _check_members(path: Path) -> None:
    """Refuse an archive that could unpack to any size."""
    with zipfile.ZipFile(path) as archive:
        if why := unbounded(archive):
            raise UserError(f"{path}: is refused: {why} (--ckpt_path)")


def is_complete(path: Path) -> bool:
    """Return whether a path is a checkpoint that was written to its end: a file, or a folder of shares."""
    if path.is_dir():
        return (path / METADATA).is_file() and (path / SHARED).is_file()
    return path.is_file() and has_end(path)


def model_from_checkpoint(checkpoint: Checkpoint, base: str | None = None) -> tuple[Any, Any | None, list[int]]:
    """Rebuild model, tokenizer and stop tokens from a checkpoint, and from the base that it names and leaves out.

    Args:
        checkpoint: As :func:`load_checkpoint` returns it.
        base: Where the base of its adapters is now; default: where it was in training.

    Raises:
        UserError: Its model cannot be built, its weights are of another one, or the base is not what it was.
    """
    about, held = checkpoint[KEY], checkpoint["state_dict"]
    try:
        if about.get(BASE):
            base = base or about[BASE]["name"]
            model = _adapted(about, held, base)
        else:
            model = _network(about, held)
        check_state(model, held, about)
        check_base(model, about, held, base or "")
        state = completed(model, about, held)
        model.load_state_dict({k.removeprefix(OWNER): v for k, v in state.items() if k.startswith(OWNER)})
        for config in getattr(model, "peft_config", {}).values():
            config.init_lora_weights = about["lora"].get("init_lora_weights", True)
    except UserError:
        raise
    except Exception as error:  # configs and layers refuse what they do not like with any kind of exception
        raise UserError(f"--ckpt_path: the checkpoint's model cannot be built: {reason_of(error)}") from None
    return model, tokenizer_from_checkpoint(checkpoint), list(about["stop_token_ids"])


def _adapters(about: Settings, state: Record) -> LoRA:
    """Return a checkpoint's adapters, on the modules that its weights are of: a pattern of a stranger is never matched.

    Matching a pattern may take for ever, and a rank that the weights do not have more memory than there is.
    """
    lora = replace(LoRA(**about["lora"]), init_lora_weights=True)  # the weights come from the checkpoint
    ranks = {value.shape[0] for name, value in state.items() if name.endswith(f".{A}") and value.dim()}
    experts = bool(lora.target_parameters)  # all of a layer have their rows in one matrix
    if any(rank != lora.r and not (experts and rank % lora.r == 0) for rank in ranks):
        raise UserError(f"--ckpt_path: the checkpoint says rank {lora.r} of its adapters, which have {max(ranks)}")
    if not ranks:
        raise UserError("--ckpt_path: the checkpoint names adapters but has no adapter weights")
    if not isinstance(lora.target_modules, str) or lora.target_modules == "all-linear":
        return lora
    if experts:
        raise UserError("--ckpt_path: the checkpoint's adapters have a pattern for modules beside names of parameters")
    places = [name.removesuffix(f".{A}") for name in state if name.endswith(f".{A}")]
    return replace(lora, target_modules=[place.removeprefix("model.base_model.model.") for place in places])


def _adapted(about: Settings, weights: Mapping[str, Any], base: str) -> CausalLM:
    """Return the base of a checkpoint's adapters with adapters, which are still new."""
    from transformers import GenerationConfig

    try:
        model = load_base(base, about)
    except UserError as error:
        raise UserError(
            f"--ckpt_path: the checkpoint holds adapters of {base!r}, which cannot be loaded: {error}; if it "
            "has moved, name it with --model.pretrained"
        ) from None
    # An embedding that got rows is in the checkpoint whole; what says to be larger than the file is not believed.
    rows, columns = model.get_input_embeddings().weight.shape
    copied = [value for name, value in weights.items() if COPIED in name and name.endswith(".weight")]
    wide = max((value.shape[0] for value in copied if _is_matrix(value) and value.shape[1] == columns), default=0)
    if wide > rows:
        model.resize_token_embeddings(wide, mean_resizing=False)
    model.generation_config = GenerationConfig.from_dict(json.loads(about["generation_config"]))
    return add_adapters(model, _adapters(about, weights))


def _is_matrix(value: Any) -> bool:
    return value.dim() == 2 and value.layout is torch.strided and value.is_contiguous()


def _network(about: Settings, weights: Mapping[str, Any]) -> CausalLM:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    settings = json.loads(about["config"])
    check_code(settings, "--ckpt_path: the checkpoint's config: ")
    check_sizes(settings, "--ckpt_path: the checkpoint's config: ", "--ckpt_path")
    config, dtype = AutoConfig.for_model(settings["model_type"]).from_dict(settings), DTYPES[about["dtype"]]
    check_memory(config, dtype, "--ckpt_path: the checkpoint's model", "--ckpt_path")
    model = ready(AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False))
    model.generation_config = GenerationConfig.from_dict(json.loads(about["generation_config"]))
    return model if about["lora"] is None else add_adapters(model, _adapters(about, weights))


def tokenizer_from_checkpoint(checkpoint: Checkpoint) -> Tokenizer | None:
    """Return the tokenizer a checkpoint was trained with, or None if it had none.

    Raises:
        UserError: A file of it would be written outside of the folder it is read from, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    files = checkpoint[KEY]["tokenizer"]
    if not files:
        return None
    with tempfile.TemporaryDirectory(prefix="deft_lightning-") as folder:
        try:
            for name, text in files.items():
                if not is_inside(name):  # whoever has read the checkpoint: nothing is ever written elsewhere
                    raise UserError(f"--ckpt_path: the checkpoint names a file of its tokenizer {str(name)[:200]!r}")
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).write_text(text, encoding="utf-8")
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except UserError:
            raise
        except Exception as error:  # half surrogates, a file that is a folder too; tokenizers raise a bare Exception
            raise UserError(f"--ckpt_path: the checkpoint's tokenizer cannot be loaded: {reason_of(error)}") from None
